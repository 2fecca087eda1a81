"""Whether an implementation deserves a time: outputs and gradients against the float64 formula.

The error budget of the kernels' tests: twice the plain formula's error in the same dtype, plus 1e-5, of the largest
element and of the norm; in 16 bits the largest may be four times off, as in the self-test, since which
element rounds worst is luck. And one thing more, the scale of each result: twice bfloat16's own error hides a gradient
that is 1% too large, but its projection on the exact one does not, since rounding averages out over many elements.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.selftest import evaluate

ERROR_FACTOR, LARGEST_FACTOR_16, ERROR_FLOOR = 2.0, 4.0, 1e-5
# what a result may be too large or too small by; float16 and bfloat16 rounding bends it by less than 1e-3
SCALE_FLOOR = 3e-3
# A result with fewer values may be off by one spacing of the dtype: F.linear_cross_entropy returns a loss of 10.4 in
# bfloat16, rounded by 0.6%, and the formula's own error may be small by chance.
FEW = 64

Results = dict[str, Tensor]


def _scale(x: Tensor, exact: Tensor) -> float:
    """How much larger than `exact` x is along it."""
    square = exact.square().sum().item()
    return 0.0 if square == 0 else (x * exact).sum().item() / square - 1


def _largest(x: Tensor, exact: Tensor) -> float:
    """Largest error over the largest exact value."""
    return (x - exact).abs().max().item() / (exact.abs().max().item() or 1.0) if exact.numel() else 0.0


def _norm(x: Tensor, exact: Tensor) -> float:
    """The error's norm over the exact result's."""
    return (x - exact).norm().item() / (exact.norm().item() or 1.0)


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
            spacing = torch.finfo(self.dtype).eps if exact.numel() < FEW else 0.0
            floor = ERROR_FLOOR + spacing
            for what, measure in (("largest error", _largest), ("error's norm", _norm)):
                sixteen = self.dtype.itemsize == 2 and measure is _largest
                factor = LARGEST_FACTOR_16 if sixteen else ERROR_FACTOR
                error, budget = measure(got[name], exact), factor * measure(self.plain[name], exact) + floor
                if not error <= budget:
                    problems.append(f"{name}: {what} {error:.1e}, expected at most {budget:.1e}")
            scale = _scale(got[name], exact)
            allowed = 2 * abs(_scale(self.plain[name], exact)) + max(SCALE_FLOOR, spacing)
            if not abs(scale) <= allowed:
                problems.append(f"{name}: {1 + scale:.4f} times the exact one, expected within {allowed:.4f}")
        return problems
