"""The pictures of a report. Losses in nats per label token; lower is better everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from march.compare.analysis import Row
from march.compare.statistics import ALPHA, BETTER, WORSE
from march.console import UsageError

GREY, INK = "#9aa0a6", "#3c4043"
COLOURS = {BETTER: "#1a7f5a", WORSE: "#c5442f"}
OTHER = "#3b6fb6"
LATE = 0.4  # the axis of a curve is that of what comes after this share of the steps


def colour(row: Row) -> str:
    return COLOURS.get(row.verdict.name, OTHER) if row.verdict else INK


def draw(rows: Sequence[Row], folder: Path, margin: float, published: Mapping[str, pd.DataFrame]) -> list[str]:
    """Write the pictures that the rows have data for; returns their file names, the most telling first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {row.name: row for row in rows}
    judged = [row for row in rows if row.difference]
    made = []

    def keep(name: str, make: Callable[[], Any]) -> None:
        with pyplot.rc_context(
            {
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.edgecolor": GREY,
                "axes.grid": True,
                "grid.color": "#eceff1",
                "axes.axisbelow": True,
                "font.size": 10,
                "axes.titlesize": 10.5,
                "axes.titlelocation": "left",
            }
        ):
            figure = make()
            if figure is not None:
                figure.savefig(folder / name, dpi=130)
                pyplot.close(figure)
                made.append(name)

    keep("differences.png", lambda: forest(judged, margin))
    keep("curves.png", lambda: curves(judged or list(rows), by_name, published))
    keep("over_steps.png", lambda: over_steps(judged, by_name, margin))
    keep("pareto.png", lambda: pareto(rows))
    return made


