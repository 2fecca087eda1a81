"""Is a variant's loss another than its control's? Differences over seeds, their uncertainty, one rule for a verdict.

The rule. Each variant has two null hypotheses: its mean loss equals its control's (two-sided t-test), and it differs by
the margin or more (two one-sided t-tests, TOST). Each of the two is corrected over the table's rows by Holm's step-down
at ALPHA. So the chance that a table has any false "better" or "worse" is at most ALPHA, and that it has any false "no
difference" too, whatever the rows share (a control, seeds).

    better, worse                 equality is rejected; the sign of the difference decides
    no difference larger than X   only the hypothesis of a difference of X or more is rejected
    undecided                     neither

A run whose loss is infinite has diverged: seeds with it leave the test, and nothing but "worse" is said of a variant
that diverged, nothing but "better" of one whose control did. NaN is a run that is not there.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

ALPHA = 0.05  # of any false verdict in a table
POWER = 0.8  # with which a detectable difference is found
MARGIN = 0.015  # nats: smaller differences do not matter
MOST_SEEDS = 1000
ROUNDING = float(np.finfo(np.float32).eps)  # losses are means of float32 numbers: no spread is smaller

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"


@dataclass(frozen=True)
class Difference:
    """Mean loss of a variant minus its control's, in nats; lower is better.

    pairs: seeds that both have finished (paired), or the smaller number of the two (not paired). spread: standard
    deviation whose square over `pairs` is the variance of `mean`. low, high: interval of 1 - ALPHA for this row alone.
    None where too few runs decide it: a mean needs one run of each, the others two.
    """

    paired: bool
    pairs: int
    mean: float | None
    spread: float | None
    freedom: float | None
    low: float | None
    high: float | None
    p_equal: float
    p_margin: float
    diverged: int
    control_diverged: int

    @property
    def error(self) -> float | None:
        """Standard error of the mean difference."""
        return None if self.spread is None else self.spread / math.sqrt(self.pairs)


def difference(
    variant: Mapping[int, float], control: Mapping[int, float], margin: float = MARGIN, *, seeds_pair: bool = True
) -> Difference:
    """Compare losses by seed.

    Paired where two seeds or more are common and `seeds_pair` (a seed means the same data and masks for both); else
    Welch's test of independent samples. With one run of each there is a difference and no verdict.
    """
    lost = [sum(1 for value in runs.values() if value in (math.inf, -math.inf)) for runs in (variant, control)]
    ours, theirs = ({s: v for s, v in runs.items() if math.isfinite(v)} for runs in (variant, control))
    common = sorted(ours.keys() & theirs.keys())
    paired = seeds_pair and (len(common) >= 2 or (len(common) == 1 and min(len(ours), len(theirs)) < 2))
    spread = freedom = None
    if paired:
        values = np.array([ours[seed] - theirs[seed] for seed in common])
        pairs = len(values)
        mean: float | None = float(values.mean())
        if pairs >= 2:
            spread, freedom = float(values.std(ddof=1)), float(pairs - 1)
    else:
        a, b = np.array(list(ours.values())), np.array(list(theirs.values()))
        pairs = min(len(a), len(b))
        mean = float(a.mean() - b.mean()) if pairs else None
        if pairs >= 2:
            parts = [x.var(ddof=1) / len(x) for x in (a, b)]
            total = sum(parts)
            spread = math.sqrt(total * pairs)
            # Welch and Satterthwaite; without any spread the smaller sample's
            shares = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
            freedom = float(total**2 / shares) if shares > 0 else float(pairs - 1)
    if spread is None or freedom is None or mean is None:
        return Difference(paired, pairs, mean, None, None, None, None, 1.0, 1.0, *lost)
    spread = max(spread, ROUNDING * max(abs(value) for value in [*ours.values(), *theirs.values()]))
    error = max(spread, 1e-300) / math.sqrt(pairs)
    half = -float(special.stdtrit(freedom, ALPHA / 2)) * error
    p_equal = 2 * float(special.stdtr(freedom, -abs(mean) / error))
    p_margin = float(special.stdtr(freedom, (abs(mean) - margin) / error))
    return Difference(paired, pairs, mean, spread, freedom, mean - half, mean + half, p_equal, p_margin, *lost)


@dataclass(frozen=True)
class Verdict:
    """What a row shows. within_margin: a difference of the margin or more is excluded (a "better" can be small)."""

    name: str
    p_equal: float  # corrected over the table
    p_margin: float
    within_margin: bool
    why: str = ""


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected over a table by Holm's step-down (1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return result.tolist()


def verdicts(rows: Sequence[Difference], margin: float = MARGIN) -> list[Verdict]:
    """One for each row, by the rule above; all rows of a table belong into one call."""
    corrected = zip(holm([row.p_equal for row in rows]), holm([row.p_margin for row in rows]), strict=True)
    return [_verdict(row, *p, margin) for row, p in zip(rows, corrected, strict=True)]


def _verdict(row: Difference, p_equal: float, p_margin: float, margin: float) -> Verdict:
    within = p_margin <= ALPHA and not row.diverged and not row.control_diverged
    if row.mean is None:
        return Verdict(UNDECIDED, p_equal, p_margin, False, "no finished run of one of the two")
    if row.spread is None:
        return Verdict(UNDECIDED, p_equal, p_margin, False, "one seed shows no spread")
    name = (WORSE if row.mean > 0 else BETTER) if p_equal <= ALPHA else None
    if row.diverged and name != WORSE:
        return Verdict(UNDECIDED, p_equal, p_margin, False, f"{row.diverged} of its runs diverged")
    if row.control_diverged and name != BETTER:
        return Verdict(UNDECIDED, p_equal, p_margin, False, f"{row.control_diverged} runs of its control diverged")
    if name is None:
        name = no_difference(margin) if within else UNDECIDED
    return Verdict(name, p_equal, p_margin, within)


def no_difference(margin: float) -> str:
    return f"no difference larger than {margin:g}"


def power(true: float, spread: float, seeds: int, comparisons: int = 1, freedom: float | None = None) -> float:
    """The chance that runs of `seeds` seeds show a true difference of `true` nats, with its sign.

    At ALPHA over the comparisons, the first step of Holm's: with others that are clear it is higher. spread, freedom:
    as in Difference; by default that of pairs.
    """
    if seeds < 2:
        return 0.0
    freedom = seeds - 1 if freedom is None else freedom
    bound = -special.stdtrit(freedom, ALPHA / comparisons / 2)
    shift = abs(true) / max(spread, 1e-300) * math.sqrt(seeds)
    if shift > 10 * bound:  # certain, and further out than scipy's distribution can be evaluated
        return 1.0
    return float(stats.nct.sf(bound, freedom, shift))


def detectable(spread: float | None, seeds: int, comparisons: int = 1, freedom: float | None = None) -> float | None:
    """The smallest true difference, in nats, that this many seeds show with POWER; None below two seeds."""
    if spread is None or seeds < 2:
        return None
    if spread == 0:
        return 0.0
    high = spread
    while power(high, spread, seeds, comparisons, freedom) < POWER:
        high *= 2
    return float(optimize.brentq(lambda true: power(true, spread, seeds, comparisons, freedom) - POWER, 0.0, high))


def seeds_needed(spread: float | None, margin: float = MARGIN, comparisons: int = 1) -> int | None:
    """Seeds with which a true difference of the margin is shown with POWER; None: unknown, or above MOST_SEEDS."""
    if spread is None or power(margin, spread, MOST_SEEDS, comparisons) < POWER:
        return None
    found = range(1, MOST_SEEDS + 1)  # power grows with seeds
    return found[bisect(found, False, key=lambda seeds: power(margin, spread, seeds, comparisons) >= POWER)]


def deviation(losses: Sequence[float]) -> float | None:
    """Standard deviation over seeds, in nats; None below two finite losses."""
    finite = [value for value in losses if math.isfinite(value)]
    return float(np.std(finite, ddof=1)) if len(finite) >= 2 else None


def roughness(losses: Sequence[float]) -> float | None:
    """How uneven the second half of a loss curve is, in nats: its standard deviation around a locally straight line.

    From second differences (Gasser, Sroka and Jennen-Steinmetz, 1986), in which a trend that is straight over three
    steps cancels; white noise of deviation s gives s. None below five finite losses.
    """
    curve = np.array(losses[len(losses) // 2 :], dtype=float)
    bends = curve[:-2] - 2 * curve[1:-1] + curve[2:]
    bends = bends[np.isfinite(bends)]
    return float(np.sqrt(np.mean(bends**2) / 6)) if len(bends) >= 3 else None
