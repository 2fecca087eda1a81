"""Signals to processes of their own: SIGKILL, SIGSTOP, SIGHUP, a launcher that dies, two runs in one folder. No orphan,
a bounded end, one line with the way to go on; a resume gives the uninterrupted run bit for bit."""

import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_support import (
    ROOT,
    free_port,
    launcher,
    metrics,
    process_environment,
    run_command,
    small_overrides,
    write_corpus,
)

STEPS = 150  # of the uninterrupted run
FAR = 100_000  # steps that no test waits for
TIMEOUT = 12  # seconds; of a busy machine a rank may be silent for some
# of a process that nobody could ask to save
AGAIN = "steps since the last checkpoint run again"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, options, and the uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("home")
    text = write_corpus(folder / "text.jsonl")
    options = ["--recipe", "demo", "--precision", "fp32", "--files", str(text), "--data-dir", str(folder / "data")]
    options += small_overrides()
    done = run_command([*options, "--run-dir", "straight", "--steps", str(STEPS)], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, options


class Run:
    """train.py under way in `folder`/run; its processes, its output."""

    def __init__(self, home, folder: Path, *arguments, processes: int = 1):
        self.folder, self.path, self.log = folder, folder / "run", folder / "log"
        start = launcher(processes) if processes > 1 else (sys.executable,)
        self._output = open(self.log, "ab")  # noqa: SIM115 the process writes to it
        self.process = subprocess.Popen(
            [*start, str(ROOT / "train.py"), *arguments],
            cwd=folder,
            env=process_environment(MARCH_TIMEOUT=str(TIMEOUT)),
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
        )

    def wait_for_steps(self, count: int, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while self.steps() < count:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.1)

    def steps(self) -> int:
        file = self.path / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def family(self) -> list[psutil.Process]:
        return [self.process_handle, *self.process_handle.children(recursive=True)]

    @property
    def process_handle(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def launch(self) -> psutil.Process:
        return next(p for p in self.family() if "deepspeed.launcher.launch" in " ".join(p.cmdline()))

    def rank(self, number: int) -> psutil.Process:
        return next(p for p in self.launch().children() if f"--local_rank={number}" in p.cmdline())

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ours(self) -> list[str]:
        return [line for line in self.text().splitlines() if line.startswith("train.py: ")]

    def summary(self) -> dict:
        return json.loads((self.path / "summary.json").read_text())


def ends(processes, seconds: float) -> float:
    """Seconds until all have ended; the test fails where one is left."""
    begin = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive
    return time.monotonic() - begin


def assert_continues_as_uninterrupted(home, run: Run) -> None:
    folder, _ = home
    done = run_command(["--resume", "run", "--steps", str(STEPS)], cwd=run.folder)
    assert done.returncode == 0, done.stderr
    ours, theirs = metrics(run.path), metrics(folder / "straight")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert (a["loss"], a["grad_norm"], a.get("eval_loss")) == (b["loss"], b["grad_norm"], b.get("eval_loss"))
    assert run.summary()["finished"] is True


@pytest.mark.fault("SIGHUP: the connection dropped", "saved, one line, resumed bit for bit")
def test_a_dropped_connection_saves(home, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup children would inherit that it is ignored
    run = Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(STEPS))
    run.wait_for_steps(3)
    run.process.send_signal(signal.SIGHUP)
    run.process.wait(300)
    assert run.process.returncode == 128 + signal.SIGHUP
    assert run.summary()["stopped_by"] == "SIGHUP"
    assert run.summary()["finished"] is False
    assert "stopped by SIGHUP after step" in run.text()
    assert_continues_as_uninterrupted(home, run)


@pytest.mark.slow
@pytest.mark.fault("signal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_every_ending_signal_saves(home, tmp_path, name, fault):
    run = Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(FAR))
    run.wait_for_steps(2)
    begin = time.monotonic()
    run.process.send_signal(signal.Signals[name])
    run.process.wait(300)
    assert run.process.returncode == 128 + signal.Signals[name]
    assert (run.path / "checkpoints/latest").read_text() == f"step-{run.steps():08d}"
    assert "Traceback" not in run.text()
    fault.happened(f"saved, ended within {time.monotonic() - begin:.0f} s")


@pytest.mark.slow
@pytest.mark.fault("SIGTERM before the first step", "ends at once, in one line")
def test_a_signal_at_the_start_ends_at_once(home, tmp_path):
    run = Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(FAR))
    end = time.monotonic() + 300
    while "| recipe demo" not in run.text():
        assert time.monotonic() < end
        time.sleep(0.05)
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(300)
    assert run.process.returncode == 128 + signal.SIGTERM
    (line,) = run.ours()
    assert "stopped by SIGTERM before the first step" in line


@pytest.mark.slow
@pytest.mark.fault("ten SIGKILLs at random moments, a checkpoint every step", lost=AGAIN)
def test_a_chain_of_kills_gives_the_uninterrupted_run(home, tmp_path, fault):
    draw, kills = random.Random(1), 0
    arguments = [*home[1], "--run-dir", "run"]
    for _ in range(10):
        run = Run(home, tmp_path, *arguments, "--steps", str(STEPS), "--checkpoint-every", "1")
        before = run.steps()
        run.wait_for_steps(before + 1 if kills else 2)
        time.sleep(draw.uniform(0, 0.3))
        if run.process.poll() is not None:
            break
        run.process.kill()
        run.process.wait()
        kills += 1
        assert run.summary()["finished"] is False
        arguments = ["--resume", "run"]
        if run.steps() > STEPS - 10:
            break
    assert kills > 1
    assert_continues_as_uninterrupted(home, run)
    fault.happened(f"{kills} kills, each resumed; losses, norms and evaluations equal bit for bit", AGAIN)


@pytest.mark.fault("rank 1 of 2 stopped by SIGSTOP", lost=AGAIN)
def test_a_stopped_rank_is_named_and_ended(home, tmp_path, fault):
    run = Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(FAR), "--checkpoint-every", "2", processes=2)
    run.wait_for_steps(3)
    family, stopped = run.family(), run.rank(1)
    stopped.suspend()
    took = ends(family, TIMEOUT + 120)
    (line,) = run.ours()
    assert f"rank 1 (process {stopped.pid} on {socket.gethostname()}) has not answered for {TIMEOUT} s" in line
    assert "continue with deepspeed --num_gpus 2 train.py --resume run" in line
    assert run.summary()["finished"] is False
    fault.happened(f"named and ended after {took:.0f} s (limit {TIMEOUT}); no process left", AGAIN)


