"""Runs the cells of a comparison that have not ended: over groups of GPUs or CPU slots here, or through submitit.

Nothing is kept beside the cells' folders and the locks: any number of comparisons may run, be killed and begin again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from march.compare.cell import ENDED, FINISHED, INTERRUPTED, RUNNING, TRAIN, Cell, execute, lock, python_path
from march.console import UsageError
from march.training.metrics import clock, read

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
POLL = 0.3  # seconds; longer where looking takes long: 240 runs' statuses took a fifth of a core
SAID_EVERY = 60.0  # seconds
Say = Callable[[str], None]


@dataclass(frozen=True)
class Slot:
    """Where one run at a time fits: its launcher, its environment, and what it occupies on this host."""

    launcher: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False)
    occupies: tuple[str, ...]


def cpu_slots(number: int) -> list[Slot]:
    """This machine's cores in `number` equal shares."""
    cores = len(os.sched_getaffinity(0))
    if not 1 <= number <= cores:
        raise UsageError(f"expected 1 to {cores} slots on {cores} cores, got {number}; each needs a core")
    threads = {"OMP_NUM_THREADS": str(cores // number)}
    return [Slot((sys.executable, str(TRAIN)), threads, (f"cpu{i}",)) for i in range(number)]


def gpu_slots(groups: str, visible: int) -> list[Slot]:
    """Groups such as "0,1/2,3" of `visible` GPUs; where CUDA_VISIBLE_DEVICES names those, in its order.

    DeepSpeed takes the group from that variable: beside --include or --num_gpus it would count all the host's GPUs.
    """
    found = [group.split(",") for group in groups.split("/")]
    used = [gpu for group in found for gpu in group]
    if not all(gpu.isdecimal() and int(gpu) < visible for gpu in used) or len(set(used)) < len(used):
        raise UsageError(
            f"expected groups of different GPUs from 0 to {visible - 1}, such as 0,1/2,3, got {groups!r}; "
            "leave --gpus out for one group of all"
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(visible)]
    slots = []
    for group in found:
        own = [names[int(gpu)] for gpu in group]
        port = 29500 + int(own[0]) if own[0].isdecimal() else 29500 + int(group[0])
        launcher = (DEEPSPEED, f"--master_port={port}", str(TRAIN))
        slots.append(Slot(launcher, {"CUDA_VISIBLE_DEVICES": ",".join(own)}, tuple(f"gpu{name}" for name in own)))
    return slots


class Progress:
    """What has ended and how long the rest may take, said when something ends and each minute."""

    def __init__(self, cells: Sequence[Cell], workers: int, say: Say):
        self._cells, self._workers, self._say = cells, max(1, workers), say
        self._statuses: dict[Cell, str] = {}
        self._last = time.monotonic()

    def update(self) -> dict[Cell, str]:
        """The statuses now; those of finished cells are not read again."""
        before = dict(self._statuses)
        for cell in self._cells:
            if self._statuses.get(cell) != FINISHED:
                self._statuses[cell] = cell.status()
        news = [c for c in self._cells if self._statuses[c] in ENDED and before and before[c] not in ENDED]
        parts = [f"{cell.experiment} seed {cell.seed}: {outcome(cell)}" for cell in news]
        if parts or time.monotonic() - self._last > SAID_EVERY:
            left = self._left()
            for part in parts or ["running"]:
                self._say(f"{self._counts()} | {part}" + (f" | {clock(left)} left" if left else ""))
            self._last = time.monotonic()
        return dict(self._statuses)

    def _counts(self) -> str:
        states = list(self._statuses.values())
        ended = sum(state in ENDED for state in states)
        failed = ended - states.count(FINISHED)
        return f"[{ended}/{len(states)}]" + f" {failed} failed" * bool(failed)

    def _left(self) -> float | None:
        """Seconds to the end: the mean time of the finished ones for what the others lack; None before the first."""
        times = [c.summary().get("process_seconds") for c, state in self._statuses.items() if state == FINISHED]
        known = [float(seconds) for seconds in times if isinstance(seconds, int | float)]
        if not known:
            return None
        steps = max((int(c.summary().get("steps") or 0) for c, s in self._statuses.items() if s == FINISHED), default=0)
        share = 0.0
        for cell, state in self._statuses.items():
            if state not in ENDED:
                rows = read(cell.run / "metrics.jsonl") if state in (RUNNING, INTERRUPTED) else []
                share += 1 - (min(1.0, rows[-1]["step"] / steps) if rows and steps else 0.0)
        return share * sum(known) / len(known) / self._workers


def outcome(cell: Cell) -> str:
    """How a run ended, in a few words."""
    summary = cell.summary()
    if cell.ended() != FINISHED:
        return f"{cell.ended()}: {cell.why()[:160]}; {cell.folder / 'log.txt'}"
    return f"test loss {summary.get('test_loss', math.nan):.4f}, {summary.get('process_seconds', math.nan):.0f} s"


def run_here(cells: Sequence[Cell], slots: Sequence[Slot], *, retry: bool, say: Say) -> dict[Cell, str]:
    """Run the cells in the slots of this host until each has ended; returns the statuses.

    A cell that another comparison runs is waited for, and taken over where that one dies. A run that is killed is not
    started twice in one call. On an exception, such as KeyboardInterrupt, the runs are stopped with a checkpoint.
    """
    progress = Progress(cells, len(slots), say)
    statuses = progress.update()
    todo = [c for c in cells if statuses[c] not in ENDED or (retry and statuses[c] != FINISHED)]
    running: dict[Slot, tuple[subprocess.Popen[bytes], Cell, ExitStack]] = {}
    locks = (cells[0].parent if cells else Path()) / ".slots"
    tried: set[Cell] = set()
    try:
        while True:
            for slot, (process, cell, stack) in list(running.items()):
                if process.poll() is not None:
                    stack.close()
                    del running[slot]
                    if cell.status() != RUNNING:  # another comparison's otherwise
                        tried.add(cell)
            begin = time.perf_counter()
            statuses = progress.update()
            pause = max(POLL, 20 * (time.perf_counter() - begin))
            mine = {cell for _, cell, _ in running.values()}
            left = [c for c in todo if c not in tried and c not in mine and (retry or statuses[c] not in ENDED)]
            if not left and not running:
                return statuses
            ready = [c for c in left if statuses[c] != RUNNING]
            for slot in slots:
                if not ready or slot in running:
                    continue
                stack = ExitStack()
                names = [locks / f"{platform.node()}-{name}" for name in slot.occupies]
                held = [stack.enter_context(lock(name)) for name in names]
                if None in held:
                    stack.close()
                    continue
                cell = ready.pop(0)
                running[slot] = (_start(cell, slot, retry, [fd for fd in held if fd is not None]), cell, stack)
            time.sleep(pause)
    finally:
        for process, _, _ in running.values():
            process.send_signal(signal.SIGTERM)
        for process, _, stack in running.values():
            process.wait()
            stack.close()


def _start(cell: Cell, slot: Slot, retry: bool, held: list[int]) -> subprocess.Popen[bytes]:
    """A process of its own: it and its run outlive this one, and keep what they hold."""
    words = [sys.executable, "-m", "march.compare.cell", cell.to_json(), json.dumps(slot.launcher)]
    return subprocess.Popen(
        [*words, "retry" if retry else "once"],
        stdin=subprocess.DEVNULL,
        pass_fds=held,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": python_path(), **slot.environment},
    )


def run_submitit(
    cells: Sequence[Cell],
    cluster: str,
    parameters: Mapping[str, Any],
    *,
    at_once: int,
    retry: bool,
    say: Say,
    launcher: Sequence[str] = (),
) -> dict[Cell, str]:
    """Submit a job for each cell that has not ended and wait for all; returns the statuses.

    cluster: "slurm" or "local", submitit's. parameters: of its AutoExecutor, such as gpus_per_node or
    slurm_partition. A job of an earlier call that still waits in the queue is harmless: it ends at once where its run
    has ended.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError("expected submitit for --cluster, got none; pip install 'march[slurm]'") from None
    progress = Progress(cells, at_once, say)
    statuses = progress.update()
    todo = [c for c in cells if statuses[c] not in ENDED or (retry and statuses[c] != FINISHED)]
    if not todo:
        return statuses
    executor = submitit.AutoExecutor(folder=todo[0].parent / ".submitit", cluster=cluster)
    if cluster == "slurm":
        parameters = {"slurm_array_parallelism": at_once, **parameters}
    executor.update_parameters(**parameters)
    launcher = launcher or (DEEPSPEED if parameters.get("gpus_per_node") else sys.executable, str(TRAIN))
    absolute = [Cell(c.experiment, c.seed, c.options, c.parent.absolute()) for c in todo]
    jobs: list[Any] = []
    waiting = list(absolute)
    while waiting or not all(job.done() for job in jobs):
        # Slurm has a queue of its own; submitit's local processes all start at once
        free = len(waiting) if cluster == "slurm" else at_once - sum(not job.done() for job in jobs)
        if waiting and free > 0:
            now, waiting = waiting[:free], waiting[free:]
            jobs += executor.map_array(execute, now, [launcher] * len(now), [retry] * len(now))
        progress.update()
        time.sleep(POLL)
    return progress.update()
