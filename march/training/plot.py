"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRAIN, EVALUATION, GUIDE = "#4c78a8", "#e45756", "#5f6368"


def plot_curve(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    subtitle: str,
    vocab_size: int,
    unigram_entropy: float | None,
) -> None:
    """Draw train and eval loss over steps into `path` (PNG), with two levels that give them a meaning.

    ln V is the loss of a model that knows nothing but the vocabulary's size; the unigram entropy is that of one
    that knows only how often each label token occurs.

    Args:
        rows: of metrics.jsonl; losses in nats per label token.
        unigram_entropy: nats per label token, or None to leave that line out.
    """
    from matplotlib.figure import Figure  # pyplot, which looks for a window system, takes as long again to import
    from matplotlib.ticker import MaxNLocator

    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    evaluated = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=TRAIN, linewidth=1.3, label="train")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color=EVALUATION, markersize=4, linewidth=1.6, label="eval")
        # the number everybody looks for first
        axes.annotate(
            f"{evaluated[-1][1]:.3f}",
            evaluated[-1],
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
            color=EVALUATION,
            fontsize=9,
        )
    levels = [(math.log(vocab_size), "ln V")]
    if unigram_entropy is not None:
        levels.append((unigram_entropy, "unigram entropy\nof the labels"))
    for level, text in levels:
        axes.axhline(level, color=GUIDE, linewidth=0.9, linestyle=(0, (5, 4)), zorder=0)
        # beside the axes: inside, the curve would run through the words
        axes.annotate(
            f"{text}\n{level:.2f}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=GUIDE,
            fontsize=8.5,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per label token)")
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24)
    above: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 9), "textcoords": "offset points"}
    axes.annotate(subtitle, (0, 1), color=GUIDE, fontsize=9, **above)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.margins(y=0.08)
    axes.grid(axis="y", color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
