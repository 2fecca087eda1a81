"""`march compare` from its words to its page, over stand-in runs: what is compared with what, chosen, flagged, said."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from compare_support import __file__ as support

from march import experiments
from march.compare import analysis, costs, main, plan, report, runner, statistics
from march.compare.cell import Cell
from march.config import ConfigError, ModelConfig, parse_overrides
from march.console import UsageError
from march.experiments import claims

SETTING = costs.Setting(ModelConfig(), 6, 8, 128, 1e-3, "fp32", "auto", "a text", 0.25)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`march compare` with stand-in runs and their folder; returns a function of words."""
    launcher = (sys.executable, support)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        runner, "cpu_slots", lambda n: [runner.Slot(launcher, {}, (f"t{i}",)) for i in range(max(2, n))]
    )
    monkeypatch.setattr(
        costs, "setting_of", lambda cell, _: replace(SETTING, config=experiments.configuration(cell.experiment))
    )

    def estimates(cells, **_):
        return {cell: costs.Estimate(1, 10, 100, 1.0, "told") for cell in cells}

    monkeypatch.setattr(costs, "estimates", estimates)
    monkeypatch.setattr(costs.Setting, "flops", 10**12)
    return lambda *words: main.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *words])


def rows_of(folder):
    return {row["experiment"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def test_from_words_to_a_page(stand_in, tmp_path, capsys):
    published = tmp_path / "published"
    published.mkdir()
    pd.DataFrame({"step": [1, 3, 6], "loss": [9.0, 7.0, 5.0]}).to_csv(published / "Baseline.csv")
    words = (
        "Baseline",
        "SquaredReLU",
        "NoPositions",
        "QKNorm",
        "--seeds",
        "4,Baseline=5",
        "--published",
        str(published),
    )
    assert stand_in(*words, "--dry-run") == 0
    assert not (tmp_path / "runs").exists()
    assert "17 runs" in capsys.readouterr().out
    assert stand_in(*words) == 0
    rows = rows_of(tmp_path / "out")
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    same = statistics.no_difference(statistics.MARGIN)
    assert verdicts == {"Baseline": None, "SquaredReLU": "better", "NoPositions": "worse", "QKNorm": same}
    assert rows["SquaredReLU"]["pairs"] == 4
    assert rows["SquaredReLU"]["difference"] == pytest.approx(-0.1, abs=0.01)
    assert rows["Baseline"]["bits_per_byte"] == pytest.approx(rows["Baseline"]["loss"] * 0.25 / math.log(2))
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    for told in (*rows, "better", "worse", "Holm"):
        assert told in page
        assert told in text
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # one file, nothing from elsewhere
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert pictures == list(report.PICTURES)
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in pictures)
    assert len(pd.read_csv(tmp_path / "out" / "rows.csv")) == 4
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv.gz")
    assert len(metrics) == 17 * 6
    assert list(metrics.columns) == ["experiment", "seed", "step", "loss", "eval_loss"]


def test_failed_runs_are_seen_in_the_table_and_in_the_exit_code(stand_in, tmp_path, monkeypatch):
    real = experiments.get
    monkeypatch.setattr(
        experiments, "get", lambda name: replace(real("QKNorm"), name=name) if name == "Diverges" else real(name)
    )
    assert stand_in("Baseline", "Diverges", "--seeds", "2") == 1
    row = rows_of(tmp_path / "out")["Diverges"]
    assert row["verdict"] == "undecided"
    assert row["flags"] == "2 of 2 runs not finished (2 failed)"
    assert row["loss"] is None


def test_one_seed_gets_a_difference_and_no_verdict(stand_in, tmp_path):
    assert stand_in("Baseline", "SquaredReLU", "--seeds", "1") == 0
    row = rows_of(tmp_path / "out")["SquaredReLU"]
    assert (row["verdict"], row["low"], row["detectable"], row["seeds_needed"]) == ("undecided", None, None, None)
    assert row["difference"] == pytest.approx(-0.1, abs=0.02)


def test_a_grid_is_judged_at_the_value_chosen_on_other_seeds(stand_in, tmp_path):
    assert stand_in("Baseline", "SquaredReLU", "--seeds", "2", "--grid", "dropout=0.5,0.1,0.3") == 0
    assert "chosen: dropout=0.1" in rows_of(tmp_path / "out")["SquaredReLU"]["change"]
    seeds = {json.loads(path.read_text())["seed"] for path in (tmp_path / "runs").glob("*/run/config.json")}
    assert seeds == {1, 2, plan.GRID_SEEDS_FROM, plan.GRID_SEEDS_FROM + 1}
    assert len(list((tmp_path / "runs").glob("*/run"))) == 2 * 3 * 2 + 2 * 2
    assert "dropout=0.1" in (tmp_path / "out" / "report.html").read_text()


def test_a_report_of_what_is_there_starts_nothing(stand_in, tmp_path):
    assert stand_in("Baseline", "SquaredReLU", "--report-only") == 1
    assert not list(tmp_path.glob("runs/*/run"))


def test_each_is_judged_by_its_own_control_where_that_is_compared():
    def controls(*names, **more):
        found = plan.variants(names, seeds="1", options=(), **more)
        return {v.name: (v.control, v.own_control) for v in found}

    gated, unit = "ReLUGatedLinearUnit", "APEUnitVariance"
    assert controls("Baseline", unit, gated) == {
        "Baseline": (None, None),
        unit: ("Baseline", None),
        gated: (unit, None),
    }
    assert controls("Baseline", gated)[gated] == ("Baseline", unit)
    assert controls(gated, "QKNorm") == {gated: (None, unit), "QKNorm": (gated, "Baseline")}
    assert controls("Baseline", unit, gated, control="baseline")[gated] == ("Baseline", unit)


def test_cards_that_are_not_there_are_one_line(stand_in, capsys):
    assert stand_in("Baseline", "--gpus", "0", "--seeds", "1") == 2
    assert "machine without" in capsys.readouterr().err


def test_widths_shrink_by_one_factor_and_heads_stay():
    for name in ("Baseline", "ScalingHeadsConstant", "DatabaseFromDim", "BigHeads2", "GELUGatedLinearUnitControlled"):
        (variant,) = plan.variants([name], seeds="1", options=(), width=0.25)
        config = experiments.configuration(name)
        small = experiments.configuration(name, **parse_overrides(variant.options[1::2]))
        assert small.num_heads == config.num_heads
        assert small.num_layers == config.num_layers
        for field in plan.WIDTHS:
            pairs = [
                (getattr(c, field),) if not isinstance(getattr(c, field), tuple) else getattr(c, field)
                for c in (config, small)
            ]
            assert all(b == (None if a is None else round(a / 4)) or (a == b == 0) for a, b in zip(*pairs, strict=True))


def test_budgets_that_do_not_match_are_flagged(tmp_path, monkeypatch):
    monkeypatch.setattr(costs.Setting, "flops", property(lambda self: 10**9 * self.parameters))
    two = plan.variants(["Baseline", "Database"], seeds="1", options=())
    settings = {
        "Baseline": SETTING,
        "Database": replace(SETTING, config=experiments.configuration("Database"), steps=7),
    }
    row = analysis.rows(two, settings, tmp_path)[1]
    assert row.flags[1:] == ("parameters +8.8%", "FLOPs +8.8%", "tokens +16.7%")
    apart = replace(SETTING, text="another text")
    assert not analysis._pair(SETTING, apart)


@pytest.mark.parametrize(
    ("expects", "verdict", "within", "told"),
    [
        ("better", "better", False, "holds"),
        ("better", "better", True, "holds"),
        ("better", "worse", False, "refuted"),
        ("better", "no difference", True, "refuted"),
        ("better", "undecided", False, "undecided here"),
        ("worse", "worse", False, "holds"),
        ("worse", "better", False, "refuted"),
        ("same", "no difference", True, "holds"),
        ("same", "better", True, "holds"),
        ("same", "better", False, "refuted"),
        ("same", "undecided", False, "undecided here"),
        ("not better", "worse", False, "holds"),
        ("not better", "no difference", True, "holds"),
        ("not better", "better", True, "refuted"),
        ("not better", "undecided", False, "undecided here"),
    ],
)
def test_a_verdict_judges_a_claim(expects, verdict, within, told):
    assert claims.Claim("a sentence", expects).judged(verdict, within_margin=within) == told


def test_the_evidence_of_every_claim_is_computed_from_the_published_figures():
    told = {x.name: x.claim.evidence(x.name, x.control) for x in experiments.EXPERIMENTS if x.claim}
    assert told["MoreHeadsLessLayers"] == "-0.024 against Baseline, -1.5% time"
    assert "-0.020 against APEUnitVariance" in told["ReLUGatedLinearUnit"]
    assert all(re.match(r"[+-]0\.\d{3} against Baseline", text) for text in told.values())
    assert {x.claim.expects for x in experiments.EXPERIMENTS if x.claim} <= {"better", "worse", "same", "not better"}


def test_kept_findings_show_in_the_list(stand_in, tmp_path, monkeypatch):
    stand_in("Baseline", "MoreHeadsLessLayers", "--seeds", "3")
    monkeypatch.setattr(claims, "FINDINGS", tmp_path / "out" / "report.json")
    claims.findings.cache_clear()
    try:
        assert re.fullmatch(r"refuted: [+-]0\.\d+ \[.*\], 3 seeds", claims.here("MoreHeadsLessLayers"))
        assert claims.here("Baseline") == "control"
        assert claims.here("QKNorm") == "not run"
    finally:
        claims.findings.cache_clear()


def test_a_grid_without_a_finished_value_is_an_error_and_ties_go_to_the_first(tmp_path):
    (variant,) = plan.variants(["Baseline"], seeds="1", options=())
    points = plan.grid(["a=1,2", "b=3"])
    assert points == [("a=1", "b=3"), ("a=2", "b=3")]
    cells = plan.grid_cells(variant, points, 2, tmp_path)
    with pytest.raises(UsageError, match="finished value of the grid"):
        plan.choose(variant, cells)
    for runs in cells.values():
        for cell in runs:
            cell.run.mkdir(parents=True)
            (cell.run / "summary.json").write_text('{"finished": true, "eval_loss": 5.0}')
    assert plan.choose(variant, cells).chosen == points[0]


def test_an_experiment_of_a_file_is_compared_like_any_other(tmp_path):
    with pytest.raises((UsageError, ConfigError)):
        plan.variants(["nowhere.py:Mine"], seeds="1", options=())
    assert Cell("x/idea.py:Mine", 1, (), Path()).folder.name.startswith("idea-py-Mine-seed1-")


def test_all_is_every_experiment_of_one_budget_with_what_it_is_judged_against():
    found = {v.name: v for v in plan.variants(["all"], seeds="1", options=())}
    assert set(experiments.names()) - set(found) == {"Best"}
    assert all(v.control in found and v.own_control is None for name, v in found.items() if name != "Baseline")
