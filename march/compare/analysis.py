"""From finished runs to the rows of a report: losses by seed, differences to the control, costs, what does not fit."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from march import experiments
from march.compare import statistics
from march.compare.cell import DIVERGED, ENDED, FINISHED, Cell, read_or_empty
from march.compare.costs import Setting
from march.compare.plan import Variant
from march.compare.statistics import Difference, Verdict
from march.experiments.claims import judge
from march.training.metrics import read

BUDGET_TOLERANCE = 0.02  # parameters and FLOPs that differ by more are no longer one budget


@dataclass(frozen=True)
class Row:
    """A variant and what its runs show. Losses in nats per label token, of the test split; by seed, infinite where the
    run diverged, NaN where it did not finish. seconds: a step, median. flags: why a comparison may not be fair."""

    variant: Variant
    change: str
    setting: Setting
    losses: Mapping[int, float]
    evaluations: Mapping[int, float]
    history: pd.DataFrame  # experiment, seed, step, loss, eval_loss of every run
    seconds: float | None
    run_seconds: float | None
    roughness: float | None
    statuses: Mapping[int, str]
    difference: Difference | None = None
    verdict: Verdict | None = None
    detectable: float | None = None
    seeds_needed: int | None = None
    flags: tuple[str, ...] = ()
    claim: str = ""

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def label(self) -> str:
        """Without the folder of a file."""
        return label(self.name)

    @property
    def control(self) -> str:
        return label(self.variant.control or "")

    @property
    def curves(self) -> pd.DataFrame:
        """Validation loss of the finished runs, steps by seeds."""
        done = [seed for seed, status in self.statuses.items() if status == FINISHED]
        known = self.history[self.history["seed"].isin(done)].dropna(subset="eval_loss")
        return known.pivot(index="step", columns="seed", values="eval_loss")

    @property
    def finite(self) -> list[float]:
        return [loss for loss in self.losses.values() if math.isfinite(loss)]

    @property
    def loss(self) -> float | None:
        return plain.fmean(self.finite) if self.finite else None

    @property
    def spread(self) -> float | None:
        return statistics.deviation(self.finite)

    @property
    def bits_per_byte(self) -> float | None:
        """Of label text, as if its tokens were as long as the test split's; None where that is not known."""
        if self.loss is None or self.setting.tokens_per_byte is None:
            return None
        return self.loss * self.setting.tokens_per_byte / math.log(2)


def label(name: str) -> str:
    return name.rpartition("/")[2]


def rows(
    variants: Sequence[Variant], settings: Mapping[str, Setting], parent: Path, margin: float = statistics.MARGIN
) -> list[Row]:
    """The table, in the order of the variants; verdicts are corrected over all of it."""
    plain_rows = [_row(variant, settings[variant.name], parent) for variant in variants]
    by_name = {row.name: row for row in plain_rows}
    controls = {row.name: by_name[row.variant.control] for row in plain_rows if row.variant.control}
    differences = {
        row.name: statistics.difference(
            row.losses, controls[row.name].losses, margin, seeds_pair=_pair(row.setting, controls[row.name].setting)
        )
        for row in plain_rows
        if row.name in controls
    }
    verdicts = dict(zip(differences, statistics.verdicts(list(differences.values()), margin), strict=True))
    return [
        _judged(row, controls[row.name], differences[row.name], verdicts[row.name], margin, len(verdicts))
        if row.name in controls
        else row
        for row in plain_rows
    ]


def _row(variant: Variant, setting: Setting, parent: Path) -> Row:
    cells = {cell.seed: cell for cell in variant.cells(parent)}
    statuses = {seed: cell.status() for seed, cell in cells.items()}
    histories = {seed: read(cell.run / "metrics.jsonl") for seed, cell in cells.items()}
    finished = [seed for seed, status in statuses.items() if status == FINISHED]
    seconds = [row["seconds"] for seed in finished for row in histories[seed] if "seconds" in row]
    times = [t for seed in finished if isinstance(t := cells[seed].summary().get("process_seconds"), int | float)]
    rough = [r for s in finished if (r := statistics.roughness([x["loss"] for x in histories[s]])) is not None]
    history = pd.DataFrame(
        [{"experiment": variant.name, "seed": seed, **row} for seed in cells for row in histories[seed]],
        columns=["experiment", "seed", "step", "loss", "eval_loss"],
    ).astype({"loss": float, "eval_loss": float})
    return Row(
        variant,
        _change(variant),
        setting,
        {seed: _loss(cells[seed], statuses[seed], "test_loss") for seed in cells},
        {seed: _loss(cells[seed], statuses[seed], "eval_loss") for seed in cells},
        history,
        plain.median(seconds) if seconds else None,
        plain.fmean(times) if times else None,
        plain.median(rough) if rough else None,
        statuses,
        flags=_not_finished(statuses),
    )


