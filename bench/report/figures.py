"""The report's pictures. Every title says what its numbers are: a GPU's or a CPU's time, a projection, a count."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GUIDE, GRID = "#5f6368", "#e8eaed"
OPERATORS = {
    "linear": "#4c78a8",
    "attention": "#e45756",
    "unified_attention": "#b279a2",
    "glu": "#f58518",
    "linear_cross_entropy": "#54a24b",
    "residual_norm": "#72b7b2",
    "embedding": "#9d755d",
    "between": "#bab0ac",
    "adamw": "#eeca3b",
    "rest": "#d6d6d6",
}
# what a projection names beyond the ledger's operators
SPARE = ("#ff9da6", "#79706e", "#88d27a", "#83bcb6", "#d8b5a5", "#439894")
PHASES = {"forward": "^", "backward": "v", "both": "o", "optimizer": "s"}
NAMES = {"both": "forward and backward"}
WIDTH, DPI = 9.0, 110
# of ratios: one experiment costs 25 times Baseline's step, most within a fifth of it
CAP = 2.2


@dataclass(frozen=True)
class Point:
    """A place on a roofline: FLOP a byte, FLOP/s; group colours it, phase gives its shape."""

    group: str
    phase: str
    intensity: float
    rate: float
    label: str = ""


@contextmanager
def picture(path: Path, title: str, subtitle: str, height: float, columns: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with a bold title and what its numbers are below it; saved as `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9.5})
    figure, axes = pyplot.subplots(1, columns, figsize=(WIDTH, height), dpi=DPI, layout="constrained", squeeze=False)
    try:
        for one in axes[0]:
            for side in ("top", "right"):
                one.spines[side].set_visible(False)
            one.set_axisbelow(True)
        figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.012, 1 - 0.40 / height, subtitle, ha="left", va="top", fontsize=9, color=GUIDE)
        yield figure, list(axes[0])
        figure.savefig(path)
    finally:
        pyplot.close(figure)


def colours(names: Sequence[str]) -> dict[str, str]:
    spare = iter(SPARE * 9)
    return {name: OPERATORS.get(name) or next(spare) for name in names}


def short(value: float) -> str:
    """Three digits, and all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _legend_outside(axes: Any, handles: list[Any], columns: int = 1) -> None:
    axes.legend(
        handles=handles,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        ncols=columns,
        fontsize=8.5,
    )


