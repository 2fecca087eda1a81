"""Whether an implementation deserves a time: outputs and gradients against the float64 formula.

The error budget of the kernels' tests (twice the plain formula's error in the same dtype, plus 1e-5), and one thing
more: the scale of each result. Twice bfloat16's own error hides a gradient that is 1% too large, but its projection
on the exact one does not, since rounding averages out over many elements.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.startup import evaluate

ERROR_FACTOR, ERROR_FLOOR = 2.0, 1e-5
# what a result may be too large or too small by; float16 and bfloat16 rounding bends it by less than 1e-3
SCALE_FLOOR = 3e-3
# of a result with fewer values the formula's own error may be small by chance (a loss in bfloat16: 4e-5, another order
# of sums 4e-4), so a quarter of the dtype's spacing is allowed
FEW = 64

Results = dict[str, Tensor]


def _scale(x: Tensor, exact: Tensor) -> float:
    """How much larger than `exact` x is along it."""
    square = exact.square().sum().item()
    return 0.0 if square == 0 else (x * exact).sum().item() / square - 1


def _error(x: Tensor, exact: Tensor) -> float:
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return (x - exact).abs().max().item() / (largest or 1.0) if exact.numel() else 0.0


class Oracle:
    """The formula's results on `inputs` (rounded to `dtype`), in float64 and in `dtype`; made once for a call."""

    def __init__(self, operator: str, inputs: Mapping[str, Any], kwargs: Mapping[str, Any], dtype: torch.dtype):
        self.operator, self.kwargs, self.dtype = operator, kwargs, dtype
        self.inputs = {n: x.to(dtype) if x is not None and x.dtype.is_floating_point else x for n, x in inputs.items()}
        formula = partial(getattr(kernels, operator), impl="reference")
        self.exact = evaluate(operator, formula, self.inputs, kwargs, torch.float64)
        self.plain = evaluate(operator, formula, self.inputs, kwargs, dtype)

    def problems(self, function: Callable) -> list[str]:
        """What of `function`'s outputs and gradients is wrong; empty where it may be timed."""
        got = evaluate(self.operator, function, self.inputs, self.kwargs, self.dtype)
        problems = [f"{name} is missing" for name in self.exact if name not in got]
        for name, exact in self.exact.items():
            if name not in got:
                continue
            if got[name].shape != exact.shape or not torch.isfinite(got[name]).all():
                problems.append(f"{name}: got {list(got[name].shape)}, expected finite {list(exact.shape)}")
                continue
            error = _error(got[name], exact)
            budget = ERROR_FACTOR * _error(self.plain[name], exact) + ERROR_FLOOR
            budget += torch.finfo(self.dtype).eps / 4 if exact.numel() < FEW else 0.0
            if not error <= budget:
                problems.append(f"{name}: error {error:.1e}, expected at most {budget:.1e}")
            scale = _scale(got[name], exact)
            allowed = 2 * abs(_scale(self.plain[name], exact)) + SCALE_FLOOR
            if not abs(scale) <= allowed:
                problems.append(f"{name}: {1 + scale:.4f} times the exact one, expected within {allowed:.4f}")
        return problems
