"""Times of one function: by CUDA events with the L2 cleared on a GPU, by the wall clock on a CPU; never a warm-up.

The samples go to pytest-benchmark's fixture, so that its table, JSON, comparison and histograms are those of any other
benchmark; quantiles go into `extra_info`, since its own statistics have quartiles only.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Samples:
    """Seconds of each repetition; first: seconds of the first call, with compilation and every warm-up in it;
    peak: bytes that a GPU held at most beyond what was there before, None on a CPU."""

    seconds: list[float]
    first: float
    peak: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantiles(self) -> dict[str, float]:
        """Median, 20th and 80th percentile, in seconds."""
        low, high = np.quantile(self.seconds, (0.2, 0.8)).tolist()
        return {"median": self.median, "p20": low, "p80": high}


def _first(run: Callable[[], Any], cuda: bool) -> tuple[float, int | None]:
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    if not cuda:
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def measure(run: Callable[[], Any], budget: float, rounds: int = MIN_ROUNDS) -> Samples:
    """Samples of `run` for about `budget` seconds, `rounds` at least.

    On CUDA triton.testing.do_bench: events around each call, the L2 overwritten before it. On a CPU the wall clock,
    every call with the caches as the one before left them.
    """
    cuda = torch.cuda.is_available()
    first, peak = _first(run, cuda)
    if cuda:
        from triton.testing import do_bench

        seconds = [ms / 1000 for ms in do_bench(run, warmup=250 * budget, rep=1000 * budget, return_mode="all")]
        return Samples(seconds, first, peak)
    run()
    seconds, start = [], time.perf_counter()
    while len(seconds) < rounds or (time.perf_counter() - start < budget and len(seconds) < MAX_ROUNDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return Samples(seconds, first, peak)


def kept_bytes(forward: Callable[[], Any], inputs: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for backward beyond `inputs`, each storage once."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    del out
    return sum(storages.values())


def record(benchmark: Any, seconds: list[float]) -> None:
    """Gives samples measured elsewhere to pytest-benchmark's fixture.

    By its own method: its timers see the wall clock, and CUDA events are none. All samples are there when the entry is
    made, so that Ctrl-C leaves no entry of half a measurement.
    """
    benchmark._mode = "samples"
    stats = benchmark._make_stats(iterations=1)
    for value in seconds:
        stats.update(value)