@pytest.mark.slow
@pytest.mark.fault("rank 0 of 2 stopped by SIGSTOP", "named within the limit, no orphan", AGAIN)
def test_a_stopped_first_rank_is_named_and_ended(home, tmp_path):
    run = Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(FAR), processes=2)
    run.wait_for_steps(3)
    family, stopped = run.family(), run.rank(0)
    stopped.suspend()
    ends(family, TIMEOUT + 120)
    (line,) = run.ours()
    assert f"rank 0 (process {stopped.pid}" in line


@pytest.mark.slow
@pytest.mark.fault("a rank stopped for a moment and continued", "the run goes on")
def test_a_short_stop_is_forgiven(home, tmp_path):
    run = Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(FAR), processes=2)
    run.wait_for_steps(3)
    for _ in range(2):
        for process in (run.rank(0), run.rank(1)):
            process.suspend()
        time.sleep(TIMEOUT + 3)  # all of them, as when a machine sleeps
        for process in (run.rank(0), run.rank(1)):
            process.resume()
    run.wait_for_steps(run.steps() + 3)
    family = run.family()
    run.process.terminate()
    ends(family, 200)


@pytest.mark.slow
@pytest.mark.fault("SIGTERM to the launcher while a rank is stopped", "bounded, no orphan")
@pytest.mark.parametrize("who", ["runner", "launch", "both killed"])
def test_a_launcher_that_ends_while_a_rank_hangs(home, tmp_path, who, fault):
    run = Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(FAR), "--checkpoint-every", "2", processes=2)
    run.wait_for_steps(3)
    family, launch = run.family(), run.launch()
    run.rank(1).suspend()
    time.sleep(1)
    if who == "both killed":
        run.process.kill()
        launch.kill()
    else:
        (run.process_handle if who == "runner" else launch).terminate()
    took = ends(family, 2 * TIMEOUT + 120)
    assert run.summary()["finished"] is False
    fault.happened(f"all ended after {took:.0f} s", AGAIN)


