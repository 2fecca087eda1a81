"""The folder of one run: what was asked, where it ran, what came out.

<name>.py           the experiment's own file, where it has one; .1.py: as it was before --accept-changed-file
config.json         experiment, resolved configuration, difference from its base, recipe, fingerprint
recipe.toml         the same run again: train.py --recipe
tokenizer.json      of the text, for who uses the model
environment.json    versions, commit, devices, processes, parameters; one entry for each start
metrics.jsonl       a line for each step (metrics.py)
tensorboard/        the same for TensorBoard
checkpoints/        checkpoint.py
summary.json        the end: "finished" true or false, losses, times, memory
curve.png           plot.py
.lock               held by the process that runs in the folder

All but the checkpoints are for people: a run continues from a whole checkpoint alone, and writes the others anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from march.training.checkpoint import Checkpoints, differences
from march.training.distributed import World, log_rank0
from march.training.errors import UsageError
from march.training.files import read_json, write_json

LOCK = ".lock"
PACKAGES = ("torch", "triton", "deepspeed", "numpy", "tokenizers", "datasets", "flash-attn")


class RunFolder:
    """Paths and files of one run. Only rank 0 writes, and holds the lock."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.curve = path / "curve.png"
        self._lock: int | None = None

    @classmethod
    def create(cls, parent: Path, experiment: str, recipe: str, seed: int, given: Path | None) -> RunFolder:
        """A new folder, locked: `given`, or `parent`/<experiment>-<recipe>[-seed<seed>]-<date>; a name in use gets a
        number, and seed 42, the recipe's, is not written.

        Raises:
            UsageError: `given` holds something already, or cannot be made.
        """
        if given is not None:
            candidates = [given]
        else:
            seeded = "" if seed == 42 else f"-seed{seed}"
            base = parent / f"{experiment}-{recipe}{seeded}-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}"
            candidates = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 100))]
        for candidate in candidates:
            try:
                # two runs started in one second must not share a folder
                candidate.mkdir(parents=True, exist_ok=given is not None)
            except FileExistsError:
                if given is None:
                    continue
                raise UsageError(f"expected a new folder for --run-dir, got the file {given}; give another") from None
            except OSError as error:
                raise UsageError(
                    f"expected to create {candidate}, got {error.strerror}; give another --run-dir"
                ) from error
            folder = cls(candidate)
            folder.lock()
            held = sorted(path.name for path in candidate.iterdir() if path.name != LOCK)
            if held:
                folder.unlock()
                fix = f"continue the run in it with --resume {given}, or " if folder.holds_run() else ""
                raise UsageError(
                    f"expected a new folder for --run-dir, got {given}, which holds "
                    f"{'a run' if fix else ', '.join(held[:3])}; {fix}give another name"
                )
            return folder
        raise UsageError(f"expected a free name beside {candidates[0]}, got none; give --run-dir")

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that was started before, locked.

        Raises:
            UsageError: there is no run in it, it cannot be written to, or another process runs in it.
        """
        folder = cls(path)
        if not folder.holds_run():
            raise UsageError(f"expected a run folder with a config.json, got {path}; give the folder after --resume")
        folder.lock()
        return folder

    @classmethod
    def newest(cls, parent: Path, experiment: str | None, recipe: str | None) -> RunFolder:
        """The newest run under `parent`, of this experiment and recipe where they are given, locked.

        Raises:
            UsageError: there is none.
        """
        found, unknown = [], []
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            folder = cls(path)
            if not folder.holds_run():
                continue
            told = next((run for run in folder.told() if _is_told(run)), None)
            if told is None:
                unknown.append(path.name)
            elif experiment in (None, told["experiment"]) and recipe in (None, told["recipe"]["name"]):
                found.append((told["started"], path))
        if not found:
            what = " ".join(part for part in (experiment, recipe) if part) or "any experiment"
            aside = f" (unreadable: {', '.join(unknown)})" if unknown else ""
            raise UsageError(f"expected a run of {what} in {parent}, got none{aside}; give its folder after --resume")
        return cls.existing(max(found)[1])

    def holds_run(self) -> bool:
        return (self.path / "config.json").is_file() or self.checkpoints.is_dir()

    def told(self) -> Iterator[dict[str, Any]]:
        """What config.json says of the run, then what each checkpoint does, newest first, where they can be read."""
        with contextlib.suppress(UsageError):
            yield read_json(self.path / "config.json")
        for state in Checkpoints(self.checkpoints, 1).states():
            if isinstance(state.get("run"), dict):
                yield state["run"]

    def lock(self) -> None:
        """Make this process the folder's only owner, until it ends in whatever way.

        Raises:
            UsageError: another one is, or the folder cannot be written to.
        """
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UsageError(
                f"expected a run folder that can be written to, got {self.path} ({error.strerror}); copy it to another "
                "place and --resume the copy"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 100).decode(errors="replace").strip()
            os.close(descriptor)
            raise UsageError(
                f"expected a run folder of its own, got {self.path}, in which process {owner or '?'} is running; wait "
                "for its end, or give another folder"
            ) from None
        with contextlib.suppress(OSError):  # who owns it is only for the message; a full disk must not stop a resume
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace the JSON file `name`."""
        write_json(self.path / name, content)

    def keep(self, file: Path, content: bytes) -> None:
        """A copy of the experiment's own file, as it was loaded; an earlier one, of other content, gets a number."""
        copy, number = self.path / file.name, 1
        if copy.exists() and copy.read_bytes() != content:
            while (earlier := copy.with_suffix(f".{number}.py")).exists():
                number += 1
            copy.rename(earlier)
        if not copy.exists():
            copy.write_bytes(content)

    def add_environment(self, entry: Mapping[str, Any]) -> None:
        """Append to environment.json: a resumed run may run elsewhere."""
        file = self.path / "environment.json"
        starts: list[Any] = []
        if os.path.lexists(file):
            try:
                starts = list(read_json(file).get("starts", []))
            except (UsageError, TypeError) as error:
                log_rank0(None, f"WARNING: {error}: earlier starts are lost")
        try:
            self.write("environment.json", {"starts": [*starts, dict(entry)]})
        except OSError as error:
            log_rank0(None, f"WARNING: {file} could not be written ({error.strerror}): the run goes on without")


