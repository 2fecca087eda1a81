"""What a comparison consists of: variants with their controls and settings, seeds, and the runs that follow.

Seeds pair runs: the same seed means the same order of the text, the same initial values and dropout masks wherever two
variants have something in common. A grid's values are chosen on other seeds than those that are judged.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from march import experiments
from march.compare.cell import FINISHED, Cell
from march.config import nearest
from march.console import UsageError

GRID_SEEDS_FROM = 1_000_001
# Fields that --width scales. Heads stay, so a head's width shrinks with the stream's.
WIDTHS = ("dim_model", "dim_qkv", "dim_feedforward", "database_states")
MINI = "mini"


@dataclass(frozen=True)
class Preset:
    """A common comparison's settings by one name: options of train.py, a factor for all widths, and what its page says
    of how far it reaches."""

    options: tuple[str, ...]
    width: float
    reach: tuple[str, ...] = ()


PRESETS = {
    MINI: Preset(
        # the best of 5e-4, 1e-3, 2e-3 and 4e-3 for Baseline
        ("--recipe", "demo", "--steps", "400", "--set", "optimizer.lr=2e-3"),
        0.25,
        (
            "What a mini study can say: what a change does to a model of 2 million parameters in its first 400 steps, "
            "on one short text, all at one learning rate, and whether that is more than seeds differ by. It is a cheap "
            "look at many changes before few of them are trained at length.",
            "What it cannot: whether it is so at 36 million parameters and a billion tokens, where a change may gain, "
            "lose or turn round; what it costs on a GPU; anything smaller than the column “shows”. “Refuted” is a "
            "published sentence that does not hold here, not one that is wrong. The losses are those of 64 test "
            "sequences, the same for all runs: the intervals are over seeds, not over texts.",
        ),
    )
}


@dataclass(frozen=True)
class Variant:
    """An experiment to judge beside `control` (None: it is one itself). options: of train.py; chosen: by a grid."""

    name: str
    control: str | None
    own_control: str | None  # the experiment's, where that is not among the compared
    options: tuple[str, ...]
    seeds: tuple[int, ...]
    chosen: tuple[str, ...] = ()

    def cells(self, parent: Path) -> list[Cell]:
        options = tuple(changed(self.options, self.chosen))
        return [Cell(self.name, seed, options, parent) for seed in self.seeds]


def changed(options: Sequence[str], values: Iterable[str]) -> list[str]:
    """train.py's options with `values`, FIELD=VALUE each, in the field's place where it is set already: so a grid's run
    at the value that others have anyway is the same run."""
    result = list(options)
    for value in values:
        field = value.partition("=")[0] + "="
        for place in range(1, len(result)):
            if result[place - 1] == "--set" and result[place].startswith(field):
                result[place] = value
                break
        else:
            result += ["--set", value]
    return result


def by_seed(cells: Iterable[Cell]) -> list[Cell]:
    """The first seed of all before the second of any: what is there when the time is over is a table."""
    return sorted(cells, key=lambda cell: cell.seed)


def variants(
    names: Sequence[str], *, seeds: str, options: Sequence[str], control: str | None = None, width: float | None = None
) -> list[Variant]:
    """The compared experiments, in order; "all" for `everything`. Without `control` each is judged against its own
    experiment's control where that is compared too, else against the first.

    seeds: "5", or "5,Baseline=8" for more of some. width: factor of every width, heads kept.

    Raises:
        UsageError, march.config.ConfigError: a name, a seed or a width that cannot be.
    """
    if "all" in names:
        if len(names) > 1:
            raise UsageError(f"expected all alone, got {' '.join(names)}; leave the others out")
        names = everything()
    found = {_spec(name): experiments.get(name) for name in names}
    if len(found) < len(names):
        raise UsageError(f"expected each experiment once, got {' '.join(names)}; leave the second out")
    counts = _counts(seeds, list(found))
    if control is not None and _spec(control) not in found:
        raise UsageError(f"expected --control among {', '.join(found)}, got {control!r}; add it to the experiments")
    result = []
    for spec, experiment in found.items():
        # a file's experiment may have a control of that file
        own = next(
            (s for s, e in found.items() if e.name == experiment.control and e.file in (None, experiment.file)), None
        )
        judge = _spec(control) if control else own or next(iter(found))
        missing = experiment.control if judge != own and experiment.control != judge else None
        result.append(
            Variant(
                spec,
                None if judge == spec else judge,
                missing,
                tuple(changed(options, _widths(spec, width))),
                tuple(range(1, counts[spec] + 1)),
            )
        )
    return result


def everything() -> list[str]:
    """Every experiment of the list that is judged against one of it, and what they are judged against."""
    controls = {x.control for x in experiments.EXPERIMENTS}
    return [x.name for x in experiments.EXPERIMENTS if x.control or x.name in controls]


def _spec(text: str) -> str:
    """The experiment's name; a file's as it was given, and with the name."""
    experiment = experiments.get(text)
    return experiment.name if experiment.file is None else f"{text.partition('.py')[0]}.py:{experiment.name}"


def _counts(text: str, names: Sequence[str]) -> dict[str, int]:
    """Seeds of each experiment."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 10_000:
            raise UsageError(f"expected a number of seeds such as 5 or 5,Baseline=8, got {text[:60]!r}; 5 is usual")
        if not equals:
            counts = dict.fromkeys(names, int(number)) | counts
        elif (known := _spec(name)) in names:
            counts[known] = int(number)
        else:
            hint = ", ".join(nearest(name, list(names))) or "add it"
            raise UsageError(f"expected seeds of a compared experiment, got {name!r}; {hint}")
    if missing := [name for name in names if name not in counts]:
        raise UsageError(f"expected a number of seeds for {missing[0]} too, got {text!r}; write 5,{text}")
    return counts


