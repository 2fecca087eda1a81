"""Training steps of one configuration on the CPU through several implementations, timed in turn; and their memory.

`python -m bench.portable_step memory|profile NAME [EXPERIMENT]` measures one of them in a process of its own.
"""

import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from bench import steps
from bench.cache import LENGTHS
from bench.kernel_calls import Sizes

SIZES, THREADS = Sizes("the paper's lengths", 4, *LENGTHS), 2
CPU = torch.device("cpu")
EAGER, BF16, FP32 = "eager, float32", "torch, bf16 configuration", "torch, float32 throughout"


def arguments(name: str) -> dict[str, str]:
    """Of bench.steps, for an entry of the tables."""
    own = {EAGER: steps.EAGER, BF16: "torch", FP32: "torch"}
    return {"name": own.get(name, name)} | ({"precision": "fp32"} if name == FP32 else {})


def training_step(name: str, experiment: str) -> steps.Step:
    return steps.Step(experiment=experiment, sizes=SIZES, device=CPU, **arguments(name))


@dataclass
class Timing:
    """Seconds of each repetition."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratios(self, other: "Timing") -> list[float]:
        """How many times faster than `other`, repetition by repetition, sorted."""
        return sorted(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(runs: Mapping[str, steps.Step], repetitions: int) -> dict[str, Timing]:
    """Each step once for warm-up, then in turn: what else the machine does hits all of them."""
    torch.set_num_threads(THREADS)
    for step in runs.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, step in runs.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: Timing(seconds) for name, seconds in times.items()}


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def memory(name: str, experiment: str) -> int:
    """Peak resident bytes of a step above parameters, gradients and optimizer state; in a fresh process."""
    torch.set_num_threads(THREADS)
    if name != EAGER:
        kernels.portable.describe_products()
    torch.ones(64, 64) @ torch.ones(64, 64)
    start = _status("VmRSS")
    step = training_step(name, experiment)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    parameters = sum(p.numel() * p.element_size() for p in step.model.parameters())
    return _status("VmHWM") - start - 4 * parameters  # two moments


def profile(name: str, experiment: str, rows: int = 14) -> list[tuple[str, float, int]]:
    """(operator, seconds of its own CPU time, calls) of one step in one thread: the dearest, the rest, and the sum."""
    torch.set_num_threads(1)
    step = training_step(name, experiment)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = [e for e in profiler.key_averages() if e.self_cpu_time_total > 0]
    table = sorted(((e.key, e.self_cpu_time_total / 1e6, e.count) for e in events), key=lambda row: -row[1])

    def sum_of(label: str, part: list[tuple[str, float, int]]) -> tuple[str, float, int]:
        return label, sum(seconds for _, seconds, _ in part), sum(calls for *_, calls in part)

    return [*table[:rows], sum_of("the rest", table[rows:]), sum_of("all", table)]


if __name__ == "__main__":
    what, chosen, *rest = sys.argv[1:]
    subject = rest[0] if rest else "Baseline"
    if what == "memory":
        print(memory(chosen, subject))
    else:
        lines = profile(chosen, subject)
        for operator, seconds, calls in lines:
            print(f"{operator:45s} {seconds:7.3f} s {seconds / lines[-1][1]:6.1%} {calls:6d}")
