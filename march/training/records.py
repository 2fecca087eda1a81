"""What a run writes about itself for people: what it is, where it runs, how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from torch import nn

import kernels
from march import config as configuration
from march import experiments
from march.config import ModelConfig
from march.data import TokenDataset
from march.data.description import Description
from march.data.store import TOKENIZER
from march.experiments import own
from march.experiments.published import comparison
from march.recipe import Recipe
from march.training.arguments import implementation
from march.training.distributed import World, all_reduce_max, log_rank0
from march.training.errors import RunError
from march.training.files import first_line, write_text
from march.training.loop import Plan, Trainer
from march.training.plot import plot_curve
from march.training.runfolder import RunFolder, device_name, environment


def count_parameters(model: nn.Module) -> int:
    """Tied ones once, dead ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def largest_memory(memory: Mapping[str, float], world: World) -> dict[str, float]:
    """The largest of any process, in MiB."""
    return {name: round(all_reduce_max(world, value), 1) for name, value in memory.items()}


def describe(
    recipe: Recipe, config: ModelConfig, numerics: Mapping[str, Any], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What config.json and every checkpoint say of the run; `before`: what they said when it began."""
    published_config, file = experiments.configuration(recipe.entry), recipe.entry.file
    return {
        "experiment": recipe.entry.name,
        "file": None if file is None else {"path": str(file), "sha256": recipe.entry.sha256},
        "control": recipe.entry.control,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json", exclude_none=True, exclude={"batch": {"micro"}}),
        "comparable": recipe.comparable,
        "config": configuration.to_dict(config),
        "difference": {
            "base": recipe.entry.base,
            "from_base": experiments.difference(recipe.entry),
            "in_this_run": configuration.difference(config, published_config),  # --set, corpus, precision
        },
        "numerics": dict(numerics),
        "started": (before or {}).get("started", datetime.now(UTC).isoformat()),
    }


def write_start(
    folder: RunFolder,
    recipe: Recipe,
    plan: Plan,
    model: nn.Module,
    trainer: Trainer,
    store: TokenDataset,
    world: World,
) -> None:
    """config.json, an entry in environment.json, and a summary.json that says that the run has not ended.

    Raises:
        RunError: they cannot be written; better known before the first step than at the first checkpoint.
    """
    try:
        folder.write("config.json", {**plan.run, "fingerprint": plan.fingerprint})
        measured = {"float32_library": plan.run["numerics"].get("float32_library")}
        as_run: dict[str, Any] = {"precision": recipe.precision.model_copy(update=measured)}
        as_run |= {"batch": recipe.batch.model_copy(update={"micro": plan.micro_batch})}
        write_text(folder.path / "recipe.toml", recipe.model_copy(update=as_run).toml())
        if recipe.entry.file is not None:
            folder.keep(recipe.entry.file, own.source(recipe.entry))
        write_text(folder.path / TOKENIZER, store.tokenizer().to_str())
        folder.write("summary.json", {"finished": False, "stopped_by": "no end yet: running, or killed"})
    except OSError as error:
        raise RunError(f"{folder.path} could not be written to: {error.strerror}; free space there first") from error
    folder.add_environment(
        environment(
            world,
            seed=recipe.seed,
            precision=recipe.precision.compute,
            zero=recipe.devices.zero,
            impl=implementation(recipe),
            impl_chosen=kernels.describe(implementation(recipe), world.device),
            numerics=plan.run["numerics"],
            micro_batch=plan.micro_batch,
            accumulation=trainer.accumulation,
            parameters=count_parameters(model),
            first_step=trainer.step + 1,
            train_sequences=len(plan.train),
            validation_sequences=min(len(plan.validation), recipe.evaluation.sequences),
            data=str(store.path),
            data_source=store.manifest["source"],
        )
    )


def write_end(trainer: Trainer, config: ModelConfig, entropy: float, end: Mapping[str, Any]) -> None:
    """summary.json, curve.png and the trackers' last words, on rank 0; also for a run that was stopped or failed.
    "finished" is how others know that a run is complete: DeepSpeed's launcher returns 0 for some that were killed.

    Raises:
        RunError: summary.json of a finished run could not be written.
    """
    world, folder, recipe, rows = trainer.world, trainer.folder, trainer.plan.recipe, trainer.rows
    if not world.is_first or folder is None:
        return
    summary = {
        "experiment": recipe.entry.name,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "comparable": recipe.comparable,
        "ln_vocabulary": math.log(config.vocab_size),
        "unigram_entropy": entropy,
        "processes": world.size,
        "device": device_name(world),
        **end,
    }
    try:
        folder.write("summary.json", summary)
    except OSError as error:
        text = f"{folder.path / 'summary.json'} could not be written: {error.strerror}; checkpoints are whole"
        if end["finished"]:
            raise RunError(f"the run is done, but {text}") from error
        log_rank0(world, f"WARNING: {text}")
    if trainer.metrics:
        trainer.metrics.end(summary)
    if not rows or not recipe.logging.curve:
        return
    try:
        plot_curve(
            rows,
            folder.curve,
            title=recipe.entry.name,
            subtitle=(
                f"recipe {recipe.name}: {recipe.batch.sequences} x {recipe.batch.sequence_length} tokens a "
                f"step, from {Description.of(recipe.data).name}; {config.vocab_size:,} tokens in the vocabulary"
            ),
            vocab_size=config.vocab_size,
            unigram_entropy=entropy,
        )
    except Exception as error:  # a picture ends no run
        log_rank0(world, f"WARNING: {folder.curve} could not be drawn ({first_line(error)})")


def closing_lines(
    recipe: Recipe, config: ModelConfig, folder: RunFolder, end: Mapping[str, Any], entropy: float
) -> str:
    """What a user reads at the end: losses with their landmarks, speed, memory, and how far to trust them."""
    lines = []
    if end["stopped_by"]:
        lines.append(f"stopped by {end['stopped_by']} after step {end['steps']}; continue with --resume {folder.path}")
    evaluated = "not evaluated yet" if end["eval_loss"] is None else f"eval {end['eval_loss']:.4f}"
    test = "" if end["test_loss"] is None else f", test {end['test_loss']:.4f}"
    lines.append(
        f"loss {end['first_loss']:.4f} -> {end['final_loss']:.4f}, {evaluated}{test} "
        f"(ln V {math.log(config.vocab_size):.4f}, unigram entropy {entropy:.4f})"
    )
    memory = ", ".join(
        f"{name.replace('_', ' ').removesuffix(' mib')} {end[name]:.0f} MiB" for name in end if "memory" in name
    )
    lines.append(f"{end['tokens_per_second']:.0f} tokens/s, {end['process_seconds']:.0f} s in all, {memory}")
    if not end["stopped_by"]:
        if recipe.comparable and end["eval_loss"] is not None:
            control = recipe.entry.control or "Baseline"
            lines.append(comparison(recipe.entry.name, control, end["mean_last_losses"], end["eval_loss"]))
        else:
            lines.append("these losses cannot be compared with the published ones, nor with another recipe's")
    curve = f", {folder.curve.name}" if recipe.logging.curve else ""
    lines.append(f"{folder.path}: config.json, metrics.jsonl, summary.json{curve}")
    return "\n".join(lines)
