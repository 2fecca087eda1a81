"""Verdicts over seeds: wrong ones at the stated rate, found differences with the stated power, every edge defined."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from march.compare import statistics
from march.compare.statistics import ALPHA, BETTER, POWER, UNDECIDED, WORSE, difference, no_difference, verdicts

DRAWS = 10_000
MARGIN = 0.02


def by_seed(values, first=1):
    return {first + i: float(value) for i, value in enumerate(values)}


def rate_of(draw, wrong, draws=DRAWS):
    """The share of tables with a wrong verdict; `draw` gives a table's differences."""
    return sum(any(wrong(v.name, i) for i, v in enumerate(verdicts(draw(), MARGIN))) for _ in range(draws)) / draws


def three_sigma(rate, draws=DRAWS):
    return 3 * math.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seeds", [2, 5])
def test_equal_means_are_called_different_at_the_stated_rate(paired, seeds):
    rng = np.random.default_rng(seeds + paired)

    def table():
        common = rng.normal(0, 0.05, seeds) if paired else np.zeros(seeds)
        a, b = common + rng.normal(5, 0.02, (2, seeds))
        return [difference(by_seed(a), by_seed(b, 1 if paired else 100), 1e-9)]

    rate = rate_of(table, lambda name, _: name != UNDECIDED)
    # Welch's test is conservative with few seeds; a paired one is exact
    assert rate <= ALPHA + three_sigma(ALPHA)
    assert rate >= (ALPHA - three_sigma(ALPHA) if paired else 0.01)


@pytest.mark.parametrize("kind", ["another loss", "no difference"])
def test_any_false_verdict_of_a_kind_in_a_table_stays_below_the_stated_rate_over_a_shared_control(kind):
    """Rows of no difference and rows at the margin, all beside one control: each could be falsely decided."""
    rng = np.random.default_rng(0)
    truth = [0.0, 0.0, 0.0, MARGIN, -MARGIN, 0.2]

    def table():
        control = rng.normal(5, 0.01, 5)
        return [difference(by_seed(5 + t + rng.normal(0, 0.01, 5)), by_seed(control), MARGIN) for t in truth]

    def wrong(name, i):
        if kind == "no difference":
            return name == no_difference(MARGIN) and truth[i] != 0
        return name in ((BETTER, WORSE) if truth[i] == 0 else (BETTER,) if truth[i] > 0 else (WORSE,))

    rate = rate_of(table, wrong)
    assert rate <= ALPHA + three_sigma(ALPHA)
    assert rate > 0.005  # it is not bought by deciding nothing


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_a_detectable_difference_is_found_with_the_stated_power(seeds):
    rng = np.random.default_rng(seeds)
    spread = 0.01
    true = statistics.detectable(spread, seeds)

    def table():
        control = rng.normal(5, 0.3, seeds)
        return [difference(by_seed(control + true + rng.normal(0, spread, seeds)), by_seed(control), MARGIN)]

    assert rate_of(table, lambda name, _: name == WORSE) == pytest.approx(POWER, abs=three_sigma(POWER))


def test_runs_that_do_not_pair_find_a_detectable_difference_with_the_stated_power():
    rng = np.random.default_rng(4)
    spread, seeds = 0.01, 5  # of each sample; Welch's degrees of freedom are at most 8
    true = statistics.detectable(spread * math.sqrt(2), seeds, freedom=2 * seeds - 2)

    def table():
        a, b = rng.normal(5 + true, spread, seeds), rng.normal(5, spread, seeds)
        return [difference(by_seed(a), by_seed(b, 100), MARGIN)]

    assert rate_of(table, lambda name, _: name == WORSE) == pytest.approx(POWER, abs=0.03)


def test_unpaired_runs_of_the_same_spread_need_a_larger_difference():
    rng = np.random.default_rng(3)
    common = rng.normal(5, 0.1, 6)
    a, b = by_seed(common + 0.03 + rng.normal(0, 0.01, 6)), by_seed(common + rng.normal(0, 0.01, 6))
    paired, apart = difference(a, b), difference(a, b, seeds_pair=False)
    assert verdicts([paired])[0].name == WORSE
    assert verdicts([apart])[0].name == UNDECIDED
    assert paired.paired
    assert not apart.paired
    assert paired.mean == pytest.approx(apart.mean)


def test_equivalence_is_found_within_the_margin_and_only_there():
    rng = np.random.default_rng(1)

    def share(true):
        rows = [
            [difference(by_seed(5 + true + rng.normal(0, 0.004, 6)), by_seed(np.full(6, 5.0)), MARGIN)]
            for _ in range(1000)
        ]
        return np.mean([verdicts(row, MARGIN)[0].within_margin for row in rows])

    assert share(0.0) > 0.95
    assert share(MARGIN) <= ALPHA + three_sigma(ALPHA, 1000)
    assert share(-2 * MARGIN) == 0


