"""The report's pictures. Every title says what its numbers are: a GPU's or a CPU's time, a projection, a count."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.tables import joined

GUIDE, GRID = "#5f6368", "#e8eaed"
COLOURS = {
    "linear": "#4c78a8",
    "attention": "#e45756",
    "glu": "#f58518",
    "linear_cross_entropy": "#54a24b",
    "residual_norm": "#72b7b2",
    "embedding": "#9d755d",
    "other": "#bab0ac",
    "adamw": "#eeca3b",
    "rest": "#d6d6d6",
    # of memory
    "states": "#4c78a8",
    "fixed": "#bab0ac",
    "sequences": "#f58518",
    "fits": "#54a24b",
}
# what a projection names beyond the ledger's operators
SPARE = ("#ff9da6", "#79706e", "#88d27a", "#83bcb6", "#d8b5a5", "#439894")
PHASES = {"forward": "^", "backward": "v", "both": "o", "optimizer": "s"}
SERIES = (("o", "#4c78a8"), ("D", "#e45756"), ("s", "#54a24b"), ("^", "#f58518"))
WIDTH, DPI = 9.0, 110
# of ratios: one experiment costs 25 times Baseline's step, most within a fifth of it
CAP = 2.2


class Point(NamedTuple):
    """A place on a roofline: FLOP a byte, FLOP/s; group colours it, phase gives its shape."""

    group: str
    phase: str
    intensity: float
    rate: float


@contextmanager
def picture(path: Path, title: str, said: Sequence[str], height: float, columns: int = 1) -> Iterator[list[Any]]:
    """Axes under a bold title and, below it, what the numbers are: the parts of `said` that are not empty."""
    pyplot.switch_backend("Agg")
    pyplot.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9.5})
    figure, axes = pyplot.subplots(1, columns, figsize=(WIDTH, height), dpi=DPI, layout="constrained", squeeze=False)
    try:
        for one in axes[0]:
            one.spines[["top", "right"]].set_visible(False)
            one.set_axisbelow(True)
        figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.012, 1 - 0.40 / height, joined("; ", *said), ha="left", va="top", fontsize=9, color=GUIDE)
        yield list(axes[0])
        figure.savefig(path)
    finally:
        pyplot.close(figure)


def colours(names: Iterable[str]) -> dict[str, str]:
    spare = iter(SPARE * 9)
    return {name: COLOURS.get(name) or next(spare) for name in names}


def short(value: float) -> str:
    """Three digits, and all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _legend(axes: Any, handles: list[Any] | None = None) -> None:
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0}
    axes.legend(**({} if handles is None else {"handles": handles}), frameon=False, fontsize=8.5, **where)


def _mark(label: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=label)


def roofline(
    path: Path,
    title: str,
    said: Sequence[str],
    points: Sequence[Point],
    roof: tuple[float, float] | None,
    roof_name: str,
) -> None:
    """FLOP/s over FLOP a byte, both logarithmic. roof: (peak FLOP/s, bytes/s) of what `roof_name` says."""
    unit, name = (1e12, "TFLOP/s") if max(point.rate for point in points) > 1e12 else (1e9, "GFLOP/s")
    rates, intensities = [p.rate / unit for p in points], [p.intensity for p in points]
    used = colours(sorted({p.group for p in points}))
    handles = [_mark(group, colour, "o") for group, colour in used.items()]
    for phase, marker in PHASES.items():
        if any(p.phase == phase for p in points):
            handles.append(_mark("forward and backward" if phase == "both" else phase, GUIDE, marker))
    with picture(path, title, said, 5.2) as (axes,):
        low, high, top = min(intensities) / 2.5, max(intensities) * 2.5, max(rates)
        if roof is not None:
            peak, bandwidth = roof[0] / unit, roof[1] / unit
            ridge, top = peak / bandwidth, max(top, peak)
            low, high = min(low, ridge / 3), max(high, ridge * 3)
            handles += axes.plot(
                [low, ridge, high], [low * bandwidth, peak, peak], color=GUIDE, linewidth=1.4, label=roof_name
            )
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.7}
        for p, rate in zip(points, rates, strict=True):
            marker = PHASES.get(p.phase, "o")
            axes.plot(p.intensity, rate, marker, color=used[p.group], markersize=8, alpha=0.9, **edge)
        axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel=name)
        axes.set(xlim=(low, high), ylim=(min([*rates, top / 10]) / 1.8, top * 1.8))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(which="major", color=GRID, linewidth=0.8)
        _legend(axes, handles)


