"""Checkpoints that survive a killed process, a full disk, flipped bytes and a stranger's hand.

Layout of a run's checkpoints/:

    step-00000100/          the number of finished steps
        model.pt            {parameter name: float32 tensor}
        exp_avg.pt, exp_avg_sq.pt
        state.json          step, and all that the run needs to continue: its settings, its metrics
        manifest.json       size and sha256 of each file above; written last
    latest                  the name of the newest complete one

A checkpoint is written under a temporary name, flushed to the disk, renamed, and only then named in `latest`:
at any moment either it is there whole or it is not there. Loading verifies every hash, never unpickles
anything but tensors, and takes no checkpoint of another run. What is damaged or another run's is left where it is: it
counts for nothing, neither as one to keep nor as a newer one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from march.training.distributed import log_rank0
from march.training.errors import RunError, UsageError
from march.training.files import first_line, flush_directory, read_json, sha256, write_text

FORMAT = 3
_TAG = re.compile(r"step-\d{8}")
_TEMPORARY = ".incomplete-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `warning` says what was wrong with others, if anything was."""

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


def differences(stored: Any, asked: Any) -> list[tuple[str, Any, Any]]:
    """(dotted field, stored, asked) of two trees wherever they differ, by name."""
    before, now = _flat(stored), _flat(asked)
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat.update(_flat(value, f"{path}.{key}" if path else str(key)))
        return flat
    if isinstance(tree, float) and math.isnan(tree):
        tree = "nan"  # which would differ from itself
    # what is read back from JSON has lists for tuples
    return {path: list(tree) if isinstance(tree, (tuple, list)) else tree}


