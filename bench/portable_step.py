"""Training steps of one configuration through several implementations, timed in turn; and their memory.

`python -m bench.portable_step memory|profile NAME [EXPERIMENT]` measures one of them in a process of its own.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import kernels
import march
from bench import baselines
from bench.predecessor import Eager
from march import experiments
from march.config import ModelConfig
from march.model import Transformer

BATCH, ENCODER, DECODER, THREADS = 4, 921, 206, 2
TOKENS = BATCH * (ENCODER + DECODER)
Step = Callable[[], float]

EAGER, BF16, FP32 = "eager, float32", "torch, bf16 configuration", "torch, float32 throughout"
LIBRARIES = {
    **{
        f"Hugging Face T5, {attention}, {setting}": ("hugging_face_t5", attention, setting)
        for attention in ("eager", "sdpa")
        for setting in ("float32", "autocast", "bfloat16")
    },
    **{
        f"x-transformers{', flash' if flash else ''}, {setting}": ("x_transformers", flash, setting)
        for flash in (False, True)
        # its bfloat16 parameters meet its own float32 tensors: it does not run
        for setting in ("float32", "autocast")
    },
}


def batch(config: ModelConfig) -> dict[str, Tensor]:
    """Random tokens; every position real, as packed text has them."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> Tensor:
        return torch.randint(111, config.vocab_size, (BATCH, length), generator=generator)

    mask = torch.ones(BATCH, ENCODER, dtype=torch.bool)
    return {
        "input_ids": draw(ENCODER),
        "decoder_input_ids": draw(DECODER),
        "labels": draw(DECODER),
        "attention_mask": mask,
    }


def build(name: str, experiment: str, **overrides) -> nn.Module:
    """The model of an entry of the tables, the same parameters in eager and ours."""
    torch.manual_seed(0)
    if name == FP32:
        overrides["precision"] = "fp32"
    if name in LIBRARIES:
        function, argument, setting = LIBRARIES[name]
        model = getattr(baselines, function)(experiments.configuration(experiment, **overrides), argument)
        return baselines.in_setting(model, setting)
    model = march.build_model(experiment, impl="torch", **overrides)
    return Eager(model.config).load(model) if name == EAGER else model


def loss_of(model: nn.Module, inputs: dict[str, Tensor], step: int) -> Tensor:
    if isinstance(model, Transformer):
        return model(**inputs, dropout_state=kernels.dropout_state(1, step)).loss
    return model(**inputs)


def training_step(name: str, experiment: str) -> Step:
    """Forward, backward, AdamW of the recipe; the same fused AdamW for all. Returns the loss."""
    model = build(name, experiment).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs = batch(experiments.configuration(experiment))
    count = 0

    def step() -> float:
        nonlocal count
        count += 1
        loss = loss_of(model, inputs, count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def losses_without_dropout(experiment: str, names: tuple[str, ...]) -> dict[str, float]:
    """The loss of each before any step: equal, or there is nothing to compare the speed of."""
    losses = {}
    for name in names:
        model = build(name, experiment, dropout=0.0, slow_dropout=0.0).train()
        with torch.no_grad():
            one = {key: value[:1] for key, value in batch(model.config).items()}
            losses[name] = loss_of(model, one, 1).item()
    return losses


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


def interleaved(steps: dict[str, Step], repetitions: int) -> dict[str, Timing]:
    """Each step once for warm-up, then in turn: what else the machine does hits all of them."""
    torch.set_num_threads(THREADS)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
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
    parameters = sum(p.numel() * p.element_size() for p in build(name, experiment).parameters())
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
