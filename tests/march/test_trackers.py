"""Trackers beside metrics.jsonl: each gets every step once, over resumes too, and one that fails ends no run."""

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from test_training_runs import LAUNCHER, free_port
from training_support import ROOT, run_command, small_overrides, write_corpus

from march.console import UsageError
from march.training import arguments, trackers
from march.training.metrics import Metrics, read
from march.training.trackers import About

RUN = {
    "experiment": "Baseline",
    "seed": 7,
    "started": "2026-01-01T00:00:00",
    "recipe": {"optimizer": {"lr": 1e-3}, "logging": {"curve": True}},
    "config": {"num_heads": [8, 4], "dropout": 0.1},
}
ABOUT = About.of(RUN)
NAMES = sorted(trackers.TRACKERS)


def row(step):
    return {"step": step, "loss": 9.0 / step, "grad_norm": None, **({"eval_loss": 8.0 / step} if step % 2 == 0 else {})}


class Package:
    """wandb and trackio, as far as they are used; `fails` names the calls that raise `error`, `has` the last step that
    the run had on their server."""

    def __init__(self, fails=(), error=RuntimeError, has=0):
        self.calls, self.fails, self.error = [], fails, error
        self.step = self._next_step = has + 1 if has else 0
        self.summary = SimpleNamespace(update=lambda final: self.call("summary", final))

    def call(self, name, *told):
        self.calls.append((name, *told))
        if name in self.fails:
            raise self.error(f"{name}: no network\nand more")

    def init(self, **told):
        self.call("init", told)
        return self

    def log(self, values, step):
        self.call("log", step, values)

    def finish(self, **told):
        self.call("finish", told)

    def steps(self):
        return [step for name, step, values in (c for c in self.calls if c[0] == "log") if "train/loss" in values]


@pytest.fixture(params=NAMES)
def tracker(request, monkeypatch):
    """Its name and a function that puts a stand-in in the package's place."""

    def put(**how):
        package = Package(**how)
        monkeypatch.setitem(sys.modules, request.param, package)
        return package

    return request.param, put


def write(folder, steps, *, before=0, to=(), end=None):
    """Metrics of `steps`, of a run whose first `before` are in a checkpoint."""
    metrics = Metrics(folder / "metrics.jsonl", folder / "board", [row(s) for s in range(1, before + 1)], ABOUT, to)
    for step in steps:
        metrics.add(row(step))
    metrics.close()
    if end:
        metrics.end(end)


FINISHED = {"finished": True, "mean_last_losses": 3.5, "eval_loss": 3.25, "test_loss": 3.0}


def test_a_run_is_told_whole_and_its_end_once(tmp_path, tracker):
    name, put = tracker
    package = put()
    write(tmp_path, [1, 2, 3], to=[name], end=FINISHED)
    (begin, told), *middle, (end, *_) = package.calls
    assert (begin, end, package.steps()) == ("init", "finish", [1, 2, 3])
    assert told["name"] == ABOUT.name
    assert told["resume"] == "allow"
    assert told["config"] == {
        "optimizer.lr": 1e-3,
        "logging.curve": True,
        "config.num_heads": "[8, 4]",
        "config.dropout": 0.1,
    }
    assert ("log", 2, {"train/loss": 4.5, "eval/loss": 4.0}) in middle
    final = {"final/loss": 3.5, "final/eval_loss": 3.25, "final/test_loss": 3.0}
    assert middle[-1][-1] == final


@pytest.mark.parametrize(
    ("before", "has", "steps"),
    [(2, 4, [5, 6]), (2, 2, [3, 4, 5, 6]), (2, 0, [1, 2, 3, 4, 5, 6]), (0, 1, [2, 3, 4, 5, 6])],
)
def test_a_resumed_run_sends_what_its_tracker_lacks(tmp_path, tracker, before, has, steps):
    name, put = tracker
    package = put(has=has)
    write(tmp_path, range(before + 1, 7), before=before, to=[name])
    assert package.steps() == steps


def test_a_run_has_one_name_over_its_starts_and_another_run_another():
    names = {About.of({**RUN, **change}).name for change in ({}, {"config": {}}, {"seed": 8}, {"started": "later"})}
    assert len(names) == 3
    assert all(name.replace("-", "").isalnum() for name in names)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, OSError])
@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path, tracker, capsys, fails, error):
    name, put = tracker
    package = put(fails={fails}, error=error)
    write(tmp_path, [1, 2, 3], to=[name], end=FINISHED)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"WARNING: {name} could not be written ({fails}: no network): training goes on without" in said
    assert [call[0] for call in package.calls].count(fails) == 1
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(board(tmp_path).Scalars("train/loss")) == 3  # the others go on


