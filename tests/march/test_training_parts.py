"""The parts of training that need no engine: checkpoints, budgets, micro-batch, folder, metrics, tables, picture."""

import io
import json
import math
import os
import shutil

import pytest
import torch
from training_support import process_world

from march.experiments.published import PUBLISHED, comparison
from march.recipe import load
from march.training.arguments import NEWEST, build_parser, check
from march.training.checkpoint import Checkpoints, tag_of
from march.training.errors import RunError, UsageError
from march.training.metrics import LiveLine, Metrics, clock, read, short_number
from march.training.microbatch import (
    available_memory,
    choose_micro_batch,
    is_out_of_memory,
    largest_divisor,
    share_of_process,
)
from march.training.plot import plot_curve
from march.training.runfolder import RunFolder, environment, refuse_other_identity

TENSORS = {"model": {"w": torch.arange(600.0).reshape(20, 30)}, "exp_avg": {"w": torch.ones(20, 30)}}


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3, of which two are kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, TENSORS, {"elapsed": step})
    return checkpoints


# Checkpoints


def test_checkpoint_comes_back_and_old_ones_go(saved, tmp_path):
    assert saved.tags() == [tag_of(2), tag_of(3)]
    loaded = saved.load()
    assert (loaded.step, loaded.warning, loaded.state["elapsed"]) == (3, None, 3)
    assert torch.equal(loaded.tensors["model"]["w"], TENSORS["model"]["w"])
    assert loaded.tensors.keys() == TENSORS.keys()
    with pytest.raises(UsageError, match="got none; start without --resume"):
        Checkpoints(tmp_path / "empty", keep=1).load()


@pytest.mark.parametrize("tag", ["../outside", "step-1", "latest", "/etc", "step-00000003/../x"])
def test_tags_are_names_of_checkpoints_and_nothing_else(saved, tag):
    with pytest.raises(UsageError, match="expected a checkpoint such as"):
        saved.load(tag)


@pytest.mark.parametrize("moment", ["before", "while writing", "at the rename"])
def test_full_disk_is_a_clean_error_and_the_previous_checkpoint_intact(saved, monkeypatch, moment):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "before":
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    elif moment == "while writing":
        real, calls = torch.save, []

        def fill_up(tensors, file):
            calls.append(1)
            if len(calls) > 1:
                file.write(b"half")
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device")
            real(tensors, file)

        monkeypatch.setattr(torch, "save", fill_up)
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"step 4 could not be written.*earlier checkpoints are intact"):
        saved.save(4, TENSORS, {})
    monkeypatch.undo()
    assert saved.load().step == 3
    assert saved.load().warning is None
    assert not list(saved.directory.glob(".incomplete-*4"))


# Recipes and the command line


def test_the_paper_recipe_is_the_published_one():
    paper = load("paper")
    assert (paper.schedule.steps, paper.schedule.name, paper.schedule.warmup) == (1000, "constant", 0)
    assert (paper.batch.sequences, paper.batch.sequence_length, paper.batch.tokens) == (1024, 1024, 1_048_576)
    optimizer = paper.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (1e-4, 0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.decay, optimizer.gradient_clipping, paper.seed) == (0.1, "all", 1.0, 42)
    assert (paper.evaluation.every, paper.evaluation.sequences, paper.data.vocab_size) == (20, 1000, 30_000)
    assert paper.comparable
    assert not load("demo").comparable


def request(*argv, cuda=False):
    return check(build_parser().parse_args(list(argv)), cuda=cuda)


def test_default_recipe_follows_the_device_and_precision_the_recipe_or_experiment():
    assert request().name == "demo"
    # on a CPU the demo's precision is open until it is measured, unless somebody or the experiment decides
    assert request().precision == "fastest"
    assert "fastest" not in [request(*own).precision for own in (["--precision", "bf16"], ["--exp", "BaselineFP32"])]
    assert request("--exp", "BaselineFP32").precision == "fp32"
    assert request("--recipe", "demo", cuda=True).precision == "bf16"
    assert request(cuda=True).name == "paper"
    assert request(cuda=True).precision == "bf16"
    assert request("--exp", "BaselineFP32", cuda=True).precision == "fp32"
    assert request("--precision", "bf16").config.precision == "bf16"
    assert request("--set", "precision=bf16").precision == "bf16"
    with pytest.raises(UsageError, match="expected one precision"):
        request("--precision", "fp32", "--set", "precision=bf16")


def test_only_the_recipe_itself_is_comparable():
    assert request("--recipe", "paper").comparable
    assert request("--recipe", "paper", "--seed", "7").comparable
    for change in (["--set", "dropout=0"], ["--precision", "fp32"], ["--steps", "5"], ["--source", "excerpt"]):
        assert not request("--recipe", "paper", *change).comparable
    assert not request("--recipe", "demo").comparable


def test_launcher_arguments_are_accepted_and_resume_fills_what_was_not_given():
    given = build_parser().parse_args(["--local_rank=1", "--resume", "--steps", "9"])
    assert given.resume is NEWEST
    run = request("--exp", "Database", "--steps", "4", "--set", "dropout=0.2", "--recipe", "demo")
    again = check(given, cuda=True, run=run.model_dump(exclude_none=True))
    assert (again.entry.name, again.schedule.steps, again.model) == ("Database", 9, {"dropout": 0.2})
    assert again.name == "demo"


# The micro-batch


def test_divisors_and_shares():
    assert [largest_divisor(128, limit) for limit in (0, 1, 5, 100, 500)] == [1, 1, 4, 64, 128]
    assert largest_divisor(125, 64) == 25
    assert share_of_process(1024, 8) == 128
    with pytest.raises(UsageError, match="divides the global batch of 1024, got 3; start 2"):
        share_of_process(1024, 3)