def _stacked(axes: Any, parts: pd.DataFrame, xlabel: str, text: str | None = None) -> None:
    """A horizontal bar a row, stacked by column, with its sum written behind it."""
    sums = parts.sum(axis=1)
    parts.plot.barh(ax=axes, stacked=True, width=0.72, color=colours(parts.columns), legend=False)
    axes.bar_label(axes.containers[-1], [text.format(x) if text else short(x) for x in sums], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, ylabel="", ylim=(len(parts) - 0.5, -0.6))
    axes.grid(axis="x", color=GRID, linewidth=0.8)


def bars(
    path: Path,
    title: str,
    said: Sequence[str],
    rows: Mapping[str, Mapping[str, float]],
    xlabel: str,
    marks: Mapping[str, float] | None = None,
    mark_name: str = "the whole step",
) -> None:
    """Stacked horizontal bars: row -> part -> value. marks: a value a row, drawn as a line across its bar."""
    parts = pd.DataFrame(list(rows.values()), index=list(rows)).fillna(0.0)
    parts = parts[parts.sum().sort_values(ascending=False, kind="stable").index]
    with picture(path, title, said, 1.7 + 0.26 * len(rows)) as (axes,):
        _stacked(axes, parts, xlabel)
        at = {list(rows).index(name): value for name, value in (marks or {}).items() if name in rows}
        if at:
            low, high = ([i + side for i in at] for side in (-0.42, 0.42))
            axes.vlines(list(at.values()), low, high, color="black", linewidth=1.6, label=mark_name)
        axes.set_xlim(0, 1.12 * max([*parts.sum(axis=1), *at.values()]))
        _legend(axes)


def dots(
    path: Path,
    title: str,
    said: Sequence[str],
    series: Mapping[str, Mapping[str, tuple[float, float, float]]],
    xlabel: str,
) -> None:
    """series -> row -> (value, low, high), as dots with ranges beside a line at 1; above CAP a number at the edge."""
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    with picture(path, title, said, 1.8 + 0.27 * len(names)) as (axes,):
        axes.axvline(1.0, color=GUIDE, linewidth=0.9)
        for k, (values, (marker, tint)) in enumerate(zip(series.values(), SERIES, strict=False)):
            for name, (value, low, high) in values.items():
                y = names.index(name) + (k - (len(series) - 1) / 2) * 0.2
                if value <= CAP:
                    axes.plot([low, min(high, CAP)], [y, y], color=tint, linewidth=1.2, alpha=0.7)
                    axes.plot(value, y, marker, color=tint, markersize=5.5)
                else:
                    place = {"xytext": (-6 - 26 * (k % 2), 0), "textcoords": "offset points", "ha": "right"}
                    axes.plot(CAP, y, ">", color=tint, markersize=5.5)
                    axes.annotate(f"{value:.1f}", (CAP, y), color=tint, fontsize=7.5, va="center", **place)
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=xlabel)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        _legend(axes, [_mark(n, tint, marker) for n, (marker, tint) in zip(series, SERIES, strict=False)])


def memory(path: Path, title: str, said: Sequence[str], parts: pd.DataFrame, fits: pd.DataFrame) -> None:
    """Left GiB at the counted micro-batch, by part; right the largest micro-batch that fits."""
    with picture(path, title, said, 1.9 + 0.26 * len(parts), 2) as (left, right):
        _stacked(left, parts, "GiB at micro-batch 64", "{:.1f}")
        _stacked(right, fits, "largest micro-batch in 24 GiB", "{:.0f}")
        right.set_yticks([])
        for axes in (left, right):
            axes.margins(x=0.14)
        left.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=8.5)
