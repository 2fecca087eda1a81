"""A comparison's runs: each once, to its end, whatever is killed and however many comparisons there are."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from march.compare.cell import DIVERGED, FAILED, FINISHED, INTERRUPTED, MISSING, RUNNING, Cell, execute, lock
from march.compare.runner import Slot, cpu_slots, gpu_slots, run_here, run_submitit
from march.console import UsageError

SUPPORT = Path(__file__).with_name("compare_support.py")
LAUNCHER = (sys.executable, str(SUPPORT))


def cells(parent, *options, experiments=("Baseline", "Better"), seeds=2):
    return [Cell(e, s, tuple(options), parent) for e in experiments for s in range(1, seeds + 1)]


def slots(number=2):
    return [Slot(LAUNCHER, {}, (f"test{i}",)) for i in range(number)]


def starts(parent):
    file = parent / "starts.txt"
    return Counter(file.read_text().split()) if file.exists() else Counter()


def here(todo, number=2, retry=False, say=lambda text: None):
    return run_here(todo, slots(number), retry=retry, say=say)


def test_all_runs_end_and_a_second_call_starts_none(tmp_path):
    todo, said = cells(tmp_path), []
    assert set(here(todo, say=said.append).values()) == {FINISHED}
    assert here(todo) == dict.fromkeys(todo, FINISHED)
    assert starts(tmp_path) == dict.fromkeys((cell.folder.name for cell in todo), 1)
    assert any("[4/4]" in text for text in said)


def test_a_failed_run_stays_visible_and_is_retried_only_if_asked(tmp_path):
    todo = cells(tmp_path, experiments=("Fails", "Diverges", "Refused"), seeds=1)
    for call in range(2):
        assert list(here(todo).values()) == [FAILED, DIVERGED, FAILED]
        assert [sum(starts(tmp_path).values()), call] == [2, call]  # Refused never gets so far
    assert [cell.why().split(":")[0] for cell in todo] == ["the disk is full", "loss is nan in step 3", "train.py"]
    statuses = here(todo, retry=True)
    assert starts(tmp_path)[todo[0].folder.name] == 2
    assert list(statuses.values()) == [FINISHED, FINISHED, FAILED]  # continued after what stopped them


def test_statuses_tell_what_is_there(tmp_path):
    cell = cells(tmp_path, "--pause", "0.1")[0]
    assert cell.status() == MISSING
    cell.run.mkdir(parents=True)
    assert cell.status() == INTERRUPTED
    for name in ("lock", "run/.lock"):
        with lock(cell.folder / name) as held:
            assert held
            assert cell.status() == RUNNING
            assert execute(cell, LAUNCHER) == RUNNING
    assert not starts(tmp_path)
    assert execute(cell, LAUNCHER) == FINISHED


def test_what_decides_a_run_decides_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    idea = tmp_path / "idea.py"
    idea.write_text("1")
    cell = Cell("idea.py:Mine", 1, ("--steps", "3"), tmp_path)
    folder = cell.folder
    assert folder == Cell.from_json(cell.to_json()).folder
    others = [Cell("Mine", 1, cell.options, tmp_path), Cell(cell.experiment, 2, cell.options, tmp_path)]
    others += [Cell(cell.experiment, 1, ("--steps", "4"), tmp_path)]
    assert len({folder, *(other.folder for other in others)}) == 4
    idea.write_text("2")
    assert cell.folder != folder


def compare_process(parent, *, pause, seeds=3):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_compare_runner as t; "
        "t.here(t.cells(Path(sys.argv[2]), '--pause', sys.argv[3], seeds=int(sys.argv[4])))"
    )
    words = [sys.executable, "-c", code, str(SUPPORT.parent), str(parent), str(pause), str(seeds)]
    return subprocess.Popen(words, start_new_session=True)


def kill_tree(process, only_it):
    """SIGKILL to the comparison alone, or to all that it started too, wherever they are."""
    import psutil

    victims = [] if only_it else psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for victim in victims:
        victim.kill()
    process.wait()


def table(parent, pause, seeds):
    return [cell.summary()["test_loss"] for cell in cells(parent, "--pause", str(pause), seeds=seeds)]


@pytest.mark.parametrize("only_it", [True, False])
def test_killed_at_random_moments_it_ends_as_if_it_were_not(tmp_path, only_it):
    draw, pause, seeds = random.Random(only_it), 0.1, 3
    for _ in range(5):
        process = compare_process(tmp_path / "killed", pause=pause, seeds=seeds)
        time.sleep(draw.uniform(0.5, 2.5))
        kill_tree(process, only_it)
    todo = cells(tmp_path / "killed", "--pause", str(pause), seeds=seeds)
    assert set(here(todo).values()) == {FINISHED}
    here(cells(tmp_path / "whole", "--pause", str(pause), seeds=seeds))
    assert table(tmp_path / "killed", pause, seeds) == table(tmp_path / "whole", pause, seeds)


def test_two_comparisons_at_once_run_nothing_twice(tmp_path):
    others = [compare_process(tmp_path, pause=0.05) for _ in range(2)]
    assert [process.wait(300) for process in others] == [0, 0]
    todo = cells(tmp_path, "--pause", "0.05", seeds=3)
    assert {cell.status() for cell in todo} == {FINISHED}
    assert starts(tmp_path) == dict.fromkeys((cell.folder.name for cell in todo), 1)


def test_a_run_of_a_comparison_that_dies_is_taken_over(tmp_path):
    process = compare_process(tmp_path, pause=0.3, seeds=1)
    while not starts(tmp_path):
        time.sleep(0.02)
    waiting = threading.Thread(target=lambda: here(cells(tmp_path, "--pause", "0.3", seeds=1)))
    waiting.start()
    time.sleep(0.3)
    kill_tree(process, only_it=False)
    waiting.join(300)
    assert {cell.status() for cell in cells(tmp_path, "--pause", "0.3", seeds=1)} == {FINISHED}


def test_an_interrupted_comparison_stops_its_runs_with_a_checkpoint(tmp_path):
    process = compare_process(tmp_path, pause=0.3)
    while len(starts(tmp_path)) < 2:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) != 0
    statuses = [cell.status() for cell in cells(tmp_path, "--pause", "0.3", seeds=3)]
    assert statuses.count(INTERRUPTED) == 2
    assert RUNNING not in statuses


def test_slots_are_shares_of_what_is_here():
    assert [slot.occupies for slot in gpu_slots("0,1/3", 4)] == [("gpu0", "gpu1"), ("gpu3",)]
    for groups in ("0,0", "0/0", "4", "a", "", "0,,1", "-1"):
        with pytest.raises(UsageError, match="expected groups"):
            gpu_slots(groups, 4)
    with pytest.raises(UsageError, match="slots"):
        cpu_slots(10_000)
    assert cpu_slots(1)[0].environment["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
text = open(script).read()
folder = re.search(r"--output=(\\S+)/", text)[1]
number = re.search(r"--array=0-(\\d+)", text)
tasks = range(int(number[1]) + 1) if number else [None]
job = str(os.getpid())
for task in tasks:
    more = {{"SLURM_JOB_ID": job if task is None else f"{{job}}{{task}}", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
             "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1",
             "SLURM_JOB_NODELIST": "here", "SLURM_NODELIST": "here"}}
    if task is not None:
        more |= {{"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(task)}}
    silent = {{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}}
    subprocess.Popen(["bash", script], env={{**os.environ, **more}}, **silent)
print("Submitted batch job", job)
"""
# without its options: what follows them is the command
SRUN = (
    '#!/bin/bash\nwhile [[ $1 == -* ]]; do case $1 in --*=*|--unbuffered) shift;; *) shift 2;; esac; done\nexec "$@"\n'
)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands on the path: a batch job runs here at once, and sacct has forgotten it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": SRUN,
        "sacct": "#!/bin/bash\necho 'JobID|State'\n",
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_jobs_of_submitit_end_as_runs_here_do(tmp_path, cluster, slurm):
    parent = tmp_path / "runs"
    todo = cells(parent) + cells(parent, experiments=("Diverges",), seeds=1)
    arguments = {"at_once": 2, "retry": False, "say": lambda text: None, "launcher": LAUNCHER}
    for _ in range(2):
        statuses = run_submitit(todo, cluster, {"timeout_min": 5}, **arguments)
        assert list(statuses.values()) == [FINISHED] * 4 + [DIVERGED]
    assert starts(parent) == dict.fromkeys((cell.folder.name for cell in todo), 1)
    here(cells(tmp_path / "here"))
    ours, theirs = (cells(p) for p in (parent, tmp_path / "here"))
    assert [c.summary()["test_loss"] for c in ours] == [c.summary()["test_loss"] for c in theirs]


