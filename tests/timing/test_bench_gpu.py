"""The first hour, with parts that are made up: what it runs, survives, remembers and writes."""

import json
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import FAILED, HOLDS, INTERRUPTED, SKIPPED, Context, Outcome


@pytest.fixture
def parts(monkeypatch):
    """Replaces every part; returns the order in which they ran, and what each does."""
    ran: list[str] = []
    does: dict[str, object] = dict.fromkeys(gpu.PARTS, HOLDS)

    def part(key):
        def run(given):
            ran.append(key)
            what = does[key]
            if isinstance(what, BaseException):
                raise what
            return Outcome(what, "here", [f"said by {key}"])

        return run

    monkeypatch.setattr(gpu, "PARTS", {key: (title, part(key)) for key, (title, _) in gpu.PARTS.items()})
    monkeypatch.setattr(gpu, "fingerprint", lambda quick: f"sources {quick}")
    return ran, does


def call(tmp_path, *arguments):
    return gpu.main(["--out", str(tmp_path), *arguments])


def page(tmp_path: Path) -> str:
    return (tmp_path / "page.md").read_text()


def test_in_this_order(parts, tmp_path):
    ran, _ = parts
    assert call(tmp_path) == 0
    assert ran == ["tests", "self-test", "tuner", "bench", "training"]
    assert all(f"said by {key}" in page(tmp_path) for key in ran)
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("what", [FAILED, ValueError("broken")])
def test_a_failure_does_not_stop_the_others(parts, tmp_path, what):
    ran, does = parts
    does["self-test"] = what
    assert call(tmp_path) == 1
    assert len(ran) == 5
    assert "Does not hold: The self-test (failed)" in page(tmp_path)
    if isinstance(what, ValueError):
        assert "ValueError: broken" in page(tmp_path)


def test_ctrl_c_keeps_the_page_and_the_next_call_goes_on(parts, tmp_path):
    ran, does = parts
    does["bench"] = KeyboardInterrupt()
    assert call(tmp_path) == 130
    assert ran == ["tests", "self-test", "tuner", "bench"]
    assert f"`pytest bench/` ({INTERRUPTED})" in page(tmp_path)
    assert "not run yet" in page(tmp_path)
    does["bench"] = HOLDS
    ran.clear()
    assert call(tmp_path) == 0
    assert ran == ["bench", "training"]
    ran.clear()
    assert call(tmp_path, "--again", "--only", "tuner") == 0
    assert ran == ["tuner"]


def test_what_held_elsewhere_is_run_again(parts, tmp_path, monkeypatch):
    ran, _ = parts
    call(tmp_path)
    ran.clear()
    monkeypatch.setattr(gpu, "fingerprint", lambda quick: "other sources")
    call(tmp_path)
    assert len(ran) == 5


def test_a_damaged_state_is_no_state(parts, tmp_path):
    ran, _ = parts
    (tmp_path / "state.json").write_text("{")
    assert call(tmp_path) == 0
    assert len(ran) == 5


def test_a_skipped_part_says_why(parts, tmp_path):
    _, does = parts
    does["tuner"] = SKIPPED
    assert call(tmp_path) == 0
    assert "Skipped: The tuner: said by tuner" in page(tmp_path)


def test_an_unknown_part_is_named(parts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(tmp_path, "--only", "tunner")
    assert "got 'tunner'" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_said_of_one(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    call(tmp_path)
    assert "not on a GPU" in page(tmp_path)
    assert "nothing is compared here" in page(tmp_path)
    assert gpu.tuner(Context(tmp_path, False, False)).status == SKIPPED


def test_a_command_s_output_is_kept(tmp_path):
    given = Context(tmp_path, False, False)
    status, output = given.run("x", ["python", "-c", "print('hello'); raise SystemExit(3)"])
    assert (status, output) == (3, "hello\n")
    assert (tmp_path / "x.log").read_text() == "hello\n"


def test_training_that_does_not_learn_does_not_hold(tmp_path, monkeypatch):
    def run(self, key, command, environment=None):
        (tmp_path / "run").mkdir()
        rows = [{"loss": loss, "seconds": 1.0, "tokens_per_second": 5.0} for loss in losses]
        (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return 0, "done"

    monkeypatch.setattr(Context, "run", run)
    losses = [3.0, 2.0, 1.0]
    assert gpu.training(Context(tmp_path, False, False)).status == HOLDS
    losses = [1.0, 2.0, 3.0]
    assert gpu.training(Context(tmp_path, False, False)).status == FAILED
    losses = [3.0, 2.0]
    assert gpu.training(Context(tmp_path, False, False)).status == FAILED


@pytest.mark.parametrize(("tokens", "verdict"), [(27_000, "within the range"), (20_000, "slower"), (40_000, "faster")])
def test_beside_the_projection(tmp_path, monkeypatch, tokens, verdict):
    """4.5 to 5.5 s a step on 8 devices: 1024 x 1127 positions over 8 x 5 s are 28,851 a second and device."""
    from bench.projection import Projection
    from march.cost import DEVICES

    monkeypatch.setattr(gpu.machine, "listed", lambda: DEVICES["a5000"])
    own = Projection("Baseline", "triton", "a5000", 8, 5.0, 4.5, 5.5, {}, None)
    row = {"suite": "experiments", "implementation": "triton", "experiment": "Baseline", "tokens_per_second": tokens}
    content = {"benchmarks": [{"fullname": "x", "stats": {}, "extra_info": row}], "machine_info": {}}
    (tmp_path / "bench.json").write_text(json.dumps(content))
    ((row,), _) = gpu.beside_the_projection(tmp_path / "bench.json", True, [own])
    assert verdict in row["verdict"]
    assert row["projected"] == pytest.approx(28_851, rel=1e-4)
