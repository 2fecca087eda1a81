"""The pictures of a report. Losses in nats per label token; lower is better everywhere."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from march.compare.analysis import Row
from march.compare.statistics import ALPHA, BETTER, WORSE, difference
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
                with Image.open(folder / name) as picture:  # few colours: a third of the bytes, in the page too
                    picture.convert("RGB").quantize(64).save(folder / name, optimize=True)
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
    usual, _ = Counter(row.control for row in known).most_common(1)[0]
    figure, axes = pyplot.subplots(
        figsize=(8.2, 1.1 + (0.42 if len(known) < 15 else 0.27) * len(known)), layout="constrained"
    )
    axes.axvspan(-margin, margin, color="#e8eef7", zorder=0, label=f"within ±{margin:g}")
    axes.axvline(0, color=GREY, linewidth=1)
    for place, row in enumerate(reversed(known)):
        d = row.difference
        assert d is not None
        assert d.mean is not None
        if d.low is not None and d.high is not None:
            axes.plot([d.low, d.high], [place, place], color=colour(row), linewidth=2.6, solid_capstyle="round")
        axes.plot(d.mean, place, "o", color=colour(row), markersize=6)
        if row.control != usual:
            axes.text(
                1.01, place, row.control, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK
            )
    axes.set_yticks(range(len(known)), [row.label for row in reversed(known)])
    against = f"{usual}'s" if all(row.control == usual for row in known) else f"{usual}'s, or the named control's"
    axes.set_xlabel(f"test loss minus {against}, nats; {1 - ALPHA:.0%} interval; left is better")
    axes.set_ylim(-0.7, len(known) - 0.3)
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def _panels(items: Sequence[Any], draw: Callable[[Any, Any], list[pd.DataFrame]], ylabel: str) -> Any:
    """A panel for each item on common axes, the vertical one that of the later steps; None without any item. draw:
    returns what it drew, by step."""
    from matplotlib import pyplot

    if not items:
        return None
    columns, size = (5, (2.5, 1.75)) if len(items) > 12 else (min(3, len(items)), (3.6, 2.5))
    height = math.ceil(len(items) / columns)
    figure, grid = pyplot.subplots(
        height,
        columns,
        figsize=(size[0] * columns + 0.4, size[1] * height + 0.3),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axes in grid.flat[len(items) :]:
        axes.set_visible(False)
    late: list[float] = []
    for axes, item in zip(grid.flat, items, strict=False):
        for frame in draw(axes, item):
            late += frame[frame.index >= LATE * frame.index.max()].stack().tolist()
    room = 0.06 * (max(late) - min(late)) or 0.01
    grid[0, 0].set_ylim(min(late) - room, max(late) + room)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    return figure


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

    def one(axes: Any, row: Row) -> list[pd.DataFrame]:
        control, shown = by_name.get(row.variant.control or ""), []
        for who, shade in [(control, GREY)] * bool(control) + [(row, colour(row))]:
            assert who is not None
            if not (frame := _finite(who.curves)).empty:
                _band(axes, frame, shade, who.label if who is not row else "_")
                shown.append(frame)
            if who.name in published:
                theirs = published[who.name].set_index("step")
                axes.plot(theirs, ":", color=shade, linewidth=1.3, label=f"{who.name}, published")
                shown.append(theirs)
        axes.set_title(row.label, fontsize=8 if len(row.label) < 30 else 6.5, color=colour(row))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7, loc="upper right", handlelength=1)
        return shown

    return _panels(known, one, "validation loss, nats")


def over_steps(rows: Sequence[Row], by_name: Mapping[str, Row], margin: float) -> Any:
    """The difference to the control over steps, by the rule of the table; paired by seed where seeds pair."""
    found = []
    for row in rows:
        ours, theirs = _finite(row.curves), _finite(by_name[row.variant.control or ""].curves)
        pair = bool(row.difference and row.difference.paired)
        apart = {
            step: difference(dict(ours.loc[step].dropna()), dict(theirs.loc[step].dropna()), margin, seeds_pair=pair)
            for step in ours.index.intersection(theirs.index)
        }
        known = {step: (d.mean, d.low, d.high) for step, d in apart.items() if d.mean is not None}
        if known:
            frame = pd.DataFrame.from_dict(known, orient="index", columns=["mean", "low", "high"], dtype=float)
            found.append((row, frame.bfill(axis=1).ffill(axis=1)))

    def one(axes: Any, item: tuple[Row, pd.DataFrame]) -> list[pd.DataFrame]:
        row, frame = item
        axes.axhspan(-margin, margin, color="#e8eef7", zorder=0)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.plot(frame["mean"], color=colour(row), linewidth=1.6)
        axes.fill_between(frame.index, frame["low"], frame["high"], color=colour(row), alpha=0.2, linewidth=0)
        axes.set_title(f"{row.label}\n- {row.control}", fontsize=7, color=colour(row))
        return [frame, pd.DataFrame([[-margin, margin]])]

    return _panels(found, one, "difference, nats")


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
