"""Checkpoints that survive a killed process, a full disk and flipped bytes.

Layout of a run's checkpoints/:

    step-00000100/          the number of finished steps
        model.pt            {parameter name: float32 tensor}
        exp_avg.pt, exp_avg_sq.pt
        state.json          step, and whatever else the run needs to continue
        manifest.json       size and sha256 of each file above; written last
    latest                  the name of the newest complete one

A checkpoint is written under a temporary name, flushed to the disk, renamed, and only then named in `latest`:
at any moment either it is there whole or it is not there. Loading verifies every hash and never unpickles
anything but tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from march.training.errors import RunError, UsageError

FORMAT = 1
_TAG = re.compile(r"step-\d{8}")
_TEMPORARY = ".incomplete-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `warning` says what was wrong with newer ones, if anything was."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    warning: str | None = None

    @property
    def step(self) -> int:
        """Finished optimiser steps."""
        return int(self.state["step"])


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


class Checkpoints:
    """The checkpoints of one run. Only rank 0 writes; every rank may read."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write one checkpoint, name it in `latest`, then remove all but the newest `keep`.

        Raises:
            RunError: the disk is full or not writable; earlier checkpoints are as they were.
        """
        target = self.directory / tag_of(step)
        temporary = self.directory / f"{_TEMPORARY}{target.name}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._check_space(tensors)
            temporary.mkdir()
            self._write_files(temporary, tensors, {**state, "step": step})
            if target.exists():
                # the same step again, after this one was found damaged and an older one was resumed
                os.replace(target, self.directory / f"{_TEMPORARY}replaced-{target.name}")
            os.replace(temporary, target)
            _flush_directory(self.directory)
            _write_text(self.directory / "latest", target.name)
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its zip writer
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"checkpoint of step {step} could not be written to {self.directory}: {_first_line(error)}; earlier "
                "checkpoints are intact: free space there, then continue with --resume"
            ) from error
        for old in self.tags()[: -self.keep]:
            shutil.rmtree(self.directory / old, ignore_errors=True)
        return target

    def tags(self) -> list[str]:
        """Complete or damaged, oldest first; temporary ones are not listed."""
        if not self.directory.is_dir():
            return []
        return sorted(path.name for path in self.directory.iterdir() if _TAG.fullmatch(path.name))

    def load(self, tag: str | None = None) -> Checkpoint:
        """The checkpoint `tag`, or the newest whole one.

        A missing or damaged `latest` is not the end: older ones are tried, and `warning` says so.

        Raises:
            UsageError: no whole checkpoint, or `tag` is not the name of one.
        """
        if tag is not None:
            if not _TAG.fullmatch(tag):
                raise UsageError(f"expected a checkpoint such as {tag_of(100)}, got {tag!r}; see {self.directory}")
            return self._read(self.directory / tag)
        candidates = self.tags()[::-1]
        if not candidates:
            raise UsageError(f"expected checkpoints in {self.directory}, got none; start without --resume")
        problems = []
        try:
            latest = (self.directory / "latest").read_text(encoding="utf-8").strip()
            if latest not in candidates:
                problems.append(f"`latest` names {latest!r}, which is not there")
            elif latest != candidates[0]:
                problems.append(f"`latest` names {latest}, but {candidates[0]} is newer")
        except (OSError, UnicodeDecodeError):
            problems.append("`latest` is missing or unreadable")
        for candidate in candidates:
            try:
                found = self._read(self.directory / candidate)
            except UsageError as error:
                problems.append(str(error))
                continue
            if not problems:
                return found
            warning = f"{'; '.join(problems)}: continuing from {candidate}"
            return Checkpoint(found.path, found.state, found.tensors, warning)
        raise UsageError(
            f"expected a whole checkpoint in {self.directory}, got only damaged ones ({'; '.join(problems)}); "
            "start again without --resume"
        )

    def _read(self, path: Path) -> Checkpoint:
        manifest = _read_manifest(path)
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise UsageError(f"{path.name}: expected the file {name}, got none; use another checkpoint")
            if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                raise UsageError(f"{path.name}: expected {name} as the manifest says, got other bytes; it is damaged")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {}
        for name in manifest["files"]:
            if not name.endswith(".pt"):
                continue
            try:
                tensors[name.removesuffix(".pt")] = torch.load(path / name, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise UsageError(
                    f"{path.name}: expected tensors in {name}, got something else; do not use it"
                ) from error
        return Checkpoint(path, state, tensors)

    def _write_files(
        self, directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        for part, named in tensors.items():
            with open(directory / f"{part}.pt", "wb") as file:
                torch.save(dict(named), file)
                file.flush()
                os.fsync(file.fileno())
        _write_text(directory / "state.json", json.dumps(state, indent=2))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(directory.iterdir())
        }
        _write_text(directory / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=2))
        _flush_directory(directory)

    def _check_space(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values()) + 2**20
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(f"{needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
        names = list(manifest["files"])
        entries = [(entry["bytes"], entry["sha256"]) for entry in manifest["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path.name}: expected a manifest, got {_first_line(error)}; it is damaged") from error
    if not known or any(Path(name).name != name for name in names) or "state.json" not in names or not entries:
        raise UsageError(f"{path.name}: expected a manifest of format {FORMAT}, got another; it is damaged")
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    """Replace `path` in one move, flushed: a reader sees the old text or the new, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush_directory(path.parent)


def _flush_directory(path: Path) -> None:
    """A rename is on the disk only when its directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
