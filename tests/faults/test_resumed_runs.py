"""A run's folder as a stranger, a full disk or a second process left it, and train.py --resume on it: in this process,
by the real command line, checked against the run that nothing happened to."""

import fcntl
import json
import os
import shutil
import subprocess
import time

import pytest
from injecting import edit_json, fill, free, rehash, small_disk
from training_support import metrics, one_line, small_overrides, write_corpus

from march.training import distributed
from march.training.checkpoint import tag_of
from march.training.main import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus and four finished runs of six steps, with a checkpoint of every second step:
    whole, cut at step 4, of another seed, of another activation."""
    folder = tmp_path_factory.mktemp("home")
    write_corpus(folder / "text.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(distributed, "stop", lambda world: None)  # the process group serves all tests
        same = [*options(folder), "--precision", "fp32", "--checkpoint-every", "2"]
        assert main([*same, "--run-dir", "straight", "--steps", "6"]) == 0
        assert main([*same, "--run-dir", "run", "--steps", "4"]) == 0
        assert main([*same, "--run-dir", "seed", "--steps", "6", "--seed", "1"]) == 0
        assert main([*same, "--run-dir", "activation", "--steps", "6", "--set", "activation=gelu"]) == 0
    return folder


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """A copy of the run cut at step 4, as the only one under runs/, which is where the test stands."""
    monkeypatch.setattr(distributed, "stop", lambda world: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return shutil.copytree(home / "run", tmp_path / "runs" / "run")


def options(home) -> list[str]:
    return [
        "--recipe",
        "demo",
        "--files",
        str(home / "text.jsonl"),
        "--data-dir",
        str(home / "data"),
        *small_overrides(),
    ]


def resume(*arguments, steps=6):
    return main(["--resume", *map(str, arguments), "--steps", str(steps)])


def is_as_uninterrupted(run, home) -> bool:
    ours, theirs = metrics(run), metrics(home / "straight")
    summary = json.loads((run / "summary.json").read_text())
    return (
        [row["step"] for row in ours] == list(range(1, 7))
        and [(row["loss"], row["grad_norm"]) for row in ours] == [(row["loss"], row["grad_norm"]) for row in theirs]
        and summary["finished"]
        and summary["first_loss"] == ours[0]["loss"]
        and summary["eval_loss"] == theirs[-1]["eval_loss"]
    )


def warnings(text: str) -> str:
    return "; ".join(line.removeprefix("WARNING: ") for line in text.splitlines() if line.startswith("WARNING"))


def write(name, content):
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name):
    return lambda run: (run / name).unlink()


def to_folder(name):
    return lambda run: ((run / name).unlink(), (run / name).mkdir())


def keep_lines(*numbers):
    def cut(run):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[n] for n in numbers))

    return cut


SIDE_FILES = {
    "metrics.jsonl gone": remove("metrics.jsonl"),
    "metrics.jsonl of no bytes": write("metrics.jsonl", ""),
    "metrics.jsonl ends in half a line": lambda run: os.truncate(
        run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 20
    ),
    "metrics.jsonl not UTF-8": write("metrics.jsonl", b"\xff\xfe\x00garbage\n"),
    "metrics.jsonl lacks rows in the middle": keep_lines(0, 3),
    "metrics.jsonl has rows twice": keep_lines(0, 1, 1, 2, 2, 3, 3),
    "metrics.jsonl of numbers": write("metrics.jsonl", "1\n2\nnull\n[]\n"),
    "metrics.jsonl with a step that is no number": write("metrics.jsonl", '{"step": "one", "loss": 3}\n'),
    "config.json gone": remove("config.json"),
    "config.json cut in half": lambda run: os.truncate(run / "config.json", 300),
    "config.json is {}": write("config.json", "{}"),
    "config.json is a list": write("config.json", "[]"),
    "config.json not UTF-8": write("config.json", b"\xff\xfe"),
    "config.json with an identity that is a list": lambda run: edit_json(run / "config.json", identity=[1]),
    "config.json with a recipe that is a list": lambda run: edit_json(run / "config.json", recipe=[1]),
    "environment.json gone": remove("environment.json"),
    "environment.json cut in half": lambda run: os.truncate(run / "environment.json", 100),
    "environment.json is a list": write("environment.json", "[]"),
    "environment.json with starts that are a number": write("environment.json", '{"starts": 3}'),
    "summary.json cut in half": lambda run: os.truncate(run / "summary.json", 50),
    "tensorboard/ is a file": lambda run: (shutil.rmtree(run / "tensorboard"), (run / "tensorboard").write_text("")),
    "curve.png is a folder": to_folder("curve.png"),
    "a file of a killed write": write(".config.json.tmp", "half"),
    "a link where a file is written": lambda run: (run / ".config.json.tmp").symlink_to("/nowhere/at/all"),
}


@pytest.mark.fault("side file")
@pytest.mark.parametrize("damage", SIDE_FILES)
def test_a_whole_checkpoint_is_enough(run, home, damage, fault, capsys):
    SIDE_FILES[damage](run)
    assert resume(run) == 0
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert is_as_uninterrupted(run, home)
    config = json.loads((run / "config.json").read_text())
    assert (config["experiment"], config["seed"], config["recipe"]["schedule"]["steps"]) == ("Baseline", 42, 6)
    fault.happened(warnings(said) or "written anew")


@pytest.mark.fault("every side file gone, `latest` too", "resumed from the checkpoint alone")
def test_the_checkpoint_alone_is_enough(run, home):
    for path in run.iterdir():
        if path.name != "checkpoints":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "checkpoints/latest").unlink()
    assert resume(run) == 0
    assert is_as_uninterrupted(run, home)


@pytest.mark.fault("newest checkpoint of another run copied in, --resume")
@pytest.mark.parametrize("config", ["", "config.json gone too"])
@pytest.mark.parametrize("other", ["seed", "activation"])
def test_a_foreign_checkpoint_is_passed_over(run, home, other, config, fault, capsys):
    shutil.copytree(home / other / "checkpoints" / tag_of(6), run / "checkpoints" / tag_of(6))
    if config:
        (run / "config.json").unlink()
    assert resume(run) == 0
    said = capsys.readouterr().err
    assert "expected a checkpoint of this run, got another's" in said
    assert is_as_uninterrupted(run, home)
    fault.happened(warnings(said))


@pytest.mark.fault("the only checkpoint of another run", "refused in one line that names the fields")
@pytest.mark.parametrize("other", ["seed", "activation"])
def test_a_foreign_checkpoint_alone_is_refused(run, home, other, capsys):
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(home / other / "checkpoints", run / "checkpoints")
    assert resume(run, steps=8) == 2
    field = {"seed": "seed is 1 there, 42 here", "activation": "config.activation is 'gelu' there"}[other]
    assert field in one_line(capsys.readouterr().err)
    assert metrics(run) == metrics(home / "run")


@pytest.mark.fault("newest checkpoint damaged, one to keep", "the older one stays until better is there")
def test_pruning_never_leaves_only_damaged_ones(run, home, capsys):
    shutil.copytree(home / "straight/checkpoints" / tag_of(6), run / "checkpoints" / tag_of(6))
    os.rename(run / "checkpoints" / tag_of(6), run / "checkpoints" / tag_of(8))  # a later one that is not what it says
    assert resume(run) == 0
    assert {tag_of(4), tag_of(6), tag_of(8)} <= {path.name for path in (run / "checkpoints").iterdir()}
    assert is_as_uninterrupted(run, home)
    assert resume(run, steps=7) == 0
    assert "after step 6" in capsys.readouterr().err


@pytest.mark.fault("a state.json with a right hash, but")
@pytest.mark.parametrize("older", ["an older one", "none older"])
@pytest.mark.parametrize(
    "changes",
    [{"run": 3}, {"rows": []}, {"rows": [{"step": 1}] * 4}, {"identity": []}, {"elapsed": "long"}, {"run": {}}],
    ids=str,
)
def test_a_state_that_is_not_a_runs_is_passed_over(run, home, changes, older, capsys, fault):
    file = run / "checkpoints" / tag_of(4) / "state.json"
    if older == "an older one":
        shutil.copytree(home / "straight/checkpoints" / tag_of(6), run / "checkpoints" / tag_of(6))
        file = run / "checkpoints" / tag_of(6) / "state.json"
    edit_json(file, **changes)
    rehash(file.parent)
    assert resume(run) == (0 if older == "an older one" else 2)
    said = capsys.readouterr().err
    fault.happened(warnings(said) if older == "an older one" else one_line(said))
    if older == "an older one":
        assert is_as_uninterrupted(run, home)


@pytest.mark.fault("options of other types in a checkpoint with a right hash", "refused in one line")
@pytest.mark.parametrize(
    "arguments", [{"seed": "x"}, {"schedule": []}, {"model": 3}, {"experiment": 3}, {"data": {"files": 1}}], ids=str
)
def test_options_of_other_types_are_refused(run, arguments, capsys):
    file = run / "checkpoints" / tag_of(4) / "state.json"
    told = json.loads(file.read_text())["run"]
    edit_json(file, run={**told, "recipe": {**told["recipe"], **arguments}})
    rehash(file.parent)
    assert main(["--resume", str(run)]) == 2
    one_line(capsys.readouterr().err)


@pytest.mark.fault("the disk full when a run starts", "refused before the first step, in one line")
def test_a_disk_full_at_the_start(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "stop", lambda world: None)
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk)
        assert main([*options(home), "--run-dir", str(disk / "run"), "--steps", "2"]) == 1
        assert "free space there" in one_line(capsys.readouterr().err)


@pytest.mark.fault("another run's config.json damaged in the same folder, --resume without a name", "passed over")
@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff", b'{"experiment": 3, "recipe": 4}'], ids=str)
def test_a_damaged_neighbour_is_passed_over(run, home, content):
    (run.parent / "neighbour").mkdir()
    (run.parent / "neighbour/config.json").write_bytes(content)
    (run.parent / "a file").write_text("")
    assert main(["--resume", "--exp", "Baseline", "--steps", "6"]) == 0
    assert is_as_uninterrupted(run, home)


@pytest.mark.fault("the newest run's config.json damaged, --resume without a name", "found by its checkpoint")
def test_the_newest_run_is_found_by_its_checkpoint(run, home):
    (run / "config.json").write_text("{")
    assert main(["--resume", "--recipe", "demo", "--steps", "6"]) == 0
    assert is_as_uninterrupted(run, home)


@pytest.mark.fault("a run folder that another process owns", "refused in one line that names the process")
def test_one_owner_a_folder(run, home, capsys):
    descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, b"4711 on somewhere")
    assert resume(run) == 2
    assert "in which process 4711 on somewhere is running" in one_line(capsys.readouterr().err)
    os.close(descriptor)
    assert resume(run) == 0
    assert is_as_uninterrupted(run, home)


@pytest.mark.fault("--run-dir that is not empty")
@pytest.mark.parametrize("what", ["a run", "a file", "checkpoints only", "a stale later checkpoint"])
def test_a_folder_that_is_not_empty_is_refused(run, home, what, capsys, fault):
    if what == "a file":
        shutil.rmtree(run)
        run.mkdir()
        (run / "notes.txt").write_text("mine")
    elif what != "a run":
        for path in run.iterdir():
            if path.name != "checkpoints":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = sorted(run.rglob("*"))
    assert main([*options(home), "--run-dir", str(run), "--steps", "2"]) == 2
    said = one_line(capsys.readouterr().err)
    assert "expected a new folder for --run-dir" in said
    assert [path for path in sorted(run.rglob("*")) if path.name != ".lock"] == [p for p in before if p.name != ".lock"]
    fault.happened(said.removeprefix("train.py: "))


@pytest.mark.fault("a read-only run folder, --resume", "refused in one line: copy it")
def test_a_read_only_folder_is_refused_with_advice(run, home, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "64m") as disk:
        shutil.copytree(run, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert resume(disk / "run") == 2
        line = one_line(capsys.readouterr().err)
        assert "expected a run folder that can be written to" in line
        assert "copy it" in line
        shutil.copytree(disk / "run", tmp_path / "copied")
    assert resume(tmp_path / "copied") == 0
    assert is_as_uninterrupted(tmp_path / "copied", home)


@pytest.mark.fault("the disk full from step 5 on", "trains to the next save, which says so")
def test_logging_ends_no_run(run, home, tmp_path, monkeypatch, capsys):
    from march.training.metrics import Metrics

    with small_disk(tmp_path / "disk", "16m") as disk:
        shutil.copytree(run, disk / "run")
        add = Metrics.add
        monkeypatch.setattr(Metrics, "add", lambda self, row: (fill(disk) if row["step"] == 5 else 0, add(self, row)))
        assert resume(disk / "run") == 1
        said = capsys.readouterr().err
        assert "checkpoint of step 6 could not be written" in one_line(said)
        free(disk)
        monkeypatch.undo()
        monkeypatch.setattr(distributed, "stop", lambda world: None)
        assert resume(disk / "run") == 0
        assert is_as_uninterrupted(disk / "run", home)


@pytest.mark.fault("the terminal gone: every line on stderr fails", "the run ends as if nothing was")
def test_a_terminal_that_has_gone_ends_no_run(run, home, monkeypatch):
    import sys

    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = write

        def isatty(self):
            return False

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        assert resume(run) == 0
    assert is_as_uninterrupted(run, home)


@pytest.mark.fault("float32 products measured anew fall otherwise on a loaded machine", "the run's choice is kept")
def test_numerics_are_those_of_the_run(run, home, monkeypatch):
    from kernels.portable import products

    stored = json.loads((run / "config.json").read_text())["numerics"]["float32_library"]
    other = stored == "torch"
    monkeypatch.setattr(products, "_fixed", {})
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: other)
    assert resume(run) == 0
    assert json.loads((run / "config.json").read_text())["numerics"]["float32_library"] == stored
    assert is_as_uninterrupted(run, home)


@pytest.mark.fault("memory short at the resume: another micro-batch would fit", "the run's micro-batch is kept")
def test_the_micro_batch_is_that_of_the_run(run, home, monkeypatch):
    from march.training import session

    monkeypatch.setattr(session, "available_memory", lambda world: 1)
    assert resume(run) == 0
    assert is_as_uninterrupted(run, home)


def test_a_folder_and_its_config_say_the_seed(home, run, monkeypatch):
    assert main([*options(home), "--seed", "7", "--steps", "1"]) == 0
    (made,) = run.parent.glob("Baseline-demo-seed7-*")
    config = json.loads((made / "config.json").read_text())
    assert (config["seed"], config["recipe"]["seed"], config["identity"]["seed"]) == (7, 7, 7)
    assert json.loads((made / "summary.json").read_text())["seed"] == 7


LEFT_OVER = {
    "WORLD_SIZE=2": {"WORLD_SIZE": "2"},
    "WORLD_SIZE=two": {"WORLD_SIZE": "two"},
    "WORLD_SIZE=0": {"WORLD_SIZE": "0"},
    "WORLD_SIZE of no letters": {"WORLD_SIZE": ""},
    "RANK=1": {"RANK": "1"},
    "RANK=-1": {"RANK": "-1"},
    "LOCAL_RANK=3": {"LOCAL_RANK": "3"},
    "MASTER_PORT=http": {"MASTER_PORT": "http"},
    "WORLD_SIZE=2 RANK=0": {"WORLD_SIZE": "2", "RANK": "0"},
}


@pytest.mark.fault("left in the shell", "refused at once, in one line that says what to unset")
@pytest.mark.parametrize("variables", LEFT_OVER)
def test_a_launchers_leftovers_are_refused_at_once(variables, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in LEFT_OVER[variables].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    begin = time.monotonic()
    try:
        code = main(["--recipe", "demo", "--steps", "1"])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert "unset RANK WORLD_SIZE" in one_line(capsys.readouterr().err)
    assert time.monotonic() - begin < 50  # a process group waits a minute


@pytest.mark.fault("MARCH_TIMEOUT=soon", "refused in one line")
def test_a_timeout_that_is_no_number(run, monkeypatch, capsys):
    monkeypatch.setenv("MARCH_TIMEOUT", "soon")
    assert resume(run) == 2
    assert "expected MARCH_TIMEOUT as a number of seconds" in one_line(capsys.readouterr().err)


@pytest.mark.fault("a corpus without one validation sequence", "refused in one line")
def test_nothing_to_evaluate_on_is_refused(home, run, monkeypatch, capsys):
    from march.data import Store

    whole = Store.split
    monkeypatch.setattr(Store, "split", lambda self, name: whole(self, name)[: 50 if name == "validation" else None])
    assert resume(run) == 2
    assert "validation" in one_line(capsys.readouterr().err)


def test_replay_writes_nothing(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert main(["--resume", str(run), "--replay", "5"]) == 0
    said = capsys.readouterr().err
    assert "replay of step 5 from the checkpoint of step 4" in said
    assert "everything is finite" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before
    assert main(["--resume", str(run), "--replay", "2"]) == 2
    assert "expected checkpoints before step 2" in one_line(capsys.readouterr().err)
    for wrong in (["--replay", "3"], ["--resume", str(run), "--replay", "0"]):
        assert main(wrong) == 2
        assert "expected --replay with the number of a step and --resume" in one_line(capsys.readouterr().err)
