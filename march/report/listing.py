"""`train.py --list` and `--show NAME`: the experiments, and what one is and costs, without training it."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

import kernels
from march import experiments
from march.config import (
    ModelConfig,
    difference,
    outside_kernels,
    override,
    parse_overrides,
    resolve,
    to_dict,
)
from march.cost import DEVICES, parameters, total_parameters
from march.data import SpanCorruption
from march.data.corpora import SOURCES
from march.experiments import claims
from march.recipe import load

REFERENCE_DEVICE, PROCESSES = "a5000", 8
UNLIMITED = 1000  # columns where the output is not a terminal: no wrapping for grep


def main(arguments: argparse.Namespace) -> int:
    """Prints what --list or --show asks for; returns the exit code. ConfigError on a wrong name or value."""
    if arguments.list:
        rows = [describe(name) for name in experiments.names()]
        print(json.dumps(rows, indent=2)) if arguments.json else print_list(rows)
        return 0
    changes = parse_overrides(arguments.set or ())
    shown = show(arguments.show, changes, arguments.recipe or "paper", arguments.impl or "auto")
    print(json.dumps(shown, indent=2)) if arguments.json else print_show(shown)
    return 0


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe(name: str) -> dict[str, Any]:
    """One row of the list."""
    experiment = experiments.get(name)
    return {
        "name": experiment.name,
        "base": experiment.base,
        "changes": {field: to for field, (_, to) in experiments.difference(name).items()},
        "parameters": total_parameters(experiments.configuration(name)),
        "control": experiment.control,
        "hypothesis": experiment.hypothesis,
        "claim": experiment.claim.text if experiment.claim else None,
        "evidence": experiment.claim.evidence(name, experiment.control) if experiment.claim else None,
        "here": claims.here(name),
        "source": experiment.source,
    }


class _Console(Console):
    def on_broken_pipe(self) -> None:  # rich would end the process with its own exit code
        raise BrokenPipeError


def _console() -> Console:
    console = _Console()
    return console if console.is_terminal else _Console(width=UNLIMITED)


def print_list(rows: list[dict[str, Any]]) -> None:
    """The list as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "what changes", "parameters", "control", "published claim", "its runs", "our runs"):
        table.add_column(
            heading, justify="right" if heading == "parameters" else "left", no_wrap=heading in ("name", "parameters")
        )
    for row in rows:
        changes = ", ".join(f"{field} {_value(to)}" for field, to in row["changes"].items())
        if row["base"] not in (None, "Baseline"):
            changes = f"{row['base']}: {changes}"
        table.add_row(
            row["name"],
            changes or "the reference",
            f"{row['parameters']:,}",
            *(row[field] or "" for field in ("control", "claim", "evidence", "here")),
        )
    _console().print(table)


