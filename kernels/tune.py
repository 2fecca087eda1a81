"""Measures alternatives to the committed tiles on the GPU it runs on, and rewrites that architecture's table.

    python -m kernels.tune [--only PATTERN] [--dry-run]

Each alternative is compiled, compared with the reference formula, and timed at the paper's shapes. One that does not
fit, or disagrees, is named and left out. The committed tile is replaced where another is faster by GAIN. The table,
kernels/fused/measured/sm_XX.json, is read by every later run on that architecture: commit it. Sums of a gain's gradient
may change their last bits with the tiles, equally on all ranks. Without a CUDA device it says so and changes nothing.
"""

import argparse
import datetime
import fnmatch
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import selftest
from kernels.calls import cases_of, fused_function
from kernels.dropout import Dropout, dropout_state
from kernels.operators import OPERATORS
from kernels.operators.record import Operator, Tuned

# a tile must be faster by this share: below it, two runs of one tile differ
GAIN = 0.02
SECONDS_OF_WARM_UP, SECONDS_OF_TIMING = 0.1, 0.4

Fields = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One entry of the tables. committed: its fields on an architecture; prepare: makes, on a device, a function that
    runs the operator once at the paper's shape, forward and, where the tile is of backward, backward. The tile is
    compared at the calls of that function, cut in size."""

    name: str
    committed: Callable[[str], Fields]
    alternatives: tuple[Fields, ...]
    prepare: Callable[[torch.device], Callable[[], None]]


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of a tile (the median), or why it has none."""

    tile: Fields
    milliseconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class Choice:
    """What an entry was and becomes."""

    entry: str
    before: Measurement
    best: Measurement
    measured: tuple[Measurement, ...]

    @property
    def changed(self) -> bool:
        return self.best.tile != self.before.tile


def _prepared(operator: Operator, one: Tuned, device: torch.device) -> Callable[[], None]:
    """`Entry.prepare` of an operator's tile."""
    import kernels

    rng = dropout_state(42, 1, 0, device)
    dropouts = {name: Dropout(0.1, rng, site) for site, name in enumerate(one.drops)}
    inputs = operator.inputs(**one.dims, dtype=one.dtype, device=device)
    leaves = {n: x.requires_grad_() if x is not None and x.dtype.is_floating_point else x for n, x in inputs.items()}
    wanted = [x for x in leaves.values() if x is not None and x.requires_grad]

    def once() -> None:
        with torch.set_grad_enabled(one.backward):
            out = getattr(kernels, operator.name)(**leaves, **one.kwargs, **dropouts, impl="triton")
        outputs = out if isinstance(out, tuple) else (out,)
        if one.backward:
            torch.autograd.grad(outputs, wanted, [torch.ones_like(x) for x in outputs])

    return once


def entries() -> list[Entry]:
    """What can be tuned, at the paper's shapes."""
    return [
        Entry(one.name, one.committed, one.alternatives, functools.partial(_prepared, record, one))
        for record in OPERATORS.values()
        for one in record.tiles()
    ]


# ---------------------------------------------------------------- measuring


def measure(entry: Entry, fields: Fields, device: torch.device, timer: Callable[[Callable[[], None]], float]):
    """Times one tile, after comparing every program that is timed with the reference."""
    from kernels.compile_only import architecture
    from kernels.fused import measured

    with measured.trying(entry.name, fields):
        try:
            calls, _ = cases_of(entry.prepare(torch.device("meta")), architecture(torch.empty(0, device=device)))
            problems = [
                f"{call.operator}: {problem}"
                for call in calls
                for problem in selftest.disagreements(call, fused_function(call.operator), device)
            ]
            if problems:
                return Measurement(fields, None, "disagrees with the reference: " + "; ".join(problems))
            return Measurement(fields, timer(entry.prepare(device)))
        except Exception as error:  # what does not compile or fit is a result here, not an end
            return Measurement(
                fields, None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )


def choose(entry: Entry, arch: str, measure_tile: Callable[[Fields], Measurement]) -> Choice:
    """Measures the committed tile and its alternatives; the fastest wins where it gains at least GAIN."""
    committed = entry.committed(arch)
    before = measure_tile(committed)
    others = [measure_tile(fields) for fields in entry.alternatives if fields != committed]
    timed = [m for m in others if m.milliseconds is not None]
    best = min(timed, key=lambda m: m.milliseconds or 0.0, default=before)
    if before.milliseconds is not None and (best.milliseconds or 0.0) > (1 - GAIN) * before.milliseconds:
        best = before
    return Choice(entry.name, before, best, (before, *others))


def cuda_timer(run: Callable[[], None]) -> float:
    """Median milliseconds of `run` by CUDA events, with the L2 cleared between runs."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=1000 * SECONDS_OF_WARM_UP, rep=1000 * SECONDS_OF_TIMING, quantiles=[0.5]))


def write(path: Path, device_name: str, choices: Iterable[Choice]) -> None:
    """Replaces the measured entries of `choices` in the table at `path`, whole or not at all; others stay."""
    import triton

    old = json.loads(path.read_text())["entries"] if path.exists() else {}
    stamp = {
        "device": device_name,
        "date": datetime.date.today().isoformat(),
        "versions": f"torch {torch.__version__}, triton {triton.__version__}",
    }
    new = {
        c.entry: {"tile": c.best.tile, "milliseconds": c.best.milliseconds, "before": c.before.milliseconds, **stamp}
        for c in choices
        if c.best.milliseconds is not None
    }
    selftest.write_json(path, {"entries": dict(sorted((old | new).items()))})


def line(choice: Choice) -> str:
    """One entry of the report."""

    def shown(m: Measurement) -> str:
        return f"{m.milliseconds:.3f} ms" if m.milliseconds is not None else m.problem

    text = f"{choice.entry}: {choice.before.tile} {shown(choice.before)}"
    if choice.changed:
        text += f" -> {choice.best.tile} {shown(choice.best)}"
    for m in choice.measured[1:]:
        text += f"\n    {m.tile} {shown(m)}"
    return text


def main(arguments: Sequence[str] | None = None, timer: Callable[[Callable[[], None]], float] = cuda_timer) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="entries whose names match this pattern")
    parser.add_argument("--dry-run", action="store_true", help="measure, but leave the table as it is")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "kernels.tune: expected a CUDA device, found none; nothing was measured and no table was changed. "
            "Run it on the GPU that the table is for.",
            file=sys.stderr,
        )
        return 1
    from kernels.compile_only import architecture
    from kernels.fused import measured

    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(torch.empty(0, device=device))
    chosen = [entry for entry in entries() if fnmatch.fnmatch(entry.name, options.only)]
    if not chosen:
        names = ", ".join(entry.name for entry in entries())
        print(f"kernels.tune: expected --only to match one of {names}, got {options.only!r}", file=sys.stderr)
        return 2
    choices = []
    for entry in chosen:
        choices.append(choose(entry, arch, lambda fields, entry=entry: measure(entry, fields, device, timer)))  # type: ignore[misc]
        print(line(choices[-1]), flush=True)
    if options.dry_run:
        return 0
    path = measured.DIRECTORY / f"{arch}.json"
    write(path, torch.cuda.get_device_name(device), choices)
    measured.forget()
    print(f"wrote {path}: commit it, so that every rank reads the same tiles")
    return 0


if __name__ == "__main__":
    sys.exit(main())
