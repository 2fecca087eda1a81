"""What a training step launches, computes, moves and keeps, by operator and phase: counted, nothing is run.

    python -m bench.ledger [--exp Baseline] [--impl triton] [--micro-batch 64] [--names] [--json]
    python -m bench.ledger --fits [--memory 24] [--json]

One micro-batch's forward and backward at 921 and 206 positions in the experiment's precision, on meta tensors through
the launch code of a GPU run, and one optimiser step. read, written, and moved, both of them: each tensor of a launch or
an operator of torch once; compulsory: each tensor once at the operators' boundaries; kept: saved for backward. --fits:
the largest micro-batch of each experiment that fits.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

import kernels
from bench.cache import LENGTHS
from bench.tables import markdown, table
from march import cost, experiments
from march.cost import OpCosts

GB, GIB = 1e9, 2**30
FITS = ("triton", "torch", "reference")


def _excess(ledger: OpCosts) -> str:
    """Rows by the bytes that they move beyond the compulsory ones, those above 1% of the sum of these."""
    least = ledger.total("forward", "backward").compulsory / 100
    rows = sorted((r for r in ledger.rows if r.bytes - r.compulsory > least), key=lambda r: r.compulsory - r.bytes)
    return ", ".join(f"{r.operator} {r.phase} {(r.bytes - r.compulsory) / GB:.2f} GB" for r in rows) or "none"


def report(name: str, impl: str, ledger: OpCosts, names: bool) -> str:
    """The ledger as text."""
    rows = table(
        "phase | operator | launches | calls | TFLOP | read | written | moved | compulsory | ratio | kept MiB",
        "{row.phase} | {row.operator} | {row.launches} | {row.calls} | {row.flops:.3TFLOP} | {row.bytes_read:.3GB} | "
        "{row.bytes_written:.3GB} | {row.bytes:.3GB} | {row.compulsory:.3GB} | {ratio:.2f} | {row.saved:.0MiB}",
        [
            {"row": row, "ratio": row.bytes / row.compulsory if row.compulsory else None}
            for row in (*ledger.rows, ledger.total("forward"), ledger.total("backward"), ledger.total())
        ],
    )
    lines = [
        f"{name}, {impl}, micro-batch {ledger.micro_batch}, {ledger.encoder_length}/{ledger.decoder_length} positions, "
        f"{ledger.precision}: counted, not run. Bytes in GB.",
        "",
        markdown(rows),
        "",
        f"kept for backward {ledger.total().saved / GIB:.2f} GiB, "
        f"at most alive beyond the weights {ledger.peak / GIB:.2f} GiB",
        f"bytes of forward and backward {ledger.ratio:.3f} times the compulsory; excess: {_excess(ledger)}",
    ]
    if names:
        lines.append("")
        lines += [
            f"{row.phase} {row.operator}: "
            + ", ".join(f"{n} x {row.names[n]} {moved / GB:.3f} GB" for n, moved in sorted(row.moved.items()))
            for row in ledger.rows
            if row.moved
        ]
    lines.append("forbidden tensors: " + ("none" if not ledger.forbidden else str(len(ledger.forbidden))))
    lines += [
        f"  {reason}: {one.phase} {one.operator} {one.name} {one.dtype} {list(one.shape)} {one.bytes / 2**20:.0f} MiB"
        for reason, one in ledger.forbidden
    ]
    return "\n".join(lines)


def fits(memory: float) -> list[dict[str, Any]]:
    """For each experiment and implementation the largest micro-batch that fits `memory` GiB on one device of one."""
    rows = []
    for name in experiments.names():
        config = experiments.configuration(name)
        row: dict[str, Any] = {"experiment": name, "parameters": cost.total_parameters(config)}
        estimate = cost.memory(config, *LENGTHS, impl="triton")
        row["per_sequence"], row["fixed"] = estimate.per_sequence, estimate.total(0)
        for impl in FITS:
            row[impl] = cost.fitting_micro_batch(config, *LENGTHS, memory * GIB, impl)
        rows.append(row)
    return rows


def fits_table(rows: Sequence[dict[str, Any]], memory: float) -> str:
    cells = table(
        " | ".join(("experiment", "parameters", "fixed GiB", "MiB per sequence", *FITS)),
        "{experiment} | {parameters:,} | {fixed:.2GiB} | {per_sequence:.1MiB} | "
        + " | ".join(f"{{{impl}}}" for impl in FITS),
        rows,
    )
    return f"Largest micro-batch in {memory:g} GiB; fixed and per sequence: of triton.\n\n{markdown(cells)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--exp", default="Baseline", help="an experiment's name; several with commas; or 'all'")
    parser.add_argument("--impl", default="triton", help="triton, torch, reference, or operator=name,...")
    parser.add_argument("--micro-batch", type=int, default=64, metavar="N", help="sequences (64)")
    parser.add_argument("--names", action="store_true", help="also each kernel and operator of torch: how often, bytes")
    parser.add_argument("--fits", action="store_true", help="the largest micro-batch of each experiment that fits")
    parser.add_argument("--memory", type=float, default=24.0, metavar="GIB", help="of the device, for --fits (24)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    given = parser.parse_args(arguments)
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "kernels": kernels.__version__}
    if given.fits:
        rows = fits(given.memory)
        print(
            json.dumps({**facts, "memory": given.memory, "rows": rows}, indent=1)
            if given.json
            else fits_table(rows, given.memory)
        )
        return 0
    if given.micro_batch < 1:
        parser.error(f"--micro-batch: expected at least 1, got {given.micro_batch}; one sequence is the smallest")
    results = []
    for name in list(experiments.names()) if given.exp == "all" else given.exp.split(","):
        ledger = cost.step_costs(
            experiments.configuration(name),
            *LENGTHS,
            micro_batch=given.micro_batch,
            impl=kernels.parse_impl(given.impl),
        )
        results.append({"experiment": name, "impl": given.impl, **ledger.to_dict()})
        if not given.json:
            print(report(name, given.impl, ledger, given.names) + "\n")
    if given.json:
        print(json.dumps({**facts, "status": "counted, not run", "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