def _widths(name: str, factor: float | None) -> list[str]:
    if factor is None:
        return []
    if not 0 < factor <= 8 or not math.isfinite(factor):
        raise UsageError(
            f"expected a factor of the widths above 0 and up to 8, got {factor:g}; 0.25 is the mini study's"
        )
    config = experiments.configuration(name)
    sets = []
    for field in WIDTHS:
        value = getattr(config, field)
        if not value:
            continue
        scaled = [max(1, round(part * factor)) for part in (value if isinstance(value, tuple) else (value,))]
        sets.append(f"{field}={','.join(map(str, scaled))}")
    return sets


def grid(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """ "a=1,2" and "b=3,4" -> ("a=1", "b=3"), ("a=1", "b=4"), ...; no axis gives one empty point.

    Raises:
        UsageError: not a field and its values.
    """
    points = []
    for axis in axes:
        field, _, values = axis.partition("=")
        found = values.split(",")
        if not field or not all(found) or len(set(found)) < len(found):
            raise UsageError(f"expected FIELD=VALUE,VALUE with different values after --grid, got {axis!r}; give it so")
        points.append([f"{field}={value}" for value in found])
    if len({point[0].partition("=")[0] for point in points}) < len(points):
        raise UsageError(f"expected each field once in --grid, got {' '.join(axes)}; give its values together")
    return list(itertools.product(*points))


def grid_cells(
    variant: Variant, points: Sequence[tuple[str, ...]], seeds: int, parent: Path
) -> dict[tuple[str, ...], list[Cell]]:
    """The runs that choose a variant's value, by point."""
    own = tuple(range(GRID_SEEDS_FROM, GRID_SEEDS_FROM + seeds))
    return {point: replace(variant, seeds=own, chosen=point).cells(parent) for point in points}


def choose(variant: Variant, cells: Mapping[tuple[str, ...], Sequence[Cell]]) -> Variant:
    """The variant at the point of least mean validation loss over the grid's seeds; points with a run that did not
    finish are out. At one of several best the first.

    Raises:
        UsageError: none finished.
    """
    means = {point: mean_loss(runs) for point, runs in cells.items()}
    known = {point: mean for point, mean in means.items() if mean is not None}
    if not known:
        raise UsageError(
            f"expected a finished value of the grid for {variant.name}, got none; see the runs' log.txt, then --retry"
        )
    return replace(variant, chosen=min(known, key=lambda point: known[point]))


def mean_loss(cells: Sequence[Cell]) -> float | None:
    """Mean validation loss at the end; None where a run has not finished."""
    losses = [cell.summary().get("eval_loss") if cell.ended() == FINISHED else None for cell in cells]
    if any(not isinstance(loss, float) or not math.isfinite(loss) for loss in losses):
        return None
    return statistics.fmean(loss for loss in losses if loss is not None)