def _is_told(run: Mapping[str, Any]) -> bool:
    """Whether it says what `newest` asks."""
    recipe = run.get("recipe")
    names = (run.get("experiment"), run.get("started"), recipe.get("name") if isinstance(recipe, dict) else None)
    return all(isinstance(name, str) for name in names)


def refuse_other_fingerprint(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """A run continues only as what it was.

    Raises:
        UsageError: naming every differing field, dotted, with both values.
    """
    odd = differences(stored, asked)
    if odd:
        fields = "; ".join(f"{key}: the run has {theirs!r}, asked {ours!r}" for key, theirs, ours in odd)
        raise UsageError(
            f"expected --resume with the run's own settings, got {fields}; leave these options out, or start a new run"
        )


def environment(world: World, **facts: Any) -> dict[str, Any]:
    """Versions, commit, devices and processes of this start, with `facts` added."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        **git_state(Path(__file__).resolve().parents[2]),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": device_name(world),
        "processes": world.size,
        **facts,
    }


def git_state(root: Path) -> dict[str, Any]:
    """{"commit": hash or None, "uncommitted_changes": bool or None} of the source tree at `root`."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": None if status is None else bool(status)}


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(world: World) -> str:
    """The name that `march.cost` looks the device's peak up by; the processor's on a CPU."""
    import torch

    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else processor_name()


def peak_memory(world: World) -> dict[str, float]:
    """Peak memory of this process in MiB: the device's allocations on CUDA, resident set size on a CPU."""
    import torch

    if world.device.type == "cuda":
        return {"peak_device_memory_mib": torch.cuda.max_memory_allocated(world.device) / 2**20}
    import resource

    return {"peak_resident_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def process_age() -> float:
    """Seconds since this process was started, interpreter start-up and imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()