def test_an_evaluation_that_is_made_up_for_reaches_the_trackers(tmp_path, tracker):
    name, put = tracker
    package = put(has=1)
    metrics = Metrics(tmp_path / "m.jsonl", tmp_path / "board", [row(1)], ABOUT, [name])
    metrics.replace([{**row(1), "eval_loss": 4.0}])
    assert package.calls[-1] == ("log", 1, {"eval/loss": 4.0})
    assert [event.value for event in board(tmp_path).Scalars("eval/loss")] == [4.0]


def board(folder):
    found = EventAccumulator(str(folder / "board"))
    found.Reload()
    return found


def test_tensorboard_has_the_settings_and_the_final_losses_of_a_run_and_its_resumes(tmp_path):
    write(tmp_path, [1, 2, 3], end={"finished": False, "eval_loss": 4.0})
    write(tmp_path, [3, 4], before=2, end=FINISHED)
    found = board(tmp_path)
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [(event.step, event.value) for event in found.Scalars("final/test_loss")] == [(4, 3.0)]
    told = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in found.PluginTagToContent(metadata.PLUGIN_NAME).items()
    }
    assert {info.name for info in told[metadata.EXPERIMENT_TAG].experiment.hparam_infos} == set(ABOUT.settings)
    metrics = told[metadata.EXPERIMENT_TAG].experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"final/loss", "final/eval_loss", "final/test_loss"}
    start = told[metadata.SESSION_START_INFO_TAG].session_start_info
    assert start.hparams["optimizer.lr"].number_value == 1e-3
    assert start.hparams["config.num_heads"].string_value == "[8, 4]"
    assert told[metadata.SESSION_END_INFO_TAG].session_end_info.status == 1  # success: of the end that was one


def test_a_missing_package_is_one_line_before_the_run_and_none_is_imported_unasked(monkeypatch, tmp_path):
    parse = arguments.build_parser().parse_args
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()  # what an offline run leaves: no package
        with pytest.raises(UsageError, match=rf"expected the package {name} for logging.trackers, got none; pip"):
            arguments.check(parse(["--set", f"logging.trackers={name}"]), cuda=False)
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    recipe = arguments.check(parse(["--set", "logging.trackers=wandb,trackio"]), cuda=False)
    assert recipe.logging.trackers == ("wandb", "trackio")
    again = arguments.check(parse(["--set", "logging.trackers=none"]), cuda=False, run=recipe.model_dump(mode="json"))
    assert again.logging.trackers is None
    with pytest.raises(UsageError, match=r"expected 'wandb' or 'trackio', got 'wandb,mlflow'"):
        arguments.check(parse(["--set", "logging.trackers=wandb,mlflow"]), cuda=False)
    assert not set(NAMES) & sys.modules.keys()


STAND_IN = """
import json, os, types
PATH = os.environ["TOLD"]
def tell(*what):
    with open(PATH, "a") as file:
        print(json.dumps(what), file=file)
def logged():
    return [w[1] for w in map(json.loads, open(PATH)) if w[0] == "log"] if os.path.exists(PATH) else []
def init(**told):
    tell("init", told.get("id", told["name"]))
    log = lambda values, step: tell("log", step, "train/loss" in values)
    last = max(logged(), default=-1) + 1
    finish = lambda **told: tell("finish")
    summary = types.SimpleNamespace(update=lambda final: tell("summary", sorted(final)))
    return types.SimpleNamespace(log=log, finish=finish, summary=summary, step=last, _next_step=last)
"""


@pytest.mark.slow
def test_one_process_of_two_tells_the_trackers_and_a_resumed_run_goes_on_there(tmp_path):
    (tmp_path / "wandb.py").write_text(STAND_IN)
    told = tmp_path / "told.jsonl"
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "TOLD": str(told)}
    options = ["--source", "files", "--files", str(write_corpus(tmp_path / "text.jsonl")), "--vocab-size", "400"]
    options += ["--precision", "fp32", "--steps", "2", "--set", "logging.trackers=wandb", *small_overrides()]
    for words in ([*options, "--run-dir", "run"], ["--resume", "run", "--steps", "3"]):
        launcher = (*LAUNCHER, "--num_gpus", "2", "--master_port", free_port())
        done = run_command(words, launcher=launcher, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
    (begin, name), *rest = map(json.loads, told.read_text().splitlines())
    end = [["summary", ["final/eval_loss", "final/loss", "final/test_loss"]], ["finish"]]
    assert rest == [["log", 1, True], ["log", 2, True], *end, [begin, name], ["log", 3, True], *end]
