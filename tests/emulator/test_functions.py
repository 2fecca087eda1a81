"""Functions that somebody's own activation may call, compiled and executed beside torch's in float64.

What has no rule is named when it is met: sin and cos (local memory), log1p and others with directed rounding.
"""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from kernels import emulator


@triton.jit
def _apply(x, y, FUNCTION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, FUNCTION(tl.load(x + i)))


@triton.jit
def _squareplus(a):
    return 0.5 * (a + tl.sqrt(a * a + 4.0))


@triton.jit
def _softplus(a):
    return tl.log(1.0 + tl.exp(a))


@triton.jit
def _reciprocal(a):
    return 1.0 / a


@triton.jit
def _power(a):
    return libdevice.pow(a, 1.5)


FUNCTIONS = [
    (tl.exp, torch.exp), (tl.exp2, torch.exp2), (tl.log, torch.log), (tl.log2, torch.log2), (tl.sqrt, torch.sqrt),
    (tl.sqrt_rn, torch.sqrt), (tl.rsqrt, torch.rsqrt), (tl.erf, torch.erf), (tl.floor, torch.floor),
    (tl.ceil, torch.ceil), (tl.abs, torch.abs), (tl.sigmoid, torch.sigmoid), (libdevice.tanh, torch.tanh),
    (libdevice.sinh, torch.sinh), (libdevice.cosh, torch.cosh), (libdevice.atan, torch.atan),
    (libdevice.expm1, torch.expm1), (libdevice.rint, torch.round),
    (_squareplus, lambda x: (x + (x * x + 4).sqrt()) / 2), (_softplus, torch.nn.functional.softplus),
    (_reciprocal, torch.reciprocal), (_power, lambda x: x**1.5),
]  # fmt: skip


@pytest.mark.parametrize(("function", "formula"), FUNCTIONS, ids=lambda f: getattr(f, "__name__", str(f)))
def test_a_function_is_its_formula(function, formula):
    positive = 2.0 ** torch.linspace(-20, 4, 64)
    x = torch.cat([positive, -positive])
    y = torch.empty(128)
    with emulator.active("sm_86"):
        _apply[(1,)](x, y, function, 128)
    torch.testing.assert_close(y.double(), formula(x.double()), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_what_has_no_rule_is_named():
    with emulator.active("sm_86"), pytest.raises(emulator.UnsupportedPtx, match=r"add\.rz\.ftz\.f32"):
        _apply[(1,)](torch.ones(128), torch.empty(128), libdevice.log1p, 128)
