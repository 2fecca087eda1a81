"""The tuner's logic with a fake timer: what it replaces, refuses and writes. No speed is measured here."""

import json
from dataclasses import asdict

import pytest
import torch

from kernels import tune
from kernels.fused import measured, tiles_attention, tiles_glu, tiles_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "DIRECTORY", tmp_path / "measured")
    measured.forget()
    yield
    measured.forget()


def _entry(alternatives=({"n": 1}, {"n": 2}, {"n": 3})):
    return tune.Entry(
        "rows.stream", "residual_norm", torch.float32, lambda arch: {"n": 1}, alternatives, lambda d: None
    )


def _choose(times, entry=None):
    def measure(fields):
        ms = times[fields["n"]]
        return tune.Measurement(fields, ms if isinstance(ms, float) else None, "" if isinstance(ms, float) else ms)

    return tune.choose(entry or _entry(), "sm_86", measure)


def test_the_fastest_wins():
    choice = _choose({1: 2.0, 2: 1.5, 3: 1.0})
    assert choice.changed
    assert choice.best.tile == {"n": 3}
    assert len(choice.measured) == 3


def test_noise_changes_nothing():
    assert not _choose({1: 1.0, 2: 0.99, 3: 1.3}).changed


def test_what_does_not_fit_is_left_out():
    choice = _choose({1: 1.0, 2: "OutOfResources: shared memory", 3: 0.8})
    assert choice.best.tile == {"n": 3}
    assert "OutOfResources" in tune.line(choice)


def test_a_committed_tile_that_does_not_fit_is_replaced_by_any_that_does():
    assert _choose({1: "OutOfResources", 2: 9.0, 3: 8.0}).best.tile == {"n": 3}


def test_nothing_that_runs_changes_nothing():
    choice = _choose(dict.fromkeys((1, 2, 3), "no"))
    assert not choice.changed
    assert choice.best.milliseconds is None


def test_the_table_is_written_and_read(tmp_path):
    path = measured.DIRECTORY / "sm_86.json"
    tile = tiles_rows.ProductTile(32, 64, 16, 2, 2)
    before = tune.Measurement({"elements": 8}, 1.0)
    changed = tune.Choice("rows.stream", before, tune.Measurement({"elements": 16}, 0.5), ())
    other = tune.Choice("linear_cross_entropy.forward.16", before, tune.Measurement(asdict(tile), 0.5), ())
    failed = tune.Choice("linear_cross_entropy.dlogits.16", before, tune.Measurement({}, None, "no"), ())
    tune.write(path, "a device", [changed])
    tune.write(path, "a device", [other, failed])
    measured.forget()
    entries = json.loads(path.read_text())["entries"]
    assert set(entries) == {"rows.stream", "linear_cross_entropy.forward.16"}
    assert entries["rows.stream"]["device"] == "a device"
    assert tiles_rows.row_tile("sm_86", "stream", 512).rows == 2 * tiles_rows.row_tile("sm_80", "stream", 512).rows
    assert tiles_rows.product_tile("sm_86", "forward", 16) == tile
    assert tiles_rows.product_tile("sm_80", "forward", 16) != tile
    assert [p.name for p in path.parent.iterdir()] == ["sm_86.json"]


def test_trying_holds_within_only():
    with measured.trying("rows.stream", {"elements": 32}):
        assert tiles_rows.row_tile("sm_86", "stream", 512).rows == 8
    assert tiles_rows.row_tile("sm_86", "stream", 512).rows == 2


def test_a_tile_is_compared_before_it_is_timed(monkeypatch):
    """The tile that is tried reaches the launch, and a disagreement has no time."""
    entry = _entry()
    timed = []

    def timer(run):
        timed.append(1)
        return 1.0

    seen = []
    true = tiles_rows.row_tile
    monkeypatch.setattr(tiles_rows, "row_tile", lambda *a: seen.append(true(*a).rows) or true(*a))
    assert tune.measure(entry, {"elements": 4}, CPU, timer).milliseconds == 1.0
    assert set(seen) == {true("sm_80", "stream", 96).rows // 2}
    monkeypatch.setattr(tune.startup, "disagreements", lambda *a, **k: ["output 0: error 1"])
    refused = tune.measure(entry, {"elements": 4}, CPU, timer)
    assert refused.milliseconds is None
    assert "disagrees" in refused.problem
    assert len(timed) == 1


def test_every_entry_has_its_committed_tile_and_valid_alternatives():
    for entry in tune.entries():
        assert entry.committed("sm_86")
        assert len(entry.alternatives) >= 3
        assert all(set(fields) == set(entry.committed("sm_86")) for fields in entry.alternatives)


def test_what_is_tuned_is_what_a_launch_reads():
    """Each name is one that its table looks up, at the width or kind that it names."""
    lookups = {
        "attention": lambda e: tiles_attention.tile(e[1], "sm_86", int(e[2]), int(e[2]), False, e[3] == "dropout", 16),
        "glu": lambda e: tiles_glu.product_tile("sm_86", e[1] == "pair", int(e[2])),
    }
    names = [entry.name for entry in tune.entries() if entry.operator in lookups]
    assert len(names) == 11
    for name in names:
        parts = name.split(".")
        before = lookups[parts[0]](parts)
        changed = asdict(before) | {"warps": 16}
        with measured.trying(name, changed):
            assert asdict(lookups[parts[0]](parts)) == changed
        assert lookups[parts[0]](parts) == before


@pytest.mark.parametrize("name", ["attention.dkdv.32.dropout.16", "glu.plain.16"])
def test_a_tile_is_compared_where_it_is_launched(name, monkeypatch):
    """The check's own shape reaches the entry's tile, not another width's or kind's."""
    entry = next(one for one in tune.entries() if one.name == name)
    asked = []
    true = measured.tile
    monkeypatch.setattr(measured, "tile", lambda arch, wanted: asked.append(wanted) or true(arch, wanted))
    # bfloat16 is wrong in the interpreter: what is launched is looked at, not the verdict
    tune.measure(entry, entry.committed("sm_86"), CPU, lambda run: 1.0)
    assert name in asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys):
    assert tune.main([]) == 1
    assert "expected a CUDA device, found none" in capsys.readouterr().err
    assert not measured.DIRECTORY.exists()


def test_the_command_with_a_fake_device(monkeypatch, capsys):
    """The whole command, with a device and a timer that are made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "made up")
    monkeypatch.setattr("kernels.compile_only.architecture", lambda x: "sm_86")
    monkeypatch.setattr(tune.torch, "empty", lambda *a, **k: None)
    times = iter([4.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(tune, "measure", lambda entry, fields, device, timer: tune.Measurement(fields, next(times)))
    assert tune.main(["--only", "rows.runs"]) == 0
    assert "wrote" in capsys.readouterr().out
    entry = json.loads((measured.DIRECTORY / "sm_86.json").read_text())["entries"]["rows.runs"]
    assert entry["tile"] == {"elements": 4}
    assert entry["before"] == 4.0
    assert tune.main(["--only", "nothing"]) == 2
