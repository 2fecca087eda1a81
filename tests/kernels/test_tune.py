"""The tuner's logic with a fake timer: what it replaces, refuses and writes. No speed is measured here."""

import json
from dataclasses import asdict

import pytest
import torch
from compiling import compiled

from kernels import tune
from kernels.fused import measured, tiles_attention, tiles_glu, tiles_rows


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "DIRECTORY", tmp_path / "measured")
    measured.forget()
    yield
    measured.forget()


def _entry(alternatives=({"n": 1}, {"n": 2}, {"n": 3})):
    return tune.Entry("rows.stream", lambda arch: {"n": 1}, alternatives, lambda d: None)


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
    tile = measured.Tile(32, 64, 16, 2, 2)
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


MEASURED = """
import json, sys
import torch
from kernels import tune
from dataclasses import replace
from kernels.compile_only import record
from kernels.fused import measured
from kernels.calls import results as results_of

meta, results = torch.device("meta"), {}
def launched(run):
    with record.recording("sm_86", compile=False) as launches:
        run()
    return {x.program for x in launches}

def compare(call, function, device):
    compared.update(launched(lambda: results_of(call.operator, function, *call.draw(meta), call.upstream)))
    return refused
tune.selftest.disagreements = compare

def timer(run):
    timed.update(launched(run))
    return 1.0

for entry in tune.entries():
    tiles, refused = [], []
    for fields in ({}, *entry.alternatives):
        timed, compared = set(), set()
        # timed on meta tensors, where a device would be
        at = lambda device, true=entry.prepare: true(meta)
        fields = fields or entry.committed("sm_86")
        outcome = tune.measure(replace(entry, prepare=at), fields, torch.device("cpu"), timer)
        assert outcome.milliseconds == 1.0, outcome
        assert timed == compared, (entry.name, timed ^ compared)
        tiles.append((fields, timed))
    different = [a == b for i, (a, first) in enumerate(tiles) for b, second in tiles[:i] if first == second]
    refused = ["dx: error 1"]
    timed = set()
    outcome = tune.measure(replace(entry, prepare=at), fields, torch.device("cpu"), timer)
    results[entry.name] = [all(different), outcome.milliseconds, outcome.problem, len(timed)]
print(json.dumps(results))
"""


def test_every_entry_is_launched_timed_and_compared():
    """Two tiles of any entry are two sets of programs; what is timed was compared, and a disagreement has no time."""
    results = compiled(MEASURED)
    assert list(results) == [entry.name for entry in tune.entries()]
    for name, (distinct, milliseconds, problem, timed) in results.items():
        assert distinct, name
        assert (milliseconds, timed) == (None, 0), name
        assert problem.startswith("disagrees with the reference"), (name, problem)


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
    names = [entry.name for entry in tune.entries() if entry.name.split(".")[0] in lookups]
    assert len(names) == 11
    for name in names:
        parts = name.split(".")
        before = lookups[parts[0]](parts)
        changed = asdict(before) | {"warps": 16}
        with measured.trying(name, changed):
            assert asdict(lookups[parts[0]](parts)) == changed
        assert lookups[parts[0]](parts) == before


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
