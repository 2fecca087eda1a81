"""`march runs`: whatever lies in the folders is a row or is passed over; filters, order, and the forms of output."""

import io
import json

import pandas as pd
import pytest

from march.compare import runs
from march.compare.cell import lock


def write_run(folder, experiment, seed, *, rows=0, **summary):
    folder.mkdir(parents=True)
    recipe = {"name": "demo"}
    config = {
        "experiment": experiment,
        "seed": seed,
        "control": "Baseline",
        "recipe": recipe,
        "started": f"2026-01-0{seed}",
    }
    config["difference"] = {"in_this_run": {"dropout": [0.1, 0.2]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"starts": [{"parameters": 10, "device": "a CPU"}]}))
    lines = [{"step": s, "loss": 9.0 / s, "eval_loss": 9.5 / s} for s in range(1, rows + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def root(tmp_path):
    write_run(tmp_path / "c", "QKNorm", 3, finished=True, steps=3, eval_loss=4.0, test_loss=4.1, mean_last_losses=4.2)
    write_run(tmp_path / "deep/er/run", "Baseline", 1, finished=True, steps=3, eval_loss=5.0, test_loss=5.1)
    write_run(tmp_path / "b", "Baseline", 2, failed="the disk is full", steps=2)
    write_run(tmp_path / "killed", "Baseline", 4, rows=2)
    write_run(tmp_path / "odd", "Baseline", 5, steps="?", eval_loss="x", test_loss=float("nan"), finished=True)
    for name, text in (("none", "{}"), ("list", "[]"), ("cut", '{"experiment": "Ba'), ("link", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    return tmp_path


def table(capsys, *words):
    assert runs.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_at_any_depth_are_rows_by_start_and_nothing_else_is(root, capsys):
    found = table(capsys, root, root / "c")  # a folder named twice counts once
    assert [(row["experiment"], row["seed"], row["status"]) for row in found] == [
        ("Baseline", 1, "finished"),
        ("Baseline", 2, "failed"),
        ("QKNorm", 3, "finished"),
        ("Baseline", 4, "interrupted"),
        ("Baseline", 5, "finished"),
    ]
    assert found[3]["eval_loss"] == 4.75  # of a run that was killed: its last line
    assert found[4]["eval_loss"] is found[4]["test_loss"] is None
    assert found[2]["changes"] == "dropout 0.2"
    assert found[2]["parameters"] == 10


def test_a_run_that_is_running_says_so(root, capsys):
    with lock(root / "killed/.lock"):
        assert table(capsys, root, "--filter", "seed=4")[0]["status"] == "running"


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        (["--filter", "experiment=baseline"], [1, 2, 4, 5]),
        (["--filter", "experiment!=Baseline"], [3]),
        (["--filter", "test_loss<5"], [3]),
        (["--filter", "test_loss>=4.1", "--filter", "status=finished"], [1, 3]),
        (["--filter", "seed>1", "--filter", "seed<=3"], [2, 3]),
        (["--sort", "test_loss"], [3, 1, 2, 4, 5]),
        (["--sort", "seed:desc"], [5, 4, 3, 2, 1]),
        (["--filter", "seed=99"], []),
    ],
)
def test_filters_and_order(root, capsys, words, seeds):
    assert [row["seed"] for row in table(capsys, root, *words)] == seeds


def test_forms_of_output(root, capsys):
    assert runs.main([str(root), "--csv"]) == 0
    csv = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(csv.columns) == list(runs.FIELDS)
    assert len(csv) == 5
    assert runs.main([str(root), "--fields", "seed,test_loss", "--sort", "test_loss:desc"]) == 0
    assert capsys.readouterr().out.split()[:4] == ["seed", "test_loss", "1", "5.1000"]
    assert runs.main([str(root / "none")]) == 0


def test_curves_are_drawn_with_published_ones(root, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "Baseline.csv").write_text("step,loss\n1,9\n2,5\n")
    assert runs.main([str(root), "--plot", str(tmp_path / "a.png"), "--published", str(theirs), "--csv"]) == 0
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_picture_that_cannot_be_written_is_one_line(root, tmp_path, capsys):
    assert runs.main([str(root), "--plot", str(tmp_path / "no/a.png")]) == 2
    error = capsys.readouterr().err
    assert "write the picture" in error
    assert error.count("\n") == 1
