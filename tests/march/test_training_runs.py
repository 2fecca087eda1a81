"""train.py as a user starts it: in processes of its own, with and without DeepSpeed's launcher."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_support import (
    LAUNCHER,
    ROOT,
    free_port,
    launcher,
    losses,
    metrics,
    one_line,
    process_environment,
    run_command,
    run_here,
    small_overrides,
    write_corpus,
)

from march.training.errors import RunError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Options that train the small model on a small corpus, prepared once; float32, whatever is fastest here."""
    folder = tmp_path_factory.mktemp("corpus")
    text = write_corpus(folder / "text.jsonl")
    data = ["--files", str(text), "--data-dir", str(folder / "data")]
    return ["--recipe", "demo", "--precision", "fp32", *data, *small_overrides()]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """Four steps of `python train.py`, one process."""
    folder = tmp_path_factory.mktemp("reference")
    done = run_command([*corpus, "--steps", "4", "--run-dir", "run"], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_python_train_writes_the_run_folder(reference):
    folder, done = reference
    assert "step 4/4 | loss" in done.stderr
    assert "cannot be compared with the published ones" in done.stderr
    assert "\r" not in done.stderr  # no live line where there is no terminal
    config = json.loads((folder / "config.json").read_text())
    assert config["experiment"] == "Baseline"
    assert config["recipe"]["name"] == "demo"
    assert config["config"]["dim_model"] == 32
    assert config["difference"]["in_this_run"]["dim_model"] == [512, 32]
    (start,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert start["processes"] == 1
    assert start["seed"] == 42
    assert start["versions"]["deepspeed"]
    assert start["impl_chosen"] == "every operator: torch"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["steps"] == 4
    assert summary["parameters"] == start["parameters"]
    assert summary["peak_resident_memory_mib"] > 100
    assert summary["ln_vocabulary"] == pytest.approx(math.log(config["config"]["vocab_size"]))
    assert 0 < summary["unigram_entropy"] < summary["ln_vocabulary"]
    assert summary["final_loss"] == losses(folder)[-1]
    assert summary["eval_loss"] == metrics(folder)[-1]["eval_loss"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000004"


def test_launcher_with_two_processes_has_the_losses_of_one(corpus, reference, tmp_path):
    """Dropout on; half the micro-batch too, so both the split over ranks and over micro-steps differ."""
    arguments = [*corpus, "--steps", "4", "--run-dir", "run", "--micro-batch", "4"]
    done = run_command(arguments, launcher=launcher(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) x micro-batch 4 x 2 = 16" in done.stderr
    expected = metrics(reference[0])
    for ours, theirs in zip(metrics(tmp_path / "run"), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], abs=1e-5)


def test_the_precision_is_measured_once_for_all_processes_and_kept_by_resume(corpus, tmp_path):
    open_precision = [option for option in corpus if option not in ("--precision", "fp32")]
    first = run_command([*open_precision, "--steps", "1", "--run-dir", "run"], launcher=launcher(), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("as fast as float32") == 1
    config = json.loads((tmp_path / "run/config.json").read_text())
    chosen = config["identity"]["precision"]
    assert chosen == config["recipe"]["precision"] == config["config"]["precision"]
    again = run_here(["--resume", "run", "--steps", "2"], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [start["precision"] for start in json.loads((tmp_path / "run/environment.json").read_text())["starts"]] == [
        chosen
    ] * 2


def test_launcher_trains_another_experiment_without_a_compiler(corpus, tmp_path):
    """PATH holds the interpreter's folder and nothing else: no cc, no ninja, no git."""
    only = tmp_path / "bin"
    only.mkdir()
    for name in ("python", "python3", "deepspeed"):
        (only / name).symlink_to(Path(sys.executable).with_name(name))
    arguments = [*corpus, "--exp", "database", "--set", "database_states=8", "--steps", "2", "--run-dir", "run"]
    done = run_command(arguments, launcher=launcher(1), cwd=tmp_path, PATH=str(only), CC="", CXX="")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run/config.json").read_text())["experiment"] == "Database"
    assert not shutil.which("cc", path=str(only))


def test_resume_on_two_processes_continues_a_run_of_one(corpus, reference, tmp_path):
    assert run_here([*corpus, "--steps", "2", "--run-dir", "run"], cwd=tmp_path).returncode == 0
    again = run_command(["--resume", "run", "--steps", "4"], launcher=launcher(), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "after step 2" in again.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(reference[0]), abs=1e-5)
    starts = json.loads((tmp_path / "run/environment.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [1, 2]


def test_resume_refuses_other_settings_and_damaged_checkpoints(corpus, reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference[0], folder)
    finished = run_here(["--resume", "run", "--steps", "4"], cwd=tmp_path)
    assert finished.returncode == 2
    assert "expected steps left to do" in one_line(finished.stderr)
    other = run_here(["--resume", "run", "--steps", "6", "--seed", "1", "--set", "dim_model=64"], cwd=tmp_path)
    assert other.returncode == 2
    line = one_line(other.stderr)
    assert "seed: the run has 42, asked 1" in line
    assert "config.dim_model: the run has 32, asked 64" in line
    file = folder / "checkpoints/step-00000004/exp_avg.pt"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    file.write_bytes(damaged)
    refused = run_here(["--resume", "run", "--steps", "6"], cwd=tmp_path)
    assert refused.returncode == 2
    assert "only damaged ones" in one_line(refused.stderr)
    assert losses(folder) == losses(reference[0])  # nothing ran


@pytest.mark.parametrize("how", ["SIGTERM to the runner", "Ctrl-C"])
def test_a_stopped_launcher_leaves_a_checkpoint_and_no_orphans(corpus, tmp_path, how):
    """DeepSpeed's runner dies of SIGTERM without a word to its children; after Ctrl-C its launch process sends
    SIGTERM to workers that the terminal has sent SIGINT to already."""
    arguments = [*corpus, "--steps", "100000", "--run-dir", "run", "--checkpoint-every", "100000"]
    with open(tmp_path / "log", "w") as log:
        runner = subprocess.Popen(
            [*launcher(), str(ROOT / "train.py"), *arguments],
            cwd=tmp_path,
            env=process_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(losses(tmp_path / "run")) > 2, 300)
        children = psutil.Process(runner.pid).children(recursive=True)
        assert len(children) >= 3  # launch and two workers
        if how == "Ctrl-C":
            os.killpg(runner.pid, signal.SIGINT)
        else:
            runner.send_signal(signal.SIGTERM)
        runner.wait(300)
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["finished"] is False
    assert summary["stopped_by"] in ("SIGINT", "SIGTERM", "end of the launcher")
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{summary['steps']:08d}"


def test_sigint_ends_an_ordinary_run_orderly(corpus, tmp_path):
    arguments = [*corpus, "--steps", "100000", "--run-dir", "run"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        env=process_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(losses(tmp_path / "run")) > 2, 300)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped by SIGINT after step" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run/curve.png").exists()


@pytest.mark.slow
def test_two_nodes_by_a_hostfile(corpus, reference, tmp_path):
    """The launcher twice on one machine, as two nodes of one process each."""
    (tmp_path / "hostfile").write_text("n0 slots=1\nn1 slots=1\n")
    port = free_port()
    nodes = [
        subprocess.Popen(
            [
                *LAUNCHER,
                *("--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--node_rank", str(rank)),
                *("--master_addr", "127.0.0.1", "--master_port", port),
                *(str(ROOT / "train.py"), *corpus, "--steps", "4", "--run-dir", "run"),
            ],
            cwd=tmp_path,
            env=process_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert losses(tmp_path / "run") == pytest.approx(losses(reference[0]), abs=1e-5)
    (start,) = json.loads((tmp_path / "run/environment.json").read_text())["starts"]
    assert start["processes"] == 2


def test_a_mistake_shows_no_traceback_in_a_process_of_its_own(tmp_path):
    done = run_command(["--exp", "Baselin"], cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean Baseline" in one_line(done.stderr)


@pytest.mark.parametrize(("error", "code"), [(RunError("loss is nan"), 1), (OSError(28, "No space left"), 1)])
def test_a_run_that_has_to_stop_gets_one_line_and_exit_code_1(error, code, monkeypatch, capsys):
    from march.training import main as entry

    def fail(arguments):
        raise error

    monkeypatch.setattr(entry, "_train", fail)
    monkeypatch.delenv("RANK", raising=False)
    assert entry.main([]) == code
    assert str(error) in one_line(capsys.readouterr().err)
    error.report = False  # another rank says it
    assert entry.main([]) == code
    assert capsys.readouterr().err == ""


def test_torch_is_not_loaded_before_main_sets_its_environment(tmp_path):
    code = "import sys, march.training.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=process_environment()).returncode == 0


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
