"""The micro-batch: the largest divisor of a process's share that memory holds; estimated, tried, halved.

The global batch never changes: a smaller micro-batch only means more accumulation. The trial is a forward and a
backward pass of the bare model, before the engine exists: an out-of-memory inside the engine would leave half
reduced gradients behind, and other ranks waiting.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from march.cost.counter import Counter
from march.training.distributed import World, all_reduce_max
from march.training.engine import PRECISIONS
from march.training.errors import RunError, UsageError

# A CPU's memory belongs to other programs too. What a GPU needs besides tensors is the estimate's business.
USABLE_SHARE = 0.6


def available_memory(world: World) -> int:
    """Bytes that this process may use: free device memory, or its part of the free main memory."""
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        return int(free)
    import psutil

    free = psutil.virtual_memory().available
    try:  # a container's limit is not in what the kernel says about the machine
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, limit - used)
    except (OSError, ValueError):
        pass
    return int(free * USABLE_SHARE / world.local_size)


def total_memory(world: World) -> int:
    """Bytes that a process can have at most: the device's, or its part of the main memory and swap."""
    if world.device.type == "cuda":
        return int(torch.cuda.mem_get_info(world.device)[1])
    import psutil

    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # a container's limit is not in what the kernel says
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return (total + psutil.swap_memory().total) // world.local_size


def share_of_process(global_batch: int, processes: int) -> int:
    """Sequences of a step that each process sees.

    Raises:
        UsageError: the processes cannot share the batch evenly.
    """
    if global_batch % processes:
        fits = max(n for n in range(1, processes) if global_batch % n == 0)
        raise UsageError(
            f"expected a number of processes that divides the global batch of {global_batch}, got {processes}; "
            f"start {fits}, for instance"
        )
    return global_batch // processes


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`; 1 for limits below 1."""
    return max((n for n in range(1, min(number, max(limit, 1)) + 1) if number % n == 0), default=1)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, Python's, and the RuntimeError of torch's CPU allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def choose_micro_batch(
    attempt: Callable[[int], None],
    share: int,
    start: int,
    world: World,
    say: Callable[[str], None],
) -> int:
    """Run `attempt(micro_batch)` with `start`, and with halves of it while any rank runs out of memory.

    Args:
        attempt: one forward and backward pass; raises an out-of-memory error when it does not fit.
        share: sequences a step of one process; the result divides it.
        start: the first size to try, a divisor of `share`.

    Raises:
        RunError: one sequence does not fit.
    """
    size = start
    while True:
        failed = False
        try:
            attempt(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        # outside the except block: a live traceback would keep the activations alive
        if not all_reduce_max(world, float(failed)):
            return size
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise RunError("out of memory with one sequence at a time; use more memory or a smaller model (--set)")
        smaller = largest_divisor(share, size // 2)
        say(f"micro-batch {size} does not fit into memory: trying {smaller} (same global batch, more accumulation)")
        size = smaller


def sequence_bytes(model: nn.Module, attempt: Callable[[int], None], world: World) -> float:
    """The most bytes beyond the weights that live at one time while `attempt` runs one sequence, on any rank; infinite
    where it does not fit. n sequences take at most n times as many: no tensor grows faster than the batch."""
    try:
        with Counter() as counter:
            for parameter in model.parameters():
                counter.ignore(parameter)
            attempt(1)
        peak = float(counter.peak)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak = math.inf
    return all_reduce_max(world, peak)


def trial(model: nn.Module, lengths: tuple[int, int], vocab_size: int, precision: str, zero: int, world: World):
    """An `attempt` for choose_micro_batch: the model's own forward and backward at [micro_batch, lengths].

    `lengths` are those of encoder and decoder. On CUDA the optimiser's share of memory (float32 gradients,
    master weights, two moments) is set aside meanwhile. Leaves no gradients and draws from no global generator.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.to(world.device, PRECISIONS[precision])  # as the engine will
    encoder_length, decoder_length = lengths

    def attempt(micro_batch: int) -> None:
        reserve = None
        try:
            if world.device.type == "cuda":
                partitions = world.size if zero >= 1 else 1
                reserve = torch.empty(parameters * (4 + 12 // partitions), dtype=torch.uint8, device=world.device)
            rows = torch.arange(micro_batch, device=world.device)[:, None]
            encoder_ids = (rows * 7 + torch.arange(encoder_length, device=world.device)) % vocab_size
            decoder_ids = (rows * 5 + torch.arange(decoder_length, device=world.device)) % vocab_size
            state = torch.zeros(3, dtype=torch.int64, device=world.device)
            model.train()
            model(encoder_ids, decoder_ids, labels=decoder_ids, dropout_state=state).loss.backward()
        finally:
            del reserve
            model.zero_grad(set_to_none=True)

    return attempt
