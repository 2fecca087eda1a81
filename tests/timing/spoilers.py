"""A plugin for a `pytest bench/` of a test's own: spoils an implementation, or interrupts the run.

SPOIL=gradient: `torch`'s gradients of residual_norm are 1.01 times the right ones. SPOIL=interrupt: Ctrl-C while the
third benchmark has an entry and no sample yet.
"""

import os

import torch

from bench import kernel_baselines, timing
from bench.kernel_baselines import Implementation


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def wrong(operator: str, name: str) -> Implementation:
    right = TRUE_OURS(operator, name)
    if (operator, name) != ("residual_norm", "torch"):
        return right

    def load():
        function = right.load()

        def spoiled(**arguments):
            scaled = {n: Scaled.apply(x) if n == "gain" else x for n, x in arguments.items()}
            return function(**scaled)

        return spoiled

    return Implementation(name, load, ours=True, contract_dropout=True)


def interrupted(benchmark, seconds):
    COUNT.append(1)
    if len(COUNT) == 3:
        benchmark._mode = "samples"
        benchmark._make_stats(iterations=1)
        raise KeyboardInterrupt
    TRUE_RECORD(benchmark, seconds)


COUNT: list[int] = []
TRUE_OURS, TRUE_RECORD = kernel_baselines._ours, timing.record
if os.environ["SPOIL"] == "gradient":
    kernel_baselines._ours = wrong
elif os.environ["SPOIL"] == "interrupt":
    timing.record = interrupted