def test_p_values_intervals_power_and_correction_are_those_of_the_libraries():
    rng = np.random.default_rng(2)
    a, b = rng.normal(5, 0.1, 7), rng.normal(5.1, 0.2, 7)
    paired = difference(by_seed(a), by_seed(b), MARGIN)
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(1 - ALPHA)
    assert paired.p_equal == pytest.approx(expected.pvalue)
    assert (paired.low, paired.high) == pytest.approx(tuple(interval))
    sides = [
        stats.ttest_1samp(a - b, -MARGIN, alternative="greater"),
        stats.ttest_1samp(a - b, MARGIN, alternative="less"),
    ]
    assert paired.p_margin == pytest.approx(max(side.pvalue for side in sides))
    welch = difference(by_seed(a), by_seed(b[:5], 50), MARGIN)
    expected = stats.ttest_ind(a, b[:5], equal_var=False)
    assert (welch.p_equal, welch.freedom) == pytest.approx((expected.pvalue, expected.df))
    ps = [0.001, 0.04, 0.02, 0.9, 0.02]
    assert statistics.holm(ps) == pytest.approx(list(multipletests(ps, method="holm")[1]))
    library = TTestPower().power(effect_size=1.5, nobs=6, alpha=ALPHA / 3, df=5)
    assert statistics.power(0.03, 0.02, 6, 3) == pytest.approx(library)
    needed = statistics.seeds_needed(0.02, 0.015)
    assert statistics.power(0.015, 0.02, needed) >= POWER > statistics.power(0.015, 0.02, needed - 1)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("variant", "control", "name", "why"),
    [
        ({}, {}, UNDECIDED, "no finished run"),
        ({1: 5.0}, {}, UNDECIDED, "no finished run"),
        ({1: 5.0}, {1: 4.0}, UNDECIDED, "one seed"),
        ({1: 5.0}, {2: 4.0}, UNDECIDED, "one seed"),
        ({1: 5.0}, {1: 4.0, 2: 4.1}, UNDECIDED, "one seed"),
        ({1: NAN, 2: NAN}, {1: 4.0, 2: 4.1}, UNDECIDED, "no finished run"),
        ({1: 5.0, 2: NAN}, {1: 4.0, 2: 4.0}, UNDECIDED, "one seed"),
        ({1: 5.0, 2: 5.1, 3: 5.2}, {1: 5.0, 2: 5.1, 3: 5.2}, no_difference(MARGIN), ""),  # ties of every seed
        ({1: 5.0, 2: 5.0}, {1: 5.0, 2: 5.0}, no_difference(MARGIN), ""),  # no spread at all
        ({1: 5.1, 2: 5.1}, {1: 5.0, 2: 5.0}, WORSE, ""),  # the same difference twice
        ({1: 4.9, 2: 4.9}, {7: 5.0, 8: 5.0}, BETTER, ""),
        ({1: 0.0, 2: 0.0}, {1: 0.0, 2: 0.0}, no_difference(MARGIN), ""),
        ({1: 4.0, 2: 4.0, 3: 4.0, 4: INF}, {1: 5.0, 2: 5.0, 3: 5.0, 4: 5.0}, UNDECIDED, "1 of its runs diverged"),
        ({1: 5.0, 2: 5.0, 3: INF}, {1: 5.0, 2: 5.0, 3: 5.0}, UNDECIDED, "diverged"),
        ({1: 6.0, 2: 6.0, 3: INF}, {1: 5.0, 2: 5.0, 3: 5.0}, WORSE, ""),
        ({1: 6.0, 2: 6.0, 3: 6.0}, {1: 5.0, 2: 5.0, 3: INF}, UNDECIDED, "control diverged"),
        ({1: 4.0, 2: 4.0, 3: 4.0}, {1: 5.0, 2: 5.0, 3: INF}, BETTER, ""),
        ({1: INF, 2: INF}, {1: 5.0, 2: 5.0}, UNDECIDED, "no finished run"),
    ],
)
def test_every_edge_has_a_verdict(variant, control, name, why):
    row = difference(variant, control, MARGIN)
    verdict = verdicts([row], MARGIN)[0]
    assert verdict.name == name
    assert why in verdict.why
    assert all(value is None or math.isfinite(value) for value in (row.mean, row.spread, row.low, row.high))
    assert 0 <= row.p_equal <= 1
    assert 0 <= row.p_margin <= 1


def test_a_table_without_rows_has_no_verdicts():
    assert verdicts([]) == []


def test_missing_seeds_leave_the_pairs_that_are_there_and_say_how_many():
    row = difference({1: 5.0, 2: NAN, 3: 5.2, 9: 1.0}, {1: 4.9, 2: 5.0, 3: 5.0, 4: 4.0})
    assert (row.paired, row.pairs) == (True, 2)
    assert row.mean == pytest.approx(0.15)


def test_detectable_differences_and_seeds_at_the_edges():
    assert statistics.detectable(None, 5) is None
    assert statistics.detectable(0.01, 1) is None
    assert statistics.detectable(0.0, 5) == 0.0
    assert statistics.detectable(0.01, 2) > statistics.detectable(0.01, 3) > statistics.detectable(0.01, 8) > 0
    assert statistics.detectable(0.01, 5, 10) > statistics.detectable(0.01, 5, 1)
    assert statistics.seeds_needed(None) is None
    assert statistics.seeds_needed(100.0, 0.001) is None
    assert statistics.seeds_needed(0.0, 0.01) == 2


def test_roughness_is_the_noise_around_a_trend():
    rng = np.random.default_rng(0)
    steps = np.arange(1, 4001)
    trend = 5 + 8 * np.exp(-steps / 500)
    assert statistics.roughness(trend + rng.normal(0, 0.03, len(steps))) == pytest.approx(0.03, rel=0.05)
    assert statistics.roughness(trend) < 1e-4
    assert statistics.roughness([5.0] * 20) == 0
    assert statistics.roughness([5.0, 4.0, 3.0]) is None
    assert statistics.roughness([NAN] * 20) is None
    assert math.isfinite(statistics.roughness([5.0, 4.0] * 10 + [NAN] + [4.0, 5.0] * 10))


def test_spread_over_seeds_ignores_what_is_not_there():
    assert statistics.deviation([1.0, NAN, 3.0, INF]) == pytest.approx(math.sqrt(2))
    assert statistics.deviation([1.0]) is None