@pytest.mark.slow
@pytest.mark.fault("SIGKILL")
@pytest.mark.parametrize("who", ["runner", "launch", "rank 0", "rank 1"])
def test_a_killed_process_of_two_leaves_no_orphan(home, tmp_path, who, fault):
    run = Run(
        home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(STEPS), "--checkpoint-every", "1", processes=2
    )
    run.wait_for_steps(3)
    family = run.family()
    victim = {"runner": run.process_handle, "launch": run.launch(), "rank 0": run.rank(0), "rank 1": run.rank(1)}[who]
    victim.kill()
    took = ends(family, 200)
    run.process.wait()
    assert run.summary()["finished"] is False  # whatever the launcher returned
    if "rank" in who:
        (line,) = run.ours()
        assert f"{who} (process {victim.pid}" in line
        assert "continue with deepspeed" in line
    assert "Traceback" not in "".join(run.ours())
    done = run_command(["--resume", "run", "--steps", str(STEPS)], cwd=tmp_path)  # 2 -> 1 processes
    assert done.returncode == 0, done.stderr
    ours, theirs = metrics(run.path), metrics(home[0] / "straight")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=2e-4)
    fault.happened(
        f"ended after {took:.0f} s; resumed on one process, losses to 2e-4", AGAIN if "rank" in who else "nothing"
    )


@pytest.mark.slow
@pytest.mark.fault("two new runs, two resumes in one folder", "one goes on alone, the other refused in one line")
def test_two_at_once_in_one_folder(home, tmp_path):
    (tmp_path / "other").mkdir()
    runs = [Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", str(STEPS)) for _ in range(2)]
    codes = sorted(run.process.wait(600) for run in runs)
    assert codes == [0, 2], runs[0].text()
    assert_same_as_uninterrupted(home, runs[0])
    runs = [Run(home, tmp_path, "--resume", "run", "--steps", str(FAR)) for _ in range(2)]
    end = time.monotonic() + 300
    while all(run.process.poll() is None for run in runs) and time.monotonic() < end:
        time.sleep(0.2)
    (alive,) = [run for run in runs if run.process.poll() is None]
    (refused,) = [run for run in runs if run.process.poll() is not None]
    assert refused.process.returncode == 2
    alive.process.terminate()
    assert alive.process.wait(300) == 128 + signal.SIGTERM
    assert sum("is running; wait for its end" in line for line in alive.ours()) >= 1
    assert [row["step"] for row in metrics(alive.path)] == list(range(1, alive.steps() + 1))


def assert_same_as_uninterrupted(home, run: Run) -> None:
    assert [row["loss"] for row in metrics(run.path)] == [row["loss"] for row in metrics(home[0] / "straight")]


@pytest.mark.slow
@pytest.mark.fault("one process to two, and back", "losses of one process to 2e-4")
def test_another_number_of_processes(home, tmp_path):
    run = Run(home, tmp_path, *home[1], "--run-dir", "run", "--steps", "10")
    assert run.process.wait(600) == 0
    run = Run(home, tmp_path, "--resume", "run", "--steps", "60", processes=2)
    assert run.process.wait(600) == 0, run.text()
    done = run_command(["--resume", "run", "--steps", str(STEPS)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = metrics(run.path), metrics(home[0] / "straight")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=2e-4)


NOT_FINITE = """
import os, sys
sys.path[:0] = [{root!r}, {helpers!r}]
import torch
from test_not_finite import poison_gradient, trainer_of, RunFolder
from pathlib import Path
from march.training.errors import NonFiniteError
trainer = trainer_of(RunFolder(Path(sys.argv[1])), micro_batch=2, **{settings!r})
before = None
if int(os.environ["RANK"]) == 1:
    poison_gradient(trainer, 3, float("nan"))
record = trainer._record
def keep(row):
    record(row)
    global before
    before = [p.detach().clone() for p in trainer.engine.module.parameters()]
trainer._record = keep
try:
    trainer.run()
except NonFiniteError as error:
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.engine.module.parameters()))
    print("same weights" if same else "changed weights", error)
    sys.stdout.flush()
    os._exit(3)
os._exit(4)
"""


@pytest.mark.slow
@pytest.mark.fault("a gradient not finite on rank 1 of 2", "both ranks stop before their weights see it")
@pytest.mark.parametrize(
    "settings",
    [{"zero": 0}, {"zero": 1}, {"zero": 2}, {"precision": "bf16"}, {"precision": "bf16", "zero": 2, "clipping": 0.0}],
    ids=str,
)
def test_one_rank_that_is_not_finite_stops_both(tmp_path, settings):
    port = free_port()
    helpers = [str(Path(__file__).parent), str(ROOT / "tests/march")]
    code = NOT_FINITE.replace("{helpers!r}", ", ".join(map(repr, helpers))).replace("{root!r}", repr(str(ROOT)))
    code = code.replace("{settings!r}", repr(settings))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            env=process_environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, errors = rank.communicate(timeout=600)
        assert rank.returncode == 3, errors
        assert "same weights gradient norm is" in out
        assert "in step 3" in out