def show(name: str, changes: dict[str, Any], recipe_name: str = "paper", impl: str = "auto") -> dict[str, Any]:
    """Everything about experiment `name`, with `changes` on top: configuration, difference, parameters, cost.

    The cost is that of a recipe's lengths and batch, and of one implementation on the reference device, a GPU. A recipe
    without a vocabulary of its own has its corpus's.
    """
    from march import cost

    experiment, recipe = experiments.get(name), load(recipe_name)
    vocabulary = recipe.data.vocab_size or SOURCES[recipe.data.source or "files"].vocab_size
    declared = experiments.configuration(name)
    config = override(declared, **{"vocab_size": vocabulary, **changes})
    base = experiments.configuration(experiment.base) if experiment.base else ModelConfig()
    corruption = SpanCorruption(recipe.batch.sequence_length)
    lengths = (min(corruption.input_length, config.max_length), min(corruption.label_length, config.max_length))
    counted = cost.counted_as(kernels.parse_impl(impl), "cuda")
    step = cost.step_costs(config, *lengths, micro_batch=1, impl=kernels.parse_impl(counted)).step
    estimate = cost.memory(config, *lengths, impl=counted)
    device = DEVICES[REFERENCE_DEVICE]
    fits = cost.fitting_micro_batch(config, *lengths, memory_bytes=device.memory, impl=counted)
    chosen = largest_power_of_two(min(fits, recipe.batch.sequences // PROCESSES))
    return {
        **describe(name),
        "parameters": total_parameters(config),
        "overrides": changes,
        "configuration": to_dict(config),
        "difference_from_base": {field: list(pair) for field, pair in difference(config, base).items()},
        "blocks": [
            {
                "block": index,
                "num_heads": encoder.num_heads,
                "num_kv_heads": encoder.num_kv_heads,
                "dim_qkv": encoder.dim_qkv,
                "encoder": [_sublayer(s) for s in encoder.sublayers],
                "decoder": [_sublayer(s) for s in decoder.sublayers],
            }
            for index, (encoder, decoder) in enumerate(
                zip(resolve(config).encoder, resolve(config).decoder, strict=True)
            )
        ],
        "outside_kernels": outside_kernels(config),
        "parameters_by_part": parameters(config),
        "cost": {
            "how": "counted on meta tensors, forward and backward",
            "implementation": sorted({chosen.partition("=")[2] for chosen in counted.split(",")}),
            "recipe": recipe.name,
            "encoder_length": lengths[0],
            "decoder_length": lengths[1],
            "training_flops_per_sequence": step.flops,
            "training_flops_per_raw_token": step.flops / recipe.batch.sequence_length,
            "saved_for_backward_bytes_per_sequence": step.saved,
            "state_bytes": estimate.states,
            "fixed_bytes": estimate.fixed,
            "bytes_per_sequence": estimate.per_sequence,
            "device": device.name,
            "device_memory_bytes": device.memory,
            "micro_batch_that_fits": fits,
            "micro_batch_on_8_devices": chosen,
            "accumulation_on_8_devices": recipe.batch.sequences // PROCESSES // chosen,
        },
    }


def largest_power_of_two(number: int) -> int:
    """The largest power of two up to `number`: it divides the recipes' batches."""
    return 1 << (number.bit_length() - 1)


def _sublayer(sublayer: Any) -> str:
    return sublayer.kind + ("" if sublayer.residual else " (no residual)")


def _heads(block: dict[str, Any]) -> str:
    shared = block["num_kv_heads"] != block["num_heads"]
    return f"{block['num_heads']} heads of {block['dim_qkv']}" + f", {block['num_kv_heads']} of keys" * shared


def print_show(shown: dict[str, Any]) -> None:
    """`show` as text."""
    console = _console()
    console.print(f"[bold]{shown['name']}[/bold]  {shown['hypothesis']}", highlight=False)
    if shown["claim"]:
        console.print(f"published: {shown['claim']} ({shown['evidence']}); our runs: {shown['here']}", highlight=False)
    if shown["control"]:
        console.print(f"compare with: {shown['control']}", highlight=False)

    def table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
        console.print(f"\n[bold]{title}[/bold]", highlight=False)
        grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
        for column in range(len(rows[0]) if rows else 0):
            grid.add_column(justify="right" if title.startswith("parameters") and column == 1 else "left")
        for row in rows:
            grid.add_row(*row)
        console.print(grid if rows else "  none")

    base = shown["base"] or "the defaults"
    changed = [(field, f"{_value(a)} -> {_value(b)}") for field, (a, b) in shown["difference_from_base"].items()]
    table(f"difference from {base}", changed)
    table("configuration", [(field, _value(value)) for field, value in shown["configuration"].items()])
    blocks = [
        (f"block {b['block']}", _heads(b), f"{stack}: {', '.join(b[stack])}")
        for b in shown["blocks"]
        for stack in ("encoder", "decoder")
    ]
    if len(blocks) > 12:
        blocks = [*blocks[:4], ("...", f"{len(shown['blocks'])} blocks a stack", "")]
    table("blocks", blocks)
    outside = [(step,) for step in shown["outside_kernels"]]
    table("not computed by a fused kernel, but by plain torch beside them", outside)
    parts = [(part, f"{count:,}") for part, count in shown["parameters_by_part"].items()]
    table("parameters", [*parts, ("total", f"{shown['parameters']:,}")])
    cost = shown["cost"]
    mib = 2**20
    table(
        f"cost by the recipe {cost['recipe']}: {cost['encoder_length']} + {cost['decoder_length']} positions, "
        f"{' and '.join(cost['implementation'])} ({cost['how']})",
        [
            ("FLOPs a sequence", f"{cost['training_flops_per_sequence'] / 1e9:,.1f} G"),
            ("FLOPs a raw token", f"{cost['training_flops_per_raw_token'] / 1e6:,.1f} M"),
            ("saved for backward", f"{cost['saved_for_backward_bytes_per_sequence'] / mib:,.0f} MiB a sequence"),
            ("weights, gradients, optimiser", f"{cost['state_bytes'] / mib:,.0f} MiB on one device"),
            (
                "working memory",
                f"{cost['fixed_bytes'] / mib:,.0f} MiB + {cost['bytes_per_sequence'] / mib:,.0f} a sequence",
            ),
            (
                f"micro-batch that fits a {cost['device']}",
                f"{cost['micro_batch_that_fits']} (estimate); on 8 of them {cost['micro_batch_on_8_devices']} "
                f"x {cost['accumulation_on_8_devices']} accumulation steps",
            ),
        ],
    )
