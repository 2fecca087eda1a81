"""One run of a comparison: a folder that only what is run decides, and the one way to bring it to its end.

    <parent>/<experiment>-seed<N>-<digest>/
        lock           held by the process that runs it, and by its train.py: who else comes leaves it alone
        log.txt        what train.py printed
        failed.json    how it ended, where train.py itself left no word
        run/           train.py's run folder

All state is in there: whoever asks for the same run again, after a crash or from another comparison, finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from march.console import UsageError
from march.training.files import read_json, write_json

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
FINISHED, FAILED, DIVERGED = "finished", "failed", "diverged"
RUNNING, INTERRUPTED, MISSING = "running", "interrupted", "missing"
SAVING = 120.0  # seconds, at most
ENDED = (FINISHED, FAILED, DIVERGED)  # not run again, but for --retry


@dataclass(frozen=True)
class Cell:
    """An experiment, its seed, the other options of train.py, and the folder that the runs of all comparisons share."""

    experiment: str
    seed: int
    options: tuple[str, ...]
    parent: Path

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps([_content(word) for word in (self.experiment, *self.options)]).encode())
        name = "".join(c if c.isalnum() else "-" for c in self.experiment.rpartition("/")[2])
        return self.parent / f"{name}-seed{self.seed}-{digest.hexdigest()[:10]}"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def words(self) -> list[str]:
        """Options of train.py."""
        return ["--exp", self.experiment, "--seed", str(self.seed), *self.options]

    def summary(self) -> dict[str, Any]:
        return read_or_empty(self.run / "summary.json")

    def status(self) -> str:
        """FINISHED, FAILED, DIVERGED, RUNNING, INTERRUPTED or MISSING."""
        status = self.ended()
        if status:
            return status
        for name in ("lock", "run/.lock"):  # the second outlives a launcher that was killed
            with lock(self.folder / name, create=False) as held:
                if held is None:
                    return RUNNING
        return self.ended() or (INTERRUPTED if self.run.exists() else MISSING)

    def ended(self) -> str | None:
        summary = self.summary()
        if summary.get("finished") is True:
            return FINISHED
        if "failed_step" in summary:
            return DIVERGED
        return FAILED if "failed" in summary or (self.folder / "failed.json").exists() else None

    def why(self) -> str:
        """What a failed run said."""
        return str(self.summary().get("failed") or read_or_empty(self.folder / "failed.json").get("failed", ""))

    def to_json(self) -> str:
        return json.dumps([self.experiment, self.seed, self.options, str(self.parent)])

    @classmethod
    def from_json(cls, text: str) -> Cell:
        experiment, seed, options, parent = json.loads(text)
        return cls(experiment, seed, tuple(options), Path(parent))


def _content(word: str) -> str:
    """The word, and the digest of the file that it names: an idea that was edited is another run."""
    path = word.rpartition(":")[0] or word
    for name in (word, path):
        if os.path.isfile(name):
            return f"{word} {hashlib.sha256(Path(name).read_bytes()).hexdigest()}"
    return word


def read_or_empty(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UsageError:
        return {}


@contextlib.contextmanager
def lock(path: Path, *, create: bool = True, patience: float = 0.0) -> Iterator[int | None]:
    """The descriptor of `path`, locked until the block and every process that was given it have ended; None where
    another has it. Without `create` and without the file nothing is locked, and the descriptor is -1.

    patience: seconds to try for; who only looks whether a lock is held has it for a moment too.
    """
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.exists():
        yield -1
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    yield None
                    return
                time.sleep(0.02)
        yield descriptor
    finally:
        os.close(descriptor)


def execute(
    cell: Cell,
    launcher: Sequence[str] = (sys.executable, str(TRAIN)),
    retry: bool = False,
) -> str:
    """Start the run, or continue it, and wait for its end; returns the status then. Does nothing where the run has
    ended (a failed one: unless `retry`), and where another process has it. SIGTERM and SIGINT go on to train.py, which
    saves a checkpoint."""
    with lock(cell.folder / "lock", patience=0.5) as held:
        if held is None:
            return RUNNING
        status = cell.ended()
        if status == FINISHED or (status and not retry):
            return status
        with lock(cell.run / ".lock", create=False, patience=0.5) as own:
            if own is None:
                return RUNNING
        (cell.folder / "failed.json").unlink(missing_ok=True)
        checkpoints = cell.run / "checkpoints"
        if checkpoints.is_dir() and any(checkpoints.glob("*/manifest.json")):
            words = ["--resume", str(cell.run)]
        else:  # killed before its first checkpoint: nothing to continue from
            if cell.run.exists():
                shutil.rmtree(cell.run)
            words = [*cell.words, "--run-dir", str(cell.run)]
        with open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*launcher, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(held,),
                env={**os.environ, "PYTHONPATH": python_path()},
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: process.send_signal(signal.SIGTERM))
            code = process.wait()
            with lock(cell.run / ".lock", create=False, patience=SAVING):
                pass  # ranks outlive a launcher that was killed, and save: their devices are not free yet
        status = cell.ended()
        # DeepSpeed's launcher, ended by a signal, gives 1: a run that saved has said in which step
        if status is None and 0 < code < 128 and "steps" not in cell.summary():
            lines = (cell.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            write_json(cell.folder / "failed.json", {"failed": lines[-1] if lines else f"exit code {code}"})
            status = FAILED
        return status or INTERRUPTED


def python_path() -> str:
    """This source tree first, whatever is installed."""
    return os.pathsep.join(filter(None, (str(TRAIN.parent), os.environ.get("PYTHONPATH"))))


if __name__ == "__main__":
    cell, launcher, retry = sys.argv[1:]
    execute(Cell.from_json(cell), json.loads(launcher), retry == "retry")