def _loss(cell: Cell, status: str, which: str) -> float:
    if status == DIVERGED:
        return math.inf
    loss = cell.summary().get(which) if status == FINISHED else None
    return float(loss) if isinstance(loss, int | float) else math.nan


def _change(variant: Variant) -> str:
    """What differs from the experiment that it is a change of."""
    experiment = experiments.get(variant.name)
    changes = ", ".join(f"{field} {_text(to)}" for field, (_, to) in experiments.difference(variant.name).items())
    base = f"{experiment.base}: " if experiment.base not in (None, "Baseline") else ""
    chosen = f" (chosen: {', '.join(variant.chosen)})" if variant.chosen else ""
    return (base + changes or "the reference") + chosen


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple | list) else str(value).lower()


def _not_finished(statuses: Mapping[int, str]) -> tuple[str, ...]:
    odd = [status for status in statuses.values() if status != FINISHED]
    ended = sum(status in ENDED for status in odd)
    return (f"{len(odd)} of {len(statuses)} runs not finished ({ended} failed)",) if odd else ()


def _pair(a: Setting, b: Setting) -> bool:
    """Whether one seed is the same data in both."""
    return (a.sequences, a.length, a.text) == (b.sequences, b.length, b.text)


def _judged(row: Row, control: Row, difference: Difference, verdict: Verdict, margin: float, comparisons: int) -> Row:
    ours, theirs = row.setting, control.setting
    flags = list(row.flags)
    if row.variant.own_control:
        flags.append(f"its own control {label(row.variant.own_control)} is not compared")
    for what, a, b, tolerance in (
        ("parameters", ours.parameters, theirs.parameters, BUDGET_TOLERANCE),
        ("FLOPs", ours.flops, theirs.flops, BUDGET_TOLERANCE),
        ("tokens", ours.tokens, theirs.tokens, 0),
    ):
        if abs(a / b - 1) > tolerance:
            flags.append(f"{what} {a / b - 1:+.1%}")
    if not difference.paired and difference.pairs:
        flags.append("seeds do not pair")
    still = statistics.seeds_needed(difference.spread, margin, comparisons)
    return replace(
        row,
        difference=difference,
        verdict=verdict,
        detectable=statistics.detectable(difference.spread, difference.pairs, comparisons, difference.freedom),
        seeds_needed=None if still is None else max(0, still - difference.pairs),
        flags=tuple(flags),
        claim=judge(row.name, verdict.name, within_margin=verdict.within_margin) or "",
    )


def origins(variants: Sequence[Variant], settings: Mapping[str, Setting], parent: Path) -> dict[str, list[str]]:
    """Where the runs came from: several commits, devices, or results of the precision that each start measures for
    itself, and they may not be comparable."""
    found: dict[str, set[str]] = {"commits": set(), "devices": set(), "measured precisions": set()}
    for variant in variants:
        for cell in variant.cells(parent):
            for start in read_or_empty(cell.run / "environment.json").get("starts", []):
                dirty = " with uncommitted changes" if start.get("uncommitted_changes") else ""
                found["commits"].add(f"{str(start.get('commit'))[:10]}{dirty}")
                found["devices"].add(str(start.get("device")))
                if settings[variant.name].precision == "fastest":
                    found["measured precisions"].add(str(start.get("precision")))
    return {what: sorted(values) for what, values in found.items()}


def values(row: Row) -> dict[str, Any]:
    """The row as plain values, for JSON and CSV; None for what is not known."""
    d, v = row.difference, row.verdict
    evaluations = [loss for loss in row.evaluations.values() if math.isfinite(loss)]
    return {
        "experiment": row.name,
        "control": row.variant.control,
        "change": row.change,
        "parameters": row.setting.parameters,
        "flops": row.setting.flops,
        "tokens": row.setting.tokens,
        "learning_rate": row.setting.learning_rate,
        "seconds_per_step": row.seconds,
        "run_seconds": row.run_seconds,
        "seeds": len(row.finite),
        "loss": row.loss,
        "bits_per_byte": row.bits_per_byte,
        "validation_loss": plain.fmean(evaluations) if evaluations else None,
        "difference": d.mean if d else None,
        "low": d.low if d else None,
        "high": d.high if d else None,
        "paired": d.paired if d else None,
        "pairs": d.pairs if d else None,
        "p_equal": v.p_equal if v else None,
        "p_margin": v.p_margin if v else None,
        "spread": row.spread,
        "roughness": row.roughness,
        "detectable": row.detectable,
        "seeds_needed": row.seeds_needed,
        "verdict": v.name if v else None,
        "why": v.why if v else None,
        "within_margin": v.within_margin if v else None,
        "claim": row.claim,
        "flags": "; ".join(row.flags),
        "losses": {str(seed): loss if math.isfinite(loss) else None for seed, loss in row.losses.items()},
    }