def test_a_cell_survives_its_way_through_json():
    cell = Cell("a.py:B", 3, ("--set", 'x="1"'), Path("runs"))
    assert Cell.from_json(cell.to_json()) == cell
    assert json.loads(cell.to_json())[1] == 3


@pytest.mark.slow
def test_real_runs_killed_on_their_way_compare_as_if_they_were_not(tmp_path, monkeypatch, capsys):
    """train.py itself: the page's numbers after a SIGKILL in the middle are those of runs left alone."""
    from training_support import process_environment, small_overrides, write_corpus

    from march.compare import main

    corpus = write_corpus(tmp_path / "text.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, process_environment()[name])
    options = ["--source", "files", "--files", str(corpus), "--vocab-size", "400", "--steps", "12"]
    options += ["--checkpoint-every", "3", "--precision", "fp32", *small_overrides()]
    tables = []
    for runs in ("killed", "whole"):
        words = ["Baseline", "SquaredReLU", "--seeds", "2", "--slots", "1", "--runs", runs, "--out", f"{runs}-out"]
        if runs == "killed":
            words_there = [sys.executable, "-m", "march.compare.main", *words, "--", *options]
            process = subprocess.Popen(words_there, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            while not list(tmp_path.glob("killed/*/run/checkpoints/*/manifest.json")):
                assert process.poll() is None
                time.sleep(0.1)
            kill_tree(process, only_it=False)
        assert main.main([*words, "--", *options]) == 0, capsys.readouterr().err
        rows = json.loads((tmp_path / f"{runs}-out/report.json").read_text())["rows"]
        tables.append([(row["experiment"], row["losses"], row["difference"], row["verdict"]) for row in rows])
    assert tables[0] == tables[1]
