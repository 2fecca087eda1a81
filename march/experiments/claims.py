"""What the published text says of an experiment, what its runs showed, and what runs of this program say about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from march.experiments.published import PUBLISHED

BETTER, WORSE, SAME, NOT_BETTER = "better", "worse", "same", "not better"
HOLDS, REFUTED, UNDECIDED = "holds", "refuted", "undecided here"
# Rows of a `march compare` report, kept where `--list` finds them; absent until a study was run.
FINDINGS = Path(__file__).with_name("findings.json")


@dataclass(frozen=True)
class Claim:
    """A published sentence: `text`, what it `expects` of the loss beside the control's, `note` on how it was measured.

    measured: the published run that it rests on, by default the experiment's own.
    """

    text: str
    expects: str
    note: str = ""
    measured: str | None = None

    def evidence(self, name: str, control: str | None) -> str:
        """What the published runs of `name`, one seed each, show: difference in evaluation loss, and in time."""
        ours = PUBLISHED.get(self.measured or name)
        if ours is None:
            return "no published run"
        parts = []
        for other in dict.fromkeys(("Baseline", control)):
            if other in PUBLISHED and other != self.measured:
                theirs = PUBLISHED[other]
                parts.append(f"{ours.eval_loss - theirs.eval_loss:+.3f} against {other}")
                if ours.seconds_per_step and theirs.seconds_per_step:
                    parts.append(f"{ours.seconds_per_step / theirs.seconds_per_step - 1:+.1%} time")
        return ", ".join([*parts, self.note] if self.note else parts)

    def judged(self, verdict: str, *, within_margin: bool) -> str:
        """HOLDS, REFUTED or UNDECIDED, given a verdict of march.compare beside the control.

        within_margin: a difference of the margin or more is excluded, whatever its sign.
        """
        decided = verdict in (BETTER, WORSE)
        if self.expects == SAME:
            return HOLDS if within_margin else REFUTED if decided else UNDECIDED
        if self.expects == NOT_BETTER:
            if verdict == BETTER:
                return REFUTED
            return HOLDS if verdict == WORSE or within_margin else UNDECIDED
        if decided:
            return HOLDS if verdict == self.expects else REFUTED
        return REFUTED if within_margin else UNDECIDED


@cache
def findings() -> dict[str, dict[str, Any]]:
    """The kept rows by experiment: verdict, difference, low, high, pairs; {} where none are kept."""
    if not FINDINGS.exists():
        return {}
    return {row["experiment"]: row for row in json.loads(FINDINGS.read_text(encoding="utf-8"))["rows"]}


def judge(name: str, verdict: str, *, within_margin: bool) -> str | None:
    """What a verdict says about the experiment's claim; None where it has none."""
    from march import experiments

    claim = experiments.get(name).claim
    return claim.judged(verdict, within_margin=within_margin) if claim else None


def here(name: str) -> str:
    """What the kept runs say of the experiment, in a few words; "not run" where there are none."""
    row = findings().get(name)
    if row is None:
        return "not run"
    if row.get("verdict") is None:
        return "control"
    told = row.get("claim") or row["verdict"]
    if row.get("low") is None:
        return f"{told}: {row.get('why') or 'too few runs'}"
    return f"{told}: {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], {row['pairs']} seeds"
