"""Training steps of one configuration on the CPU through several implementations, timed in turn; and their memory.

`python -m bench.portable_step memory|profile NAME [EXPERIMENT]` measures one of them in a process of its own.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
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


def interleaved(runs: Mapping[str, steps.Step], repetitions: int) -> pd.DataFrame:
    """Seconds of each step, a column each, once for warm-up and then in turn: what else the machine does hits all."""
    torch.set_num_threads(THREADS)
    for step in runs.values():
        step()
    return pd.DataFrame({name: steps.timed(step) for name, step in runs.items()} for _ in range(repetitions))


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


def profile(name: str, experiment: str, rows: int = 14) -> str:
    """The operators of one step in one thread that take most of the CPU's time."""
    torch.set_num_threads(1)
    step = training_step(name, experiment)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return profiler.key_averages().table("self_cpu_time_total", row_limit=rows)


if __name__ == "__main__":
    what, chosen, *rest = sys.argv[1:]
    print({"memory": memory, "profile": profile}[what](chosen, rest[0] if rest else "Baseline"))
