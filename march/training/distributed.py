"""Processes: the environment DeepSpeed expects, agreement between ranks, signals, and a launcher that died.

Everything here works with one process and no launcher too; `python train.py` and `deepspeed train.py` take
the same path.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as torch_distributed

from march.training.errors import RunError, UsageError

T = TypeVar("T")

# Longer than any honest step or data preparation of the embedded corpus; a lost peer is reported after it.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def prepare_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* where no launcher did, and a free port for a single process.

    Without them DeepSpeed looks for MPI. The launcher's default port 29500 belongs to the first run on a host;
    a single process listens to nobody else, so it always takes a free one.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" or "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start() -> World:
    """Join the process group (NCCL on CUDA, gloo on a CPU) and return this process's place in it."""
    prepare_environment()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", size)))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # Two processes with all cores each are slower than with half each.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if not torch_distributed.is_initialized():
        _init_process_group(device)
    return World(rank, size, local_rank, local_size, device)


def _init_process_group(device: torch.device) -> None:
    import deepspeed
    import deepspeed.ops

    # A C++ op for shared-memory communication that only inference uses: building it takes 60 s and a compiler.
    # An op marked incompatible is not built (measured: 12-19 s to the first step instead of 75).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=COLLECTIVE_TIMEOUT,
    )


def stop(world: World) -> None:
    """Leave the process group after everybody has come this far."""
    if torch_distributed.is_initialized():
        if world.size > 1:
            torch_distributed.barrier()
        torch_distributed.destroy_process_group()


def total(world: World, *values: float) -> list[float]:
    """The sums of `values` over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        torch_distributed.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def largest(world: World, value: float) -> float:
    """The largest `value` of any rank."""
    tensor = torch.tensor([value], dtype=torch.float64, device=world.device)
    if world.size > 1:
        torch_distributed.all_reduce(tensor, op=torch_distributed.ReduceOp.MAX)
    return float(tensor.item())


def from_first(world: World, value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    torch_distributed.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def together(world: World, action: Callable[[], T], *, when: bool = True) -> T | None:
    """Run `action` on the ranks where `when` holds; if it fails on any, every rank raises.

    Without this a full disk on rank 0 would leave the other ranks waiting in their next collective.

    Raises:
        the action's own exception on the lowest rank that failed, marked to be reported; on the others one that is
        not, a UsageError where the first was a mistake in the request (ValueError), a RunError otherwise. So all ranks
        end with one exit code, whichever the launcher sees first.
    """
    result: T | None = None
    failure: Exception | None = None
    if when:
        try:
            result = action()
        except Exception as error:
            failure = error
    first_failed = -largest(world, -float(world.rank) if failure is not None else -float(world.size))
    if first_failed == world.size:
        return result
    usage = largest(world, float(isinstance(failure, ValueError) and world.rank == first_failed))
    if failure is not None and world.rank == first_failed:
        failure.report = True  # type: ignore[attr-defined]
        raise failure
    other = (UsageError if usage else RunError)(f"rank {first_failed:.0f} failed; its message says why")
    other.report = False
    raise other


class StopRequest:
    """Turns SIGINT, SIGTERM and a launcher's death into a flag that the loop reads between steps.

    A second SIGINT ends the process at once; not a SIGTERM after a SIGINT, which is what DeepSpeed's launch process
    sends after Ctrl-C. Its runner dies on SIGTERM without telling its children: the watcher thread sees that.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.exit_code = 0
        self._previous: dict[int, object] = {}
        self._closed = threading.Event()

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        ancestors = _launcher_processes()
        if ancestors:
            threading.Thread(target=self._watch, args=(ancestors,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            if number == signal.SIGINT and self.reason == "SIGINT":
                # os.write: print is not safe inside a handler that interrupts another print
                os.write(2, b"\nsecond SIGINT: ending at once, without a checkpoint\n")
                os._exit(128 + number)
            return
        self.exit_code = 128 + number
        self.reason = signal.Signals(number).name

    def _watch(self, ancestors: list) -> None:
        while not self._closed.wait(1.0):
            if not all(_is_alive(process) for process in ancestors):
                # the handler may be writing the same fields; a signal that came first keeps its own reason
                if self.reason is None:
                    self.exit_code = 128 + signal.SIGTERM
                    self.reason = "end of the launcher"
                return


def _launcher_processes() -> list:
    """DeepSpeed's launch process and its runner, where they are this process's parent and grandparent."""
    import psutil

    found = []
    try:
        launch = psutil.Process().parent()
        if launch is not None and any("deepspeed.launcher.launch" in part for part in launch.cmdline()):
            found.append(launch)
            runner = launch.parent()
            names = {os.path.basename(part) for part in runner.cmdline()[:3]} if runner is not None else set()
            if names & {"deepspeed", "ds", "deepspeed.pt", "runner.py"}:
                found.append(runner)
    except psutil.Error:
        pass
    return found


def _is_alive(process) -> bool:
    import psutil

    try:
        # is_running compares creation times, so a reused process id is not mistaken for the launcher
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def say(world: World | None, text: str) -> None:
    """Print on rank 0 only, to standard error, where the live line is."""
    if world is None or world.is_first:
        print(text, file=sys.stderr, flush=True)