def test_micro_batch_is_halved_until_it_fits_and_says_so():
    tried, said = [], []

    def attempt(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert choose_micro_batch(attempt, 16, 16, process_world(), said.append) == 2
    assert tried == [16, 8, 4, 2]
    assert said[0].startswith("micro-batch 16 does not fit into memory: trying 8 (same global batch")
    with pytest.raises(RunError, match="out of memory with one sequence"):
        choose_micro_batch(lambda size: attempt(99), 16, 2, process_world(), said.append)


def test_other_errors_are_not_taken_for_memory():
    def broken(size):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        choose_micro_batch(broken, 16, 16, process_world(), print)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert 0 < available_memory(process_world()) < 2**50


# The folder, metrics, table, picture


def test_run_folder_never_mixes_two_runs(tmp_path):
    first = RunFolder.create(tmp_path, "Baseline", "demo", 42, None)
    second = RunFolder.create(tmp_path, "Baseline", "demo", 42, None)
    assert first.path != second.path
    assert first.path.name.startswith("Baseline-demo-20")
    first.write("config.json", {"experiment": "Baseline", "recipe": {"name": "demo"}, "started": "2026-01-01"})
    second.write("config.json", {"experiment": "Database", "recipe": {"name": "demo"}, "started": "2026-01-02"})
    with pytest.raises(UsageError, match="is running; wait for its end"):
        RunFolder.newest(tmp_path, None, None)
    first.unlock()
    second.unlock()
    for asked, expected in (((None, None), second), (("Baseline", "demo"), first)):
        found = RunFolder.newest(tmp_path, *asked)
        assert found.path == expected.path
        found.unlock()
    with pytest.raises(UsageError, match="got none"):
        RunFolder.newest(tmp_path, "Baseline", "paper")
    with pytest.raises(UsageError, match="which holds a run"):
        RunFolder.create(tmp_path, "Baseline", "demo", 42, first.path)


def test_identity_names_every_difference():
    stored = {"seed": 42, "config": {"num_heads": [8, 4], "dropout": 0.1}}
    refuse_other_identity(json.loads(json.dumps(stored)), {"seed": 42, "config": {"num_heads": (8, 4), "dropout": 0.1}})
    with pytest.raises(UsageError, match=r"config.dropout: the run has 0.1, asked 0.2; seed: the run has 42, asked 1"):
        refuse_other_identity(stored, {"seed": 1, "config": {"num_heads": (8, 4), "dropout": 0.2}})


def test_environment_says_where_and_with_what():
    entry = environment(process_world(), parameters=5)
    assert entry["versions"]["torch"] == torch.__version__
    assert entry["parameters"] == 5
    assert {"commit", "uncommitted_changes", "device", "processes", "command"} <= entry.keys()


def test_metrics_of_steps_that_run_again_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    stale = {"step": 2, "loss": 9.0}  # of a start that was killed: what came later holds
    file.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], stale, *rows[1:])) + '{"step": 4, "lo')
    assert read(file) == rows
    metrics = Metrics(file, tmp_path / "tensorboard", read(file)[:2])
    metrics.add({"step": 3, "loss": 30.0, "grad_norm": None})
    metrics.close()
    assert [row["loss"] for row in read(file)] == [1.0, 2.0, 30.0]


def test_live_line_is_rewritten_on_a_terminal_and_plain_elsewhere():
    row = {"step": 2, "loss": 5.25, "tokens_per_second": 1_234_567.0}

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (Terminal(), io.StringIO()):
        line = LiveLine(2, 0, enabled=True, stream=stream)
        line.show({**row, "step": 1}, None, None, 61.0)
        line.show(row, 5.5, 0.43, 0.0)
        line.close()
        text = stream.getvalue()
        assert "loss 5.2500 | eval 5.5000 | 1.23M tokens/s | 43% of peak" in text
        assert ("\r" in text) is stream.isatty()
    silent = io.StringIO()
    LiveLine(2, 0, enabled=False, stream=silent).show(row, None, None, 0.0)
    assert silent.getvalue() == ""
    assert (short_number(950.0), clock(3661), clock(59.6)) == ("950", "1:01:01", "1:00")


def test_published_table_stands_beside_ours():
    assert len(PUBLISHED) == 25
    text = comparison("ReLUGatedLinearUnit", "APEUnitVariance", 5.80, 5.7917)
    assert "5.7696" in text
    assert "+0.0000" in text
    assert "ReLUGatedLinearUnit - APEUnitVariance: -0.0200 (decided)" in text
    assert "undecided" in comparison("MoreHeadsLessQKVDim", "Baseline", 5.8, 5.8)
    assert "no published run" in comparison("Best", "Baseline", 5.0, 5.0)


def test_picture_has_both_curves_and_both_levels(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}

    def keep(figure, path):
        (axes,) = figure.axes
        drawn["lines"] = {line.get_label(): line.get_ydata() for line in axes.lines}
        drawn["text"] = " ".join(text.get_text() for text in axes.texts) + axes.get_title(loc="left")
        original(figure, path)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    rows = [
        {"step": step, "loss": 14.0 / step, "eval_loss": 14.1 / step if step % 5 == 0 else None}
        for step in range(1, 21)
    ]
    plot_curve(rows, tmp_path / "curve.png", title="Baseline", subtitle="demo", vocab_size=4096, unigram_entropy=6.1)
    assert list(drawn["lines"]["train"]) == [row["loss"] for row in rows]
    assert len(drawn["lines"]["eval"]) == 4
    levels = [float(y[0]) for label, y in drawn["lines"].items() if label not in ("train", "eval")]
    assert levels == pytest.approx([math.log(4096), 6.1])
    assert "ln V\n8.32" in drawn["text"]
    assert "unigram entropy\nof the labels\n6.10" in drawn["text"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
