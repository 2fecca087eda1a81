"""Every way in which a checkpoint on the disk can be wrong: it is named and skipped, the older whole one is taken, and
the next save neither counts it nor touches a good one for it."""

import json
import os
import pickle
import shutil

import pytest
import torch
from injecting import edit_json, flip, rehash

from march.training.checkpoint import Checkpoints, tag_of
from march.training.errors import RunError, UsageError

IDENTITY = {"experiment": "Baseline", "config": {"activation": "relu", "num_heads": [4, 2]}, "budget": {"seed": 42}}
PARTS = ("model", "exp_avg", "exp_avg_sq")


def tensors(value: float = 1.0):
    return {part: {"w": torch.full((20, 30), value), "b": torch.arange(30.0)} for part in PARTS}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def other_identity(**changes):
    return lambda c: (edit_json(c / "state.json", identity={**IDENTITY, **changes}), rehash(c))


def replace_tensors(content):
    return lambda c: (torch.save(content, c / "model.pt"), rehash(c))


def manifest(text):
    return lambda c: (c / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def state(text):
    return lambda c: ((c / "state.json").write_bytes(text), rehash(c))


def to_link(name):
    def link(checkpoint):
        target = checkpoint / name if name else checkpoint
        elsewhere = checkpoint.parents[1] / "elsewhere"
        shutil.move(target, elsewhere)
        target.symlink_to(elsewhere)

    return link


def manifest_names(name):
    def add(checkpoint):
        content = json.loads((checkpoint / "manifest.json").read_text())
        content["files"][name] = {"bytes": 1, "sha256": "0"}
        (checkpoint / "manifest.json").write_text(json.dumps(content))

    return add


def to_fifo(checkpoint):
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")


def to_file(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.write_text("no folder")


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def half(name):
    return lambda c: os.truncate(c / name, (c / name).stat().st_size // 2)


DAMAGE = {
    "flipped bytes in model.pt": lambda c: flip(c / "model.pt"),
    "one flipped bit in exp_avg.pt": lambda c: flip(c / "exp_avg.pt", 1),
    "flipped bytes in state.json": lambda c: flip(c / "state.json", 4),
    "exp_avg_sq.pt cut in half": half("exp_avg_sq.pt"),
    "model.pt of no bytes": lambda c: (c / "model.pt").write_bytes(b""),
    "model.pt gone": lambda c: (c / "model.pt").unlink(),
    "state.json gone": lambda c: (c / "state.json").unlink(),
    "manifest.json gone": lambda c: (c / "manifest.json").unlink(),
    "manifest.json cut in half": half("manifest.json"),
    "manifest.json of no bytes": manifest(""),
    "manifest.json is a list": manifest("[]"),
    "manifest.json without its format": manifest('{"files": {}}'),
    "manifest.json of another format": manifest('{"format": 99, "files": {"state.json": {}}}'),
    "manifest.json with entries that are numbers": manifest('{"format": 2, "files": {"state.json": 3}}'),
    "manifest.json nested 100,000 deep": manifest("[" * 100_000),
    "manifest.json not UTF-8": manifest(b'{"format": "\xff\xfe"}'),
    "manifest.json is a pipe": to_fifo,
    "manifest.json names ../../secret.pt": manifest_names("../../secret.pt"),
    "manifest.json names /etc/passwd": manifest_names("/etc/passwd"),
    "state.json of a step that is no number": lambda c: (edit_json(c / "state.json", step="many"), rehash(c)),
    "state.json of another step": lambda c: (edit_json(c / "state.json", step=2), rehash(c)),
    "state.json of no bytes": state(b""),
    "state.json is no JSON": state(b"step: 3"),
    "state.json is a list": state(b"[3]"),
    "model.pt is a list": replace_tensors([torch.ones(3)]),
    "model.pt holds numbers": replace_tensors({"w": 3}),
    "model.pt is no file of torch": lambda c: ((c / "model.pt").write_bytes(b"PK\x03\x04" + bytes(99)), rehash(c)),
    "model.pt is a malicious pickle": lambda c: ((c / "model.pt").write_bytes(pickle.dumps(Evil())), rehash(c)),
    "NaN in the weights": replace_tensors({"w": torch.full((20, 30), float("nan"))}),
    "infinity in a weight": replace_tensors({"w": torch.tensor([1.0, float("inf")])}),
    "of another seed": other_identity(budget={"seed": 1}),
    "of another activation": other_identity(config={"activation": "gelu", "num_heads": [4, 2]}),
    "of another experiment": other_identity(experiment="Database"),
    "of a run that says nothing of itself": lambda c: (edit_json(c / "state.json", identity=None), rehash(c)),
    "the folder is a symbolic link": to_link(""),
    "model.pt is a symbolic link": to_link("model.pt"),
    "a file in place of the folder": to_file,
    "an empty folder": empty,
}


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, IDENTITY)
    for step in (2, 3):
        checkpoints.save(step, tensors(step), {"identity": IDENTITY})
    return checkpoints


@pytest.mark.fault("newest checkpoint")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_checkpoint_is_skipped_and_counts_for_nothing(saved, damage, fault, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    DAMAGE[damage](saved.directory / tag_of(3))
    again = Checkpoints(saved.directory, 1, IDENTITY)
    loaded = again.load()
    assert loaded.step == 2
    assert loaded.warning is not None
    assert tag_of(3) in loaded.warning
    assert torch.equal(loaded.tensors["model"]["w"], tensors(2.0)["model"]["w"])
    again.resumed = tag_of(2)
    again.save(4, tensors(4.0), {"identity": IDENTITY})
    assert {tag_of(2), tag_of(4)} <= set(again.tags())
    # keep 1, in a process that resumed nothing: the newest whole one stays, the damaged one is not ours to remove
    fresh = Checkpoints(saved.directory, 1, IDENTITY)
    fresh.save(5, tensors(5.0), {"identity": IDENTITY})
    assert fresh.load().step == 5
    assert tag_of(3) in fresh.tags()
    assert not (tmp_path / "executed").exists()
    fault.happened(f"skipped: {loaded.warning.split(': continuing')[0].removeprefix(f'{tag_of(3)}: ')}")


@pytest.mark.fault("a wrong checkpoint of a later step than is saved next")
@pytest.mark.parametrize("damage", ["flipped bytes in model.pt", "of another seed", "an empty folder"])
def test_a_later_wrong_checkpoint_never_displaces_what_is_written(tmp_path, damage, fault):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, IDENTITY)
    checkpoints.save(4, tensors(), {"identity": IDENTITY})
    checkpoints.save(8, tensors(), {"identity": IDENTITY}, prune=False)
    DAMAGE[damage](checkpoints.directory / tag_of(8))
    again = Checkpoints(checkpoints.directory, 1, IDENTITY)
    assert again.load().step == 4
    again.resumed = tag_of(4)
    again.save(6, tensors(6.0), {"identity": IDENTITY})
    assert again.tags() == [tag_of(4), tag_of(6), tag_of(8)]
    assert Checkpoints(checkpoints.directory, 1, IDENTITY).load().step == 6
    again.save(8, tensors(8.0), {"identity": IDENTITY})  # its own step: the wrong one makes room and is kept
    assert Checkpoints(checkpoints.directory, 1, IDENTITY).load().step == 8
    assert (checkpoints.directory / f"aside-{tag_of(8)}-1").exists()
    fault.happened("the resumed one and the new one stay")


LATEST = {
    "gone": lambda file: file.unlink(),
    "names what is not there": lambda file: file.write_text("step-00000009"),
    "names ../outside": lambda file: file.write_text("../outside"),
    "of no bytes": lambda file: file.write_text(""),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a dangling link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "an older one": lambda file: file.write_text(tag_of(2)),
}


@pytest.mark.fault("latest")
@pytest.mark.parametrize("how", LATEST)
@pytest.mark.parametrize("known", [True, False], ids=["", "config.json gone too"])
def test_a_wrong_pointer_leads_to_the_newest_whole_one(saved, how, known, fault):
    LATEST[how](saved.directory / "latest")
    loaded = Checkpoints(saved.directory, 2, IDENTITY if known else None).load()
    assert loaded.step == 3
    assert "`latest`" in loaded.warning
    fault.happened(loaded.warning)


@pytest.mark.fault("checkpoints/ is a symbolic link", "refused in one line")
def test_a_linked_folder_is_refused(saved, tmp_path):
    saved.directory.rename(tmp_path / "outside")
    saved.directory.symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="got a symbolic link"):
        saved.load()
    with pytest.raises(UsageError, match="got a symbolic link"):
        saved.save(4, tensors(), {"identity": IDENTITY})


@pytest.mark.fault("a foreign checkpoint and no other whole one", "refused in one line that names the field")
def test_a_foreign_checkpoint_alone_is_refused(saved):
    flip(saved.directory / tag_of(2) / "model.pt")
    DAMAGE["of another seed"](saved.directory / tag_of(3))
    with pytest.raises(UsageError, match=r"got only another run's or damaged ones.*budget\.seed is 1 there, 42 here"):
        saved.load()


@pytest.mark.fault("not finite at a save")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nothing_that_is_not_finite_is_saved(saved, part, value, fault):
    wrong = tensors()
    wrong[part]["b"][7] = value
    with pytest.raises(RunError, match=rf"{part} of b is not finite after step 4: not saved"):
        saved.save(4, wrong, {"identity": IDENTITY})
    assert saved.tags() == [tag_of(2), tag_of(3)]
    assert saved.load().warning is None
    fault.happened("not saved, said by name; the older ones stay")
