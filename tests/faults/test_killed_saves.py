"""SIGKILL at a random moment of a save, and disks that fill."""

import itertools
import os
import random
import shutil
import signal
import time

import pytest
import torch
from injecting import fill, free, small_disk

from march.training.checkpoint import Checkpoints, tag_of
from march.training.errors import RunError
from march.training.metrics import Metrics, read

STATE = {"identity": {"seed": 1}}


def tensors(step: int):
    return {part: {"w": torch.full((300, 500), float(step))} for part in ("model", "exp_avg", "exp_avg_sq")}


@pytest.mark.fault("SIGKILL at 100 random moments of saves", "whole, or not there")
def test_a_killed_save_leaves_a_whole_checkpoint_or_none(tmp_path, fault):
    """A child saves one step after another and says when one is done; the parent kills it, reads, starts the next."""
    draw = random.Random(0)
    directory, finished, within = tmp_path / "checkpoints", 0, 0
    Checkpoints(directory, 2).save(0, tensors(0), STATE)
    for _ in range(100):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # no test runs here: saves until it is killed
            try:
                torch.set_num_threads(1)
                checkpoints = Checkpoints(directory, 2)
                for step in range(finished + 1, finished + 1000):
                    checkpoints.save(step, tensors(step), STATE)
                    os.write(writer, step.to_bytes(4, "little"))
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(draw.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as told:
            steps = told.read()
        said = int.from_bytes(steps[-4:], "little") if steps else finished
        within += any(directory.glob(".incomplete-*"))
        loaded = Checkpoints(directory, 2, STATE["identity"]).load()
        assert loaded.step in (said, said + 1)
        assert all(torch.equal(named["w"], tensors(loaded.step)["model"]["w"]) for named in loaded.tensors.values())
        assert "damaged" not in (loaded.warning or "")
        finished = loaded.step
    assert within > 20  # the kills did fall into saves
    fault.happened(f"{within} of 100 kills fell into a save; each time the last one or the next was whole")


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


STEPS_OF_A_SAVE = [(os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (shutil, "rmtree"), (torch, "save")]


@pytest.mark.fault("killed before each operation of a save on the disk", "whole, and `latest` names what is there")
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_a_save_may_end_before_any_of_its_operations(tmp_path, monkeypatch, again, fault):
    """Where SIGKILL falls by chance, here it falls everywhere in turn."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process takes no written page with it
    for survived in itertools.count():
        directory, left = tmp_path / str(survived), [survived]
        checkpoints = Checkpoints(directory, 1 + again)
        for step in (1, 2):
            checkpoints.save(step, tensors(step), STATE)
        asked = 2 if again else 3

        def counted(operation, left=left):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return operation(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for module, name in STEPS_OF_A_SAVE:
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                checkpoints.save(asked, tensors(asked), STATE)
                ended = True
            except Killed:
                ended = False
        fresh = Checkpoints(directory, 1, STATE["identity"])
        loaded = fresh.load()
        assert loaded.step == asked if ended else loaded.step in (asked - 1, asked)
        assert all(torch.equal(named["w"], tensors(loaded.step)["model"]["w"]) for named in loaded.tensors.values())
        if not again:  # else what it names is away for a moment
            assert (directory / (directory / "latest").read_text() / "manifest.json").exists()
        fresh.save(4, tensors(4), STATE)
        assert sorted(os.listdir(directory)) == ["latest", tag_of(4)]
        if ended:
            break
    assert survived > 12
    fault.happened(f"{survived} moments: the one before or the new one, whole, and the next save clears up")


@pytest.mark.fault("disk full at a save", "one line, earlier checkpoints whole")
def test_a_full_disk_keeps_the_last_good_state(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        checkpoints = Checkpoints(disk / "checkpoints", 1)
        checkpoints.save(1, tensors(1), STATE)
        fill(disk)
        for _ in range(2):
            with pytest.raises(RunError, match=r"step 2 could not be written.*earlier checkpoints are intact"):
                checkpoints.save(2, tensors(2), STATE)
            assert checkpoints.load().step == 1
            assert not list((disk / "checkpoints").glob(".incomplete-*2"))
        free(disk)
        checkpoints.save(2, tensors(2), STATE)
        assert checkpoints.tags() == [tag_of(2)]


@pytest.mark.fault("disk full in the middle of a save", "one line, earlier checkpoints whole")
@pytest.mark.parametrize("left", [4, 64, 600, 1200, 1700], ids=lambda kib: f"{kib} KiB left")
def test_a_disk_that_fills_during_a_save(tmp_path, left, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_check_space", lambda *_: None)  # somebody else takes the space meanwhile
    with small_disk(tmp_path / "disk") as disk:
        checkpoints = Checkpoints(disk / "checkpoints", 1)
        checkpoints.save(1, tensors(1), STATE)
        os.truncate(fill(disk), (disk / "filler").stat().st_size - left * 1024)
        with pytest.raises(RunError, match=r"step 2 could not be written.*earlier checkpoints are intact"):
            checkpoints.save(2, tensors(2), STATE)
        assert checkpoints.load().step == 1
        assert checkpoints.load().warning is None


@pytest.mark.fault(
    "disk full at a line of metrics and of TensorBoard", "said once; every row written when there is room"
)
def test_metrics_outlive_a_full_disk(tmp_path, capsys):
    rows = [{"step": step, "loss": 1.0 / step, "note": "x" * 300} for step in range(1, 61)]
    with small_disk(tmp_path / "disk", "1m") as disk:
        metrics = Metrics(disk / "metrics.jsonl", disk / "tensorboard", [])
        for row in rows[:10]:
            metrics.add(row)
        fill(disk)
        for row in rows[10:50]:
            metrics.add(row)
        on_disk = (disk / "metrics.jsonl").read_bytes()
        assert on_disk.endswith(b"\n")  # no half line
        assert len(read(disk / "metrics.jsonl")) >= 10
        free(disk)
        for row in rows[50:]:
            metrics.add(row)
        metrics.close()
        assert read(disk / "metrics.jsonl") == rows
    assert capsys.readouterr().err.count("metrics.jsonl could not be written (") == 1


@pytest.mark.fault("metrics.jsonl removed or replaced under a run", "written anew")
@pytest.mark.parametrize("how", ["removed", "replaced", "its folder gone"])
def test_metrics_outlive_a_tidy_colleague(tmp_path, how):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 7)]
    metrics = Metrics(folder / "metrics.jsonl", folder / "tensorboard", [])
    for row in rows[:3]:
        metrics.add(row)
    if how == "removed":
        (folder / "metrics.jsonl").unlink()
    elif how == "replaced":
        (folder / "other").write_text("{}")
        os.replace(folder / "other", folder / "metrics.jsonl")
    else:
        folder.rename(tmp_path / "away")
    metrics.add(rows[3])
    folder.mkdir(exist_ok=True)
    for row in rows[4:]:
        metrics.add(row)
    metrics.close()
    assert read(folder / "metrics.jsonl") == rows
