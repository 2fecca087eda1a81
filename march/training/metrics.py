"""What a run reports while it runs: JSON lines, TensorBoard, and a live line on a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class Metrics:
    """metrics.jsonl and tensorboard/, on rank 0.

    A line has: step (from 1), loss (mean over the global batch, float32 nats), lr, grad_norm (before clipping),
    tokens_per_second (corpus tokens), seconds (of the step), elapsed (training seconds so far, over all starts),
    and eval_loss where there was an evaluation.
    """

    def __init__(self, file: Path, tensorboard: Path, resume_step: int):
        """Keep the lines up to `resume_step`; later ones belong to steps that are about to run again."""
        from torch.utils.tensorboard import SummaryWriter

        self.rows = [row for row in read(file) if row["step"] <= resume_step]
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(temporary, file)
        self._file = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 closed in close()
        self._board = SummaryWriter(str(tensorboard), purge_step=resume_step + 1 if resume_step else None)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"train/{name}" if name != "eval_loss" else "eval/loss", value, row["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is dropped. [] without a file."""
    if not file.exists():
        return []
    rows = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows


class LiveLine:
    """One line that is rewritten on a terminal; elsewhere a plain line every few steps. Silent on other ranks."""

    def __init__(self, steps: int, start: int, *, enabled: bool, stream: TextIO = sys.stderr, every: int | None = None):
        self._bar = None
        self._stream = stream
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
        if self._bar is not None:
            self._bar.set_description_str(f"{text} | ", refresh=False)
            self._bar.update(1)
        elif self._enabled and (row["step"] % self._every == 0 or row["step"] in (1, self._steps)):
            print(f"step {row['step']}/{self._steps} | {text} | {clock(left)} left", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """A message of its own line, without tearing the live one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
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
