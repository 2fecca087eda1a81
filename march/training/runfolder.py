"""The folder of one run: what was asked, where it ran, what came out.

config.json         experiment, resolved configuration, difference from its base, budget, arguments, identity
environment.json    versions, commit, devices, processes, parameters; one entry for each start
metrics.jsonl       a line for each step (metrics.py)
tensorboard/        the same for TensorBoard
checkpoints/        checkpoint.py
summary.json        the end: losses, times, memory
curve.png           plot.py
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from march.training.distributed import World
from march.training.errors import UsageError

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "tokenizers", "datasets", "flash-attn")


class RunFolder:
    """Paths and files of one run. Only rank 0 writes."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.curve = path / "curve.png"

    @classmethod
    def create(cls, parent: Path, experiment: str, budget: str, given: Path | None) -> RunFolder:
        """A new folder: `given`, or `parent`/<experiment>-<budget>-<date>; a name in use gets a number.

        Raises:
            UsageError: `given` holds a run already, or cannot be made.
        """
        if given is not None:
            if (given / "config.json").exists():
                raise UsageError(
                    f"expected a new folder for --run-dir, got {given}, which holds a run; "
                    f"continue it with --resume {given}, or give another name"
                )
            candidates = [given]
        else:
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
            base = parent / f"{experiment}-{budget}-{stamp}"
            candidates = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 100))]
        for candidate in candidates:
            try:
                # two runs started in one second must not share a folder
                candidate.mkdir(parents=True, exist_ok=given is not None)
            except FileExistsError:
                continue
            except OSError as error:
                raise UsageError(
                    f"expected to create {candidate}, got {error.strerror}; give another --run-dir"
                ) from error
            return cls(candidate)
        raise UsageError(f"expected a free name beside {candidates[0]}, got none; give --run-dir")

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            UsageError: there is no config.json in it.
        """
        if not (path / "config.json").is_file():
            raise UsageError(f"expected a run folder with a config.json, got {path}; give the folder after --resume")
        return cls(path)

    @classmethod
    def newest(cls, parent: Path, experiment: str | None, budget: str | None) -> RunFolder:
        """The newest run under `parent`, of this experiment and budget where they are given.

        Raises:
            UsageError: there is none.
        """
        found = []
        for file in parent.glob("*/config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            if experiment in (None, config["experiment"]) and budget in (None, config["budget"]["name"]):
                found.append((config["started"], file.parent))
        if not found:
            what = " ".join(part for part in (experiment, budget) if part) or "any experiment"
            raise UsageError(f"expected a run of {what} in {parent}, got none; give its folder after --resume")
        return cls(max(found)[1])

    def read_config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace the JSON file `name`."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / name)

    def add_environment(self, entry: Mapping[str, Any]) -> None:
        """Append to environment.json: a resumed run may run elsewhere."""
        file = self.path / "environment.json"
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"] if file.exists() else []
        self.write("environment.json", {"starts": [*starts, dict(entry)]})


def refuse_other_identity(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """A run continues only as what it was.

    Raises:
        UsageError: naming every differing field, dotted, with both values.
    """
    before, now = _flat(stored), _flat(asked)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differing:
        fields = "; ".join(f"{key}: the run has {before.get(key)!r}, asked {now.get(key)!r}" for key in differing)
        raise UsageError(
            f"expected --resume with the run's own settings, got {fields}; leave these options out, or start a new run"
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat.update(_flat(value, f"{path}.{key}" if path else str(key)))
        return flat
    # what is read back from JSON has lists for tuples
    return {path: list(tree) if isinstance(tree, (tuple, list)) else tree}


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
