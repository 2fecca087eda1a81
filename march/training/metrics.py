"""What a run reports while it runs: JSON lines, trackers, and a live line on a terminal.

None of them may end a run: a full disk or a closed terminal is said once, and training goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO

from march.recipe import Logging
from march.training.distributed import log_rank0
from march.training.files import first_line, write_text
from march.training.runfolder import RunFolder
from march.training.trackers import FINAL, TRACKERS, About, TensorBoard, Tracker, scalars


class Metrics:
    """metrics.jsonl, tensorboard/ and other trackers, on rank 0.

    A line has: step (from 1), loss (mean over the global batch, float32 nats), lr, grad_norm (before clipping),
    tokens_per_second (corpus tokens), seconds (of the step), elapsed (training seconds so far, over all starts),
    and eval_loss where there was an evaluation.
    """

    def __init__(
        self,
        file: Path,
        tensorboard: Path | None,
        rows: Sequence[Mapping[str, Any]],
        about: About | None = None,
        trackers: Sequence[str] = (),
    ):
        """Begin with `rows`, those of the steps before; what else is in the file belongs to steps that run again.
        tensorboard: its folder, None for none. trackers: of TRACKERS, told what they lack of the rows."""
        self.rows = [dict(row) for row in rows]
        self._path = file
        self._descriptor: int | None = None
        self._written = 0
        self._said: set[str] = set()
        self._trackers: dict[str, Tracker] = {}
        step = self.rows[-1]["step"] if self.rows else 0
        if tensorboard is not None:
            self._open("tensorboard/", partial(TensorBoard, tensorboard, step, about))
        if about is not None:
            for name in trackers:
                self._open(name, partial(TRACKERS[name], about, file.parent))
        self._write()

    @classmethod
    def of(cls, folder: RunFolder, logging: Logging, run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Self:
        """Of a run in its folder, that continues after `rows`. run: what config.json says of it."""
        on_disk = {row["step"]: row for row in read(folder.metrics)}
        if lost := sum(row != on_disk.get(row["step"]) for row in rows):
            log_rank0(
                None, f"WARNING: {folder.metrics} lacked {lost} of {len(rows)} steps: written from the checkpoint"
            )
        board = folder.tensorboard if logging.tensorboard else None
        return cls(folder.metrics, board, rows, About.of(run) if run else None, logging.trackers or ())

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        self._write()
        for name in list(self._trackers):
            self._tell(name, row)

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same steps with something more."""
        changed = [(new, old) for new, old in zip(rows, self.rows, strict=True) if new != old]
        self.rows, self._written = [dict(row) for row in rows], 0
        self._release()
        self._write()
        for new, old in changed:
            for name in list(self._trackers):
                with self._spared(name):
                    self._trackers[name].add(new["step"], scalars({k: v for k, v in new.items() if old.get(k) != v}))

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run's end for trackers. summary: summary.json's content."""
        finished = bool(summary["finished"])
        known = {to: summary.get(name) for name, to in FINAL.items()} if finished else {}
        final = {f"final/{name}": float(loss) for name, loss in known.items() if isinstance(loss, float)}
        for name in list(self._trackers):
            with self._spared(name):
                self._trackers[name].end(self.rows[-1]["step"] if self.rows else 0, final, finished)

    def _open(self, name: str, make: Callable[[], Tracker]) -> None:
        """A tracker, told what it lacks of the steps before."""
        with self._spared(name):
            self._trackers[name] = make()
        for row in self.rows:
            self._tell(name, row)

    def _tell(self, name: str, row: Mapping[str, Any]) -> None:
        tracker = self._trackers.get(name)
        if tracker is not None and row["step"] > tracker.has:  # a step that ran again gave the same
            with self._spared(name):
                tracker.add(row["step"], scalars(row))

    @contextlib.contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """What a tracker raises ends it, not the run."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._trackers.pop(name, None)
            self._warn(name, error)

    def close(self) -> None:
        self._write()
        if self._written < len(self.rows):
            log_rank0(
                None,
                f"WARNING: {self._path} lacks the last {len(self.rows) - self._written} steps; a checkpoint has them",
            )
        self._release()

    def _write(self) -> None:
        """Every row that is not on the disk; after a failure the file anew, so that no half line stays in it."""
        try:
            if self._descriptor is not None and not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                raise OSError("the file was replaced")
            if self._descriptor is None:
                write_text(self._path, _lines(self.rows))
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            else:
                size, data = os.fstat(self._descriptor).st_size, _lines(self.rows[self._written :]).encode()
                if os.write(self._descriptor, data) != len(data):
                    os.ftruncate(self._descriptor, size)
                    raise OSError("the disk took half a line")
            self._written = len(self.rows)
        except OSError as error:
            self._release()
            self._warn(self._path.name, error)

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _warn(self, what: str, error: BaseException) -> None:
        if what not in self._said:
            self._said.add(what)
            log_rank0(None, f"WARNING: {what} could not be written ({first_line(error)}): training goes on without")


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl by step, each step's last one; [] without a file. Anything else in it, such as the
    half line that a kill leaves, is passed over."""
    rows: dict[int, dict[str, Any]] = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("loss"), float):
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


class LiveLine:
    """One line that is rewritten on a terminal; elsewhere a plain line every few steps. Silent on other ranks, and when
    the terminal has gone."""

    def __init__(
        self, steps: int, start: int, *, enabled: bool, stream: TextIO | None = None, every: int | None = None
    ):
        self._bar = None
        self._stream = stream = stream or sys.stderr
        self._steps = steps
        self._enabled = enabled
        self._every = every or max(1, steps // 20)
        if enabled and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps,
                initial=start,
                file=stream,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar:20}| {desc}{remaining} left",
            )

    def show(self, row: Mapping[str, Any], eval_loss: float | None, share: float | None, left: float) -> None:
        """Show a step. `share`: of the device's peak, 0..1 or None; `left`: seconds to the end."""
        parts = [f"loss {row['loss']:.4f}"]
        if eval_loss is not None:
            parts.append(f"eval {eval_loss:.4f}")
        parts.append(f"{short_number(row['tokens_per_second'])} tokens/s")
        if share is not None:
            parts.append(f"{share:.0%} of peak")
        text = " | ".join(parts)
        try:
            if self._bar is not None:
                self._bar.set_description_str(f"{text} | ", refresh=False)
                self._bar.update(1)
            elif self._enabled and (row["step"] % self._every == 0 or row["step"] in (1, self._steps)):
                print(f"step {row['step']}/{self._steps} | {text} | {clock(left)} left", file=self._stream, flush=True)
        except (OSError, ValueError):  # nobody is left to tell
            self._bar, self._enabled = None, False

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.close()


def short_number(value: float) -> str:
    """1234567 -> 1.23M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """3661 -> 1:01:01, 61 -> 1:01."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
