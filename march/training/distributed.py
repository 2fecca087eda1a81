"""Processes: the environment DeepSpeed expects, and agreement between ranks.

Everything here works with one process and no launcher too; `python train.py` and `deepspeed train.py` take
the same path.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
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

    Raises:
        UsageError: some of them are there, but not what a launcher sets; left in a shell they would have this process
            wait for others that nobody started.
    """
    _check_launcher(os.environ)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" or "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _check_launcher(environment: Mapping[str, str]) -> None:
    fix = "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT, or start with deepspeed train.py"

    def refuse(text: str) -> UsageError:
        error = UsageError(f"{text}; {fix}")
        error.report = True  # whatever RANK says
        return error

    numbers = {}
    for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "0")):
        text = environment.get(name, default)
        if not text.isascii() or not text.isdigit():
            raise refuse(f"expected {name} as a launcher sets it, got {text!r}")
        numbers[name] = int(text)
    size = numbers["WORLD_SIZE"]
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if size > 1 and not environment.get(name)]
    if missing or size < 1 or numbers["RANK"] >= size or numbers["LOCAL_RANK"] > numbers["RANK"]:
        given = ", ".join(f"{name}={environment[name]}" for name in ("WORLD_SIZE", *needed) if name in environment)
        raise refuse(f"expected the environment of a launcher, got {given} alone")


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
        _init_process_group(device, rank, size)
    return World(rank, size, local_rank, local_size, device)


def _init_process_group(device: torch.device, rank: int, size: int) -> None:
    import deepspeed
    import deepspeed.ops

    # A C++ op for shared-memory communication that only inference uses: building it takes 60 s and a compiler.
    # An op marked incompatible is not built (measured: 12-19 s to the first step instead of 75).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = threading.Timer(
        10, log_rank0, (None, f"rank {rank} waits for the other {size - 1} processes of WORLD_SIZE={size} at {where}")
    )
    waiting.daemon = True
    if size > 1:
        waiting.start()
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=COLLECTIVE_TIMEOUT,
        )
    finally:
        waiting.cancel()


def stop(world: World) -> None:
    """Leave the process group after everybody has come this far."""
    if torch_distributed.is_initialized():
        if world.size > 1:
            torch_distributed.barrier()
        torch_distributed.destroy_process_group()


def all_reduce_sum(world: World, *values: float) -> list[float]:
    """The sums of `values` over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        torch_distributed.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def all_reduce_max(world: World, value: float) -> float:
    """The largest `value` of any rank."""
    tensor = torch.tensor([value], dtype=torch.float64, device=world.device)
    if world.size > 1:
        torch_distributed.all_reduce(tensor, op=torch_distributed.ReduceOp.MAX)
    return float(tensor.item())


def all_gather(world: World, value: T) -> list[T]:
    """Every rank's `value`, by rank."""
    values: list[T] = [value] * world.size
    if world.size > 1:
        torch_distributed.all_gather_object(values, value)
    return values


def broadcast_object(world: World, value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    torch_distributed.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def run_on_rank(world: World, action: Callable[[], T], *, when: bool = True) -> T | None:
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
    first_failed = -all_reduce_max(world, -float(world.rank) if failure is not None else -float(world.size))
    if first_failed == world.size:
        return result
    usage = all_reduce_max(world, float(isinstance(failure, ValueError) and world.rank == first_failed))
    if failure is not None and world.rank == first_failed:
        failure.report = True  # type: ignore[attr-defined]
        raise failure
    other = (UsageError if usage else RunError)(f"rank {first_failed:.0f} failed; its message says why")
    other.report = False
    raise other


def log_rank0(world: World | None, text: str) -> None:
    """Print on rank 0 only, to standard error, where the live line is. A terminal that has gone ends no run."""
    if world is None or world.is_first:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