def forest(rows: Sequence[Row], margin: float) -> Any:
    """Each variant's difference to its control, with its interval and its seeds, and the band that does not matter."""
    from matplotlib import pyplot

    known = [row for row in rows if row.difference and row.difference.mean is not None]
    if not known:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1.1 + 0.42 * len(known)), layout="constrained")
    axes.axvspan(-margin, margin, color="#e8eef7", zorder=0, label=f"within ±{margin:g}")
    axes.axvline(0, color=GREY, linewidth=1)
    for place, row in enumerate(reversed(known)):
        d = row.difference
        assert d is not None
        assert d.mean is not None
        if d.low is not None and d.high is not None:
            axes.plot([d.low, d.high], [place, place], color=colour(row), linewidth=2.6, solid_capstyle="round")
        axes.plot(d.mean, place, "o", color=colour(row), markersize=7)
    axes.set_yticks(range(len(known)), [f"{row.label} - {row.control}" for row in reversed(known)])
    axes.set_xlabel(f"difference of the test loss, nats, with its {1 - ALPHA:.0%} interval; left of 0 is better")
    axes.set_ylim(-0.7, len(known) - 0.3)
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def facets(number: int) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    columns = min(3, number)
    height = math.ceil(number / columns)
    figure, grid = pyplot.subplots(
        height,
        columns,
        figsize=(3.6 * columns + 0.4, 2.5 * height + 0.3),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    flat = list(grid.flat)
    for axes in flat[number:]:
        axes.set_visible(False)
    return figure, flat[:number]


def _finite(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.replace([math.inf, -math.inf], math.nan).dropna(how="all")


def _band(axes: Any, frame: pd.DataFrame, shade: str, label: str) -> None:
    """Mean over seeds, and one standard deviation to both sides."""
    mean, spread = frame.mean(axis=1), frame.std(axis=1).fillna(0)
    axes.plot(mean.index, mean, color=shade, linewidth=1.6, label=label)
    axes.fill_between(mean.index, mean - spread, mean + spread, color=shade, alpha=0.2, linewidth=0)


def curves(rows: Sequence[Row], by_name: Mapping[str, Row], published: Mapping[str, pd.DataFrame]) -> Any:
    """Validation loss over steps, each variant before its control, on the axis of the later steps."""
    known = [row for row in rows if not _finite(row.curves).empty]
    if not known:
        return None
    figure, grid = facets(len(known))
    late: list[float] = []
    for axes, row in zip(grid, known, strict=True):
        control = by_name.get(row.variant.control or "")
        drawn = [(control, GREY), (row, colour(row))] if control else [(row, colour(row))]
        for who, shade in drawn:
            frame = _finite(who.curves)
            if frame.empty:
                continue
            _band(axes, frame, shade, who.label if who is not row else "_")
            tail = frame[frame.index >= LATE * frame.index.max()].to_numpy().ravel()
            late += [value for value in tail if math.isfinite(value)]
            if who.name in published:
                theirs = published[who.name]
                axes.plot(
                    theirs["step"], theirs["loss"], ":", color=shade, linewidth=1.3, label=f"{who.name}, published"
                )
                late += theirs["loss"][theirs["step"] >= LATE * theirs["step"].max()].tolist()
        axes.set_title(row.label, fontsize=9, color=colour(row))
        if len(drawn) > 1 or row.name in published:
            axes.legend(frameon=False, fontsize=8, loc="upper right")
    room = 0.06 * (max(late) - min(late)) or 0.01
    grid[0].set_ylim(min(late) - room, max(late) + room)
    figure.supxlabel("step")
    figure.supylabel("validation loss, nats", fontsize=10)
    return figure


def over_steps(rows: Sequence[Row], by_name: Mapping[str, Row], margin: float) -> Any:
    """The difference to the control over steps; paired by seed where seeds pair."""
    found = []
    for row in rows:
        ours, theirs = _finite(row.curves), _finite(by_name[row.variant.control or ""].curves)
        if ours.empty or theirs.empty:
            continue
        if row.difference and row.difference.paired:
            apart = (ours - theirs).dropna(how="all").dropna(axis=1, how="all")
            if apart.empty:
                continue
            mean, seeds = apart.mean(axis=1), apart.count(axis=1)
            error, freedom = apart.std(axis=1) / np.sqrt(seeds), (seeds - 1).clip(lower=1)
        else:
            mean = (ours.mean(axis=1) - theirs.mean(axis=1)).dropna()
            parts = [frame.var(axis=1) / frame.count(axis=1) for frame in (ours, theirs)]
            error = np.sqrt(parts[0] + parts[1]).reindex(mean.index)
            freedom = pd.Series(max(1, min(ours.shape[1], theirs.shape[1]) - 1), index=mean.index)
        found.append((row, mean, (-special.stdtrit(freedom, ALPHA / 2) * error).fillna(0)))
    if not found:
        return None
    figure, grid = facets(len(found))
    late: list[float] = [-margin, margin]
    for axes, (row, mean, half) in zip(grid, found, strict=True):
        axes.axhspan(-margin, margin, color="#e8eef7", zorder=0)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.plot(mean.index, mean, color=colour(row), linewidth=1.6)
        axes.fill_between(mean.index, mean - half, mean + half, color=colour(row), alpha=0.2, linewidth=0)
        axes.set_title(f"{row.label} - {row.control}", fontsize=8.5)
        tail = mean.index >= LATE * mean.index.max()
        late += [*(mean - half)[tail], *(mean + half)[tail]]
    room = 0.06 * (max(late) - min(late))
    grid[0].set_ylim(min(late) - room, max(late) + room)
    figure.supxlabel("step")
    figure.supylabel("difference, nats", fontsize=10)
    return figure


def pareto(rows: Sequence[Row]) -> Any:
    """Loss against what it cost, where costs differ; the line joins what nothing cheaper beats."""
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    known = [row for row in rows if row.loss is not None]
    prices: dict[str, list[float]] = {
        "parameters": [row.setting.parameters for row in known],
        "FLOPs of a run": [row.setting.flops for row in known],
        "corpus tokens of a run": [row.setting.tokens for row in known],
        "seconds a step": [math.nan if row.seconds is None else row.seconds for row in known],
    }
    prices = {what: found for what, found in prices.items() if len({x for x in found if math.isfinite(x)}) > 1}
    if not prices:
        return None
    figure, grid = pyplot.subplots(
        1, len(prices), figsize=(5.2 * len(prices), 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (what, found) in zip(grid.flat, prices.items(), strict=True):
        points = sorted(
            ((x, row.loss or 0.0, row) for x, row in zip(found, known, strict=True) if math.isfinite(x)),
            key=lambda point: point[:2],
        )
        front: list[tuple[float, float]] = []
        for x, loss, row in points:
            if not front or loss < front[-1][1]:
                front.append((x, loss))
            axes.plot(x, loss, "o", color=colour(row), markersize=6, zorder=2)
        axes.step(*zip(*front, strict=True), where="post", color=GREY, linewidth=1, zorder=1)
        axes.set_xlabel(what)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.1, y=0.1)
        _label(axes, [(x, loss, row.label) for x, loss, row in points])
    grid[0][0].set_ylabel("test loss, nats")
    return figure


def _label(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points, towards the middle; of those that would overlap the best and the worst come first."""
    axes.autoscale_view()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float, float]] = []
    ordered = sorted(points, key=lambda point: point[1])
    for x, loss, name in [*ordered[:1], *ordered[:0:-1]]:
        across, up = (x - left) / (right - left), (loss - low) / (high - low)
        wide = 0.017 * len(name) * (1 if across < 0.5 else -1)
        span = (min(across, across + wide), max(across, across + wide))
        if any(abs(up - y) < 0.045 and span[0] < b and span[1] > a for a, b, y in taken):
            continue
        taken.append((*span, up))
        place = {"xytext": (6 if wide > 0 else -6, 3), "ha": "left" if wide > 0 else "right"}
        axes.annotate(name, (x, loss), textcoords="offset points", fontsize=7.5, color=INK, **place)


def published_curves(folder: Path) -> dict[str, pd.DataFrame]:
    """Curves of other runs by experiment: NAME.csv with the columns step and loss.

    Raises:
        UsageError: no folder, none in it, or other columns.
    """
    found = {}
    for path in sorted(folder.glob("*.csv")):
        try:
            frame = pd.read_csv(path)
            found[path.stem] = frame[["step", "loss"]].astype(float).dropna()
        except (OSError, KeyError, ValueError) as error:
            raise UsageError(
                f"expected columns step and loss in {path}, got {str(error)[:80]}; mend the file"
            ) from error
    if not found:
        raise UsageError(f"expected curves as NAME.csv in {folder}, got none; give their folder")
    return found
