"""`march compare`: what it costs, the runs that are not there yet, the report."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from march.compare import plan, statistics
from march.compare.cell import FINISHED, Cell
from march.config import ConfigError
from march.console import Parser, UsageError, print_table, whole
from march.data.errors import DataError

RUNS = Path("runs/compare")


def build_parser() -> Parser:
    parser = Parser(
        prog="march compare",
        description="Train experiments over several seeds, say which is better. Options of train.py follow after --.",
    )
    count = whole(1, 10_000, "a small number is usual")
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "names", nargs="+", metavar="EXPERIMENT", help="the first is the control where no other is told; or all"
    )
    what.add_argument("--control", metavar="NAME", help="of all others; default each one's own, else the first")
    what.add_argument(
        "--seeds", default="5", metavar="N", help="each one's, or 5,Baseline=8 for more of some; default 5"
    )
    what.add_argument("--grid", action="append", metavar="FIELD=A,B", help="judge each at its best value, chosen first")
    what.add_argument(
        "--grid-seeds", type=count, default=2, metavar="N", help="that choose; others are judged; default 2"
    )
    what.add_argument(
        "--margin", type=float, default=statistics.MARGIN, metavar="NATS", help="that matters; default 0.015"
    )
    how = parser.add_argument_group("how to train")
    how.add_argument("--recipe", metavar="NAME", help="paper, demo, or mini: demo with all widths by a quarter")
    how.add_argument("--set", action="append", metavar="FIELD=VALUE", help="change one field of all; may be repeated")
    how.add_argument("--width", type=float, metavar="FACTOR", help="of every width, heads kept")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--gpus", metavar="GROUPS", help="0,1/2,3: two runs at once on two GPUs each; default one of all"
    )
    where.add_argument("--slots", type=count, metavar="N", help="runs at once on this machine's cores; default 1")
    where.add_argument("--cluster", choices=("slurm", "local"), help="through submitit, instead of here")
    where.add_argument(
        "--cluster-option", action="append", metavar="NAME=VALUE", help="gpus_per_node=8, timeout_min=600"
    )
    where.add_argument("--at-once", type=count, default=8, metavar="N", help="jobs of --cluster; default 8")
    where.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help=f"all comparisons' runs; default {RUNS}")
    where.add_argument("--out", type=Path, metavar="DIR", help="of the report; default a folder in --runs/reports")
    then = parser.add_argument_group("then")
    then.add_argument("--dry-run", action="store_true", help="only what it would cost")
    then.add_argument("--device", metavar="NAME", help="with --dry-run: cost on that one, such as a5000")
    then.add_argument("--report-only", action="store_true", help="of the runs that are there")
    then.add_argument("--retry", action="store_true", help="failed runs too")
    then.add_argument(
        "--published", type=Path, metavar="DIR", help="draw in curves of a folder: NAME.csv, step and loss"
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 when every run has finished, 1 when some have not, 2 for a mistake."""
    given = list(sys.argv[1:] if words is None else words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as SIGINT, which a shell's background jobs do not get
    cut = given.index("--") if "--" in given else len(given)
    try:
        return _compare(build_parser().parse_args(given[:cut]), given[cut + 1 :])
    except (UsageError, ConfigError, DataError) as error:
        print(f"march compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("march compare: stopped; the same command continues", file=sys.stderr)
        return 130


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _compare(given: argparse.Namespace, more: list[str]) -> int:
    from march.compare import analysis, costs, plots, report

    if given.device and not given.dry_run:
        raise UsageError("expected --device with --dry-run, got it alone; runs go where this machine's devices are")
    if not 0 < given.margin < math.inf:
        raise UsageError(f"expected a --margin above 0 nats, got {given.margin:g}; 0.015 is usual")
    options, width = _options(given, more)
    compared = plan.variants(given.names, seeds=given.seeds, options=options, control=given.control, width=width)
    points = plan.grid(given.grid or ())
    published = plots.published_curves(given.published) if given.published else {}
    cuda = _cuda()
    chosen = []
    choosing = (
        {v.name: plan.grid_cells(v, points, given.grid_seeds, given.runs) for v in compared} if given.grid else {}
    )
    grid_runs = plan.by_seed(cell for by_point in choosing.values() for runs in by_point.values() for cell in runs)
    judged = plan.by_seed(cell for v in compared for cell in v.cells(given.runs))
    if given.dry_run or not given.report_only:
        print_costs([*grid_runs, *judged], given, cuda)
    if given.dry_run:
        return 0
    execute = (lambda cells: {cell: cell.status() for cell in cells}) if given.report_only else _executor(given, cuda)
    if grid_runs:
        say(f"choosing among {len(points)} values with {given.grid_seeds} seeds that are not judged")
        execute(grid_runs)
        chosen = [plan.choose(v, choosing[v.name]) for v in compared]
        for variant in chosen:
            say(f"{variant.name}: {' '.join(variant.chosen)}")
    final = chosen or compared
    statuses = execute(plan.by_seed(cell for v in final for cell in v.cells(given.runs)))
    settings = {v.name: costs.setting_of(v.cells(given.runs)[0], cuda) for v in final}
    rows = analysis.rows(final, settings, given.runs, given.margin)
    out = given.out or given.runs / "reports" / _report_name(given, options)
    page = report.write(
        rows,
        out,
        margin=given.margin,
        grid={v.name: choosing[v.name] for v in final if v.name in choosing},
        origins=analysis.origins(final, settings, given.runs),
        published=published,
        command=_command(given, more),
        reach=plan.PRESETS[given.recipe].reach if given.recipe in plan.PRESETS else (),
    )
    report.print_rows(rows)
    say(f"{page} and beside it report.md, report.json, rows.csv, *.png")
    return 0 if set(statuses.values()) <= {FINISHED} else 1


def _options(given: argparse.Namespace, more: list[str]) -> tuple[list[str], float | None]:
    """Of train.py, for every run, and the factor of the widths."""
    options: list[str] = []
    width = given.width
    if given.recipe in plan.PRESETS:
        preset = plan.PRESETS[given.recipe]
        options += preset.options
        width = preset.width if width is None else width
    elif given.recipe:
        options += ["--recipe", given.recipe]
    options += [word for value in given.set or () for word in ("--set", value)]
    for word in more:
        if word.split("=")[0] in ("--exp", "--seed", "--run-dir", "--resume", "--replay", "--list", "--show", "--json"):
            raise UsageError(
                f"expected options of a run after --, got {word}, which the comparison decides; leave it out"
            )
    return [*options, *more], width


def _command(given: argparse.Namespace, more: Sequence[str]) -> str:
    """What gives the same table anywhere: not where it was run."""
    decide = {f"--{name}": getattr(given, name) for name in ("control", "seeds", "recipe", "width", "margin")}
    words = [(name, str(value)) for name, value in decide.items() if value is not None]
    words += [("--grid", axis) for axis in given.grid or ()] + [("--set", value) for value in given.set or ()]
    return shlex.join(["march", "compare", *given.names, *chain(*words), *(["--", *more] if more else [])])


def _report_name(given: argparse.Namespace, options: Sequence[str]) -> str:
    words = [*given.names, given.seeds, *options, *(given.grid or ()), str(given.width), str(given.control)]
    return f"{Path(given.names[0]).name}-{hashlib.sha256(repr(words).encode()).hexdigest()[:8]}"


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _devices(given: argparse.Namespace, cuda: bool) -> int:
    """GPUs of one run."""
    if given.device or given.cluster:
        return int(_cluster_options(given).get("gpus_per_node") or 8)
    if given.gpus:
        return len(given.gpus.split("/")[0].split(","))
    import torch

    return torch.cuda.device_count() if cuda else 1


def _cluster_options(given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in given.cluster_option or ():
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise UsageError(f"expected NAME=VALUE after --cluster-option, got {text!r}; see submitit's parameters")
        found[name] = int(value) if value.isdecimal() else value
    return found


def _executor(given: argparse.Namespace, cuda: bool) -> Any:
    from march.compare import runner

    if given.cluster:
        parameters = _cluster_options(given)
        return lambda cells: runner.run_submitit(
            cells, given.cluster, parameters, at_once=given.at_once, retry=given.retry, say=say
        )
    if cuda:
        import torch

        number = torch.cuda.device_count()
        slots = runner.gpu_slots(given.gpus or ",".join(map(str, range(number))), number)
    elif given.gpus:
        raise UsageError("expected GPUs for --gpus, got a machine without; use --slots N")
    else:
        slots = runner.cpu_slots(given.slots or 1)
    return lambda cells: runner.run_here(cells, slots, retry=given.retry, say=say)


def print_costs(cells: Sequence[Cell], given: argparse.Namespace, cuda: bool) -> None:
    """The table of what the comparison takes, on stdout."""
    from march.compare import costs

    devices = _devices(given, cuda)
    found = costs.estimates(cells, device=given.device, devices=devices, cuda=cuda)
    rows, hours = [], 0.0
    for name in dict.fromkeys(cell.experiment for cell in found):
        own = [cell for cell in found if cell.experiment == name]
        todo = [cell for cell in own if cell.ended() is None]
        one, left = found[own[0]], sum(found[cell].seconds for cell in todo)
        hours += left / 3600
        sizes = (f"{one.parameters:,}", f"{one.flops:.3g}", f"{one.memory / 2**30:.1f} GiB")
        counts = (str(len(own)), str(len(own) - len(todo)))
        rows.append((name.rpartition("/")[2], *counts, *sizes, duration(one.seconds), duration(left), one.how))
    headings = ("experiment", "runs", "there", "parameters", "FLOPs a run", "memory", "a run", "to do", "how")
    print_table({name: name not in ("experiment", "how") for name in headings}, rows, width=200)
    at_once = given.at_once if given.cluster else len(given.gpus.split("/")) if given.gpus else given.slots or 1
    where = given.device or ("GPU" if given.cluster or _cuda() else f"{len(os.sched_getaffinity(0))} cores")
    print(
        f"{len(found)} runs, {hours:.2f} hours of {devices} x {where}; "
        f"with {at_once} at once about {duration(hours * 3600 / at_once)}"
    )


def duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