class Checkpoints:
    """The checkpoints of one run. Only rank 0 writes; every rank may read.

    fingerprint: the settings that the run's checkpoints carry in state["fingerprint"]; None: not known, not asked.
    """

    def __init__(self, directory: Path, keep: int, fingerprint: Mapping[str, Any] | None = None):
        self.directory = directory
        self.keep = keep
        self.fingerprint = fingerprint
        self.resumed: str | None = None  # the tag that this process continued from, which it does not remove

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, prune: bool = True
    ) -> Path:
        """Write one checkpoint, name it in `latest`, then remove older whole ones beyond the newest `keep`.

        Raises:
            RunError: a tensor is not finite, or the disk is full or not writable; earlier checkpoints are as they were.
        """
        for part, named in tensors.items():
            for name, tensor in named.items():
                if not torch.isfinite(tensor).all():
                    raise RunError(
                        f"{part} of {name} is not finite after step {step}: not saved, earlier checkpoints are intact; "
                        "continue from them with --resume and a lower learning rate, or look at the data of this step"
                    )
        target = self.directory / tag_of(step)
        temporary = self.directory / f"{_TEMPORARY}{target.name}"
        try:
            self._require_own_folder()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._check_space(tensors)
            temporary.mkdir()
            self._write_files(temporary, tensors, {**state, "step": step})
            if os.path.lexists(target):
                self._set_aside(target)
            os.replace(temporary, target)
            flush_directory(self.directory)
            write_text(self.directory / "latest", target.name)
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its zip writer
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"checkpoint of step {step} could not be written to {self.directory}: {first_line(error)}; earlier "
                "checkpoints are intact: free space there, then continue with --resume"
            ) from error
        if prune:
            self._prune(step)
        return target

    def _prune(self, step: int) -> None:
        """Whole ones of this run before `step`, beyond the newest keep - 1, go; not the one that was resumed."""
        kept = 1
        for tag in self.tags()[::-1]:
            # later steps are not this run's past, whatever they are
            if tag >= tag_of(step) or tag == self.resumed:
                continue
            try:
                self._read(self.directory / tag)
                kept += 1
                if kept > self.keep:
                    self._remove(self.directory / tag)
            except UsageError as error:
                log_rank0(None, f"WARNING: left as it is: {error}")

    def tags(self) -> list[str]:
        """Complete or damaged, oldest first; temporary ones are not listed."""
        if not self.directory.is_dir():
            return []
        return sorted(path.name for path in self.directory.iterdir() if _TAG.fullmatch(path.name))

    def load(
        self,
        tag: str | None = None,
        *,
        before: int | None = None,
        check: Callable[[Checkpoint], object] = lambda checkpoint: None,
    ) -> Checkpoint:
        """The checkpoint `tag`, or the newest whole one of this run (`before`: with fewer finished steps than that;
        `check` raises UsageError for those that will not do).

        A missing or damaged `latest` is not the end: older ones are tried, and `warning` says so. Where the run's
        fingerprint is not known, it is that of the one which `latest` names.

        Raises:
            UsageError: no whole checkpoint, or `tag` is not the name of one.
        """
        self._require_own_folder()
        if tag is not None:
            if not _TAG.fullmatch(tag):
                raise UsageError(f"expected a checkpoint such as {tag_of(100)}, got {tag!r}; see {self.directory}")
            return self._read(self.directory / tag)
        candidates = [name for name in self.tags()[::-1] if before is None or name < tag_of(before)]
        if not candidates:
            when, fix = ("", "start without --resume") if before is None else (f" before step {before}", "see there")
            raise UsageError(f"expected checkpoints{when} in {self.directory}, got none; {fix}")
        problems, foreign = [], False
        if before is None:
            latest = self._latest()
            if latest is None:
                problems.append("`latest` is missing or unreadable")
            elif latest not in candidates:
                problems.append(f"`latest` names {latest!r}, which is not there")
            elif latest != candidates[0]:
                problems.append(f"`latest` names {latest}, but {candidates[0]} is newer")
            if self.fingerprint is None and latest in candidates:
                with contextlib.suppress(UsageError):  # then nothing is known
                    self.fingerprint = read_json(self.directory / latest / "state.json").get("fingerprint")
        for candidate in candidates:
            try:
                found = self._read(self.directory / candidate)
                check(found)
            except UsageError as error:
                foreign |= isinstance(error, _Foreign)
                problems.append(str(error))
                continue
            if not problems:
                return found
            return replace(found, warning=f"{'; '.join(problems)}: continuing from {candidate}")
        what, fix = "damaged ones", "start again without --resume"
        if foreign:
            what, fix = "another run's or damaged ones", f"{fix}, or remove config.json if that is another run's"
        raise UsageError(
            f"expected a whole checkpoint in {self.directory}, got only {what} ({'; '.join(problems)}); {fix}"
        )

    def states(self) -> Iterator[dict[str, Any]]:
        """The states of checkpoints, newest first, without their tensors; unreadable ones are passed over."""
        for tag in self.tags()[::-1]:
            try:
                yield read_json(self.directory / tag / "state.json")
            except UsageError:
                continue

    def _latest(self) -> str | None:
        try:
            return (self.directory / "latest").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def _verify(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        """Names of files and the state of a checkpoint whose bytes are as they were written and which is this run's."""
        if path.is_symlink():
            raise UsageError(f"{path.name}: expected a folder, got a symbolic link; it is not ours")
        names = _read_manifest(path)
        state = _of(path, read_json, path / "state.json")
        if type(state.get("step")) is not int or tag_of(state["step"]) != path.name:
            raise UsageError(
                f"{path.name}: expected the state of this step, got step {state.get('step')!r}; it is damaged"
            )
        if self.fingerprint is not None:
            odd = differences(state.get("fingerprint"), self.fingerprint)
            if odd:
                fields = "; ".join(f"{key} is {theirs!r} there, {ours!r} here" for key, theirs, ours in odd[:4])
                raise _Foreign(f"{path.name}: expected a checkpoint of this run, got another's ({fields})")
        return names, state

    def _read(self, path: Path) -> Checkpoint:
        names, state = self._verify(path)
        tensors = {}
        for name in names:
            if not name.endswith(".pt"):
                continue
            try:
                tensors[name.removesuffix(".pt")] = _finite_tensors(
                    torch.load(path / name, map_location="cpu", weights_only=True)
                )
            except MemoryError:
                raise
            except Exception as error:  # whatever a foreign file makes the reader raise, it holds no tensors of ours
                raise UsageError(
                    f"{path.name}: expected tensors in {name}, got {first_line(error)[:80]}; do not use it"
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
        write_text(directory / "state.json", json.dumps(state))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(directory.iterdir())
        }
        write_text(directory / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=2))
        flush_directory(directory)

    def _require_own_folder(self) -> None:
        if self.directory.is_symlink():
            raise UsageError(f"expected {self.directory} to be a folder, got a symbolic link; put the folder there")

    def _check_space(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values()) + 2**20
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free")

    def _set_aside(self, target: Path) -> None:
        """Makes room for a step that is there already: found damaged, or another run's, when this one was resumed."""
        try:
            self._verify(target)
        except UsageError as error:
            number = 1
            while os.path.lexists(aside := self.directory / f"aside-{target.name}-{number}"):
                number += 1
            os.replace(target, aside)
            log_rank0(None, f"WARNING: {error}: kept as {aside.name}")
        else:
            self._remove(target)

    def _remove(self, path: Path) -> None:
        """By a rename first: a process killed here leaves no half checkpoint under its name."""
        hidden = self.directory / f"{_TEMPORARY}removed-{path.name}"
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)


class _Foreign(UsageError):
    """Whole, and of another run."""


def _read_manifest(path: Path) -> list[str]:
    """Names of a checkpoint's files, after comparing each with its size and hash."""
    manifest = _of(path, read_json, path / "manifest.json")
    files = manifest.get("files")
    if manifest.get("format") != FORMAT:
        raise UsageError(
            f"{path.name}: expected format {FORMAT}, got {manifest.get('format')!r}; it is damaged or too old"
        )
    if not isinstance(files, dict) or "state.json" not in files or any(Path(name).name != name for name in files):
        raise UsageError(f"{path.name}: expected a manifest of files, got another; it is damaged")
    for name, entry in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise UsageError(f"{path.name}: expected the file {name}, got none; use another checkpoint")
        expected = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else None
        if expected is None or file.stat().st_size != expected[0] or _of(path, sha256, file) != expected[1]:
            raise UsageError(f"{path.name}: expected {name} as the manifest says, got other bytes; it is damaged")
    return list(files)


def _of(path: Path, read: Any, file: Path) -> Any:
    """read(file), its errors with the checkpoint's name before them."""
    try:
        return read(file)
    except (OSError, UsageError) as error:
        raise UsageError(f"{path.name}: {first_line(error)}") from error


def _finite_tensors(loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and type(tensor) is Tensor for name, tensor in loaded.items()
    ):
        raise ValueError("other objects")
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} that is not finite")
    return loaded