def roofline(
    path: Path, title: str, subtitle: str, points: Sequence[Point], roof: tuple[float, float] | None, roof_name: str
) -> None:
    """FLOP/s over FLOP a byte, both logarithmic. roof: (peak FLOP/s, bytes/s) of what `roof_name` says."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    unit, name = (1e12, "TFLOP/s") if max(point.rate for point in points) > 1e12 else (1e9, "GFLOP/s")
    with picture(path, title, subtitle, 5.2) as (_, (axes,)):
        used = colours(sorted({p.group for p in points}))
        intensities = [p.intensity for p in points]
        low, high = min(intensities) / 2.5, max(intensities) * 2.5
        if roof is not None:
            peak, bandwidth = roof
            ridge = peak / bandwidth
            low, high = min(low, ridge / 3), max(high, ridge * 3)
            axes.plot(
                [low, ridge, high], [low * bandwidth / unit, peak / unit, peak / unit], color=GUIDE, linewidth=1.4
            )
        for point in points:
            axes.plot(
                point.intensity,
                point.rate / unit,
                PHASES.get(point.phase, "o"),
                color=used[point.group],
                markersize=8,
                markeredgecolor="white",
                markeredgewidth=0.7,
                alpha=0.9,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        rates = [point.rate / unit for point in points]
        top = max([*rates, *([roof[0] / unit] if roof else [])])
        axes.set_ylim(min([*rates, top / 10]) / 1.8, top * 1.8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("FLOP a byte")
        axes.set_ylabel(name)
        axes.grid(which="major", color=GRID, linewidth=0.8)
        handles = [Line2D([], [], color=c, marker="o", linestyle="", label=group) for group, c in used.items()]
        phases = [phase for phase in PHASES if any(p.phase == phase for p in points)]
        handles += [Line2D([], [], color=GUIDE, marker=PHASES[p], linestyle="", label=NAMES.get(p, p)) for p in phases]
        if roof is not None:
            handles.append(Line2D([], [], color=GUIDE, linewidth=1.4, label=roof_name))
        _legend_outside(axes, handles)


def bars(
    path: Path,
    title: str,
    subtitle: str,
    rows: Mapping[str, Mapping[str, float]],
    xlabel: str,
    marks: Mapping[str, float] | None = None,
    mark_name: str = "the whole step",
) -> None:
    """Stacked horizontal bars: row -> part -> value. marks: a value a row, drawn as a line across its bar."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    totals: dict[str, float] = {}
    for parts in rows.values():
        for part, value in parts.items():
            totals[part] = totals.get(part, 0.0) + value
    order = sorted(totals, key=totals.__getitem__, reverse=True)
    used = colours(order)
    with picture(path, title, subtitle, 1.7 + 0.26 * len(rows)) as (_, (axes,)):
        for i, parts in enumerate(rows.values()):
            left = 0.0
            for part in order:
                value = parts.get(part, 0.0)
                axes.barh(i, value, left=left, color=used[part], height=0.72)
                left += value
            axes.annotate(short(left), (left, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        handles: list[Any] = [Patch(color=used[part], label=part) for part in order]
        if marks:
            for i, name in enumerate(rows):
                if name in marks:
                    axes.plot([marks[name]] * 2, [i - 0.42, i + 0.42], color="black", linewidth=1.6)
            handles.append(Line2D([], [], color="black", linewidth=1.6, label=mark_name))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        axes.margins(y=0.01)
        axes.set_xlim(0, 1.12 * max(max(sum(parts.values()) for parts in rows.values()), *(marks or {"": 0}).values()))
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        _legend_outside(axes, handles)


def dots(
    path: Path, title: str, subtitle: str, series: Mapping[str, Mapping[str, tuple[float, float, float]]], xlabel: str
) -> None:
    """series -> row -> (value, low, high), as dots with ranges beside a line at 1; above CAP a number at the edge."""
    from matplotlib.lines import Line2D

    order: dict[str, None] = {}
    for values in series.values():
        order |= dict.fromkeys(values)
    names = list(order)
    shapes = ("o", "D", "s", "^")
    tints = ("#4c78a8", "#e45756", "#54a24b", "#f58518")
    with picture(path, title, subtitle, 1.8 + 0.27 * len(names)) as (_, (axes,)):
        axes.axvline(1.0, color=GUIDE, linewidth=0.9)
        for k, values in enumerate(series.values()):
            shift = (k - (len(series) - 1) / 2) * 0.2
            for i, name in enumerate(names):
                if name not in values:
                    continue
                value, low, high = values[name]
                if value > CAP:
                    place = {
                        "xytext": (-6 - 26 * (k % 2), 0),
                        "textcoords": "offset points",
                        "ha": "right",
                        "va": "center",
                    }
                    axes.plot(CAP, i + shift, ">", color=tints[k], markersize=5.5)
                    axes.annotate(f"{value:.1f}", (CAP, i + shift), color=tints[k], fontsize=7.5, **place)
                    continue
                high = min(high, CAP)
                axes.plot([low, high], [i + shift] * 2, color=tints[k], linewidth=1.2, alpha=0.7)
                axes.plot(value, i + shift, shapes[k], color=tints[k], markersize=5.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        marks = zip(series, shapes, tints, strict=False)
        _legend_outside(axes, [Line2D([], [], color=t, marker=m, linestyle="", label=n) for n, m, t in marks])


def memory(path: Path, title: str, subtitle: str, rows: Mapping[str, tuple[Mapping[str, float], int]]) -> None:
    """Left GiB at the counted micro-batch, by part; right the largest micro-batch that fits."""
    from matplotlib.patches import Patch

    with picture(path, title, subtitle, 1.9 + 0.26 * len(rows), 2) as (_, (left, right)):
        parts = list(next(iter(rows.values()))[0])
        tints = dict(zip(parts, ("#4c78a8", "#bab0ac", "#f58518"), strict=False))
        for i, (values, fits) in enumerate(rows.values()):
            start = 0.0
            for part in parts:
                left.barh(i, values[part], left=start, color=tints[part], height=0.72)
                start += values[part]
            left.annotate(
                f"{start:.1f}", (start, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
            right.barh(i, fits, color="#54a24b", height=0.72)
            right.annotate(str(fits), (fits, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        for axes, label in ((left, "GiB at micro-batch 64"), (right, "largest micro-batch in 24 GiB")):
            axes.invert_yaxis()
            axes.set_xlabel(label)
            axes.margins(x=0.14, y=0.01)
            axes.grid(axis="x", color=GRID, linewidth=0.8)
        left.set_yticks(range(len(rows)), list(rows))
        right.set_yticks([])
        left.legend(
            handles=[Patch(color=tints[part], label=part) for part in parts],
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=3,
            fontsize=8.5,
        )
