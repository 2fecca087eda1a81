"""Every operator in bfloat16, forward and backward, compiled for sm_86 and executed: against float64, as the formula.

Error at most twice that of the plain formula in the same dtype, plus 1e-5 of the largest value, as in tests/kernels.
"""

import pytest
import torch

import kernels
from kernels import cases, emulator
from kernels.dropout import Dropout, dropout_state


def _drop(site: int, p: float = 0.1) -> Dropout:
    return Dropout(p, dropout_state(42, 1, 0, "cpu"), site)


CASES = {
    "attention": ({"batch": 2, "queries": 37, "keys": 53, "heads": 2, "width": 64}, {"dropout": _drop(1)}),
    "attention causal": (
        {"batch": 1, "queries": 45, "keys": 45, "heads": 3, "key_heads": 1, "width": 64},
        {"causal": True, "scale": 0.2},
    ),
    "unified_attention": ({"batch": 1, "queries": 37, "other": 21, "heads": 2, "width": 64}, {"dropout": _drop(1)}),
    "glu": (
        {"batch": 1, "length": 37, "width": 72, "hidden": 88, "kind": "gated"},
        {"kind": "gated", "activation": "gelu", "dropout": _drop(1)},
    ),
    "glu plain": (
        {"batch": 3, "length": 23, "width": 64, "hidden": 136, "kind": "plain"},
        {"kind": "plain", "activation": "relu"},
    ),
    "residual_norm": ({"batch": 2, "length": 19, "width": 72}, {"dropout": _drop(1)}),
    "linear_cross_entropy": ({"batch": 1, "length": 37, "width": 72, "vocabulary": 203}, {"scale": 72**-0.5}),
    "embedding": (
        {"batch": 2, "length": 19, "width": 72, "vocabulary": 101},
        {"combine": "average", "dropout": _drop(1), "position_dropout": _drop(2, 0.2)},
    ),
}  # fmt: skip


def _evaluate(operator: str, inputs: dict, kwargs: dict, impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
    given = {n: x.to(dtype).requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    out = getattr(kernels, operator)(**given, **kwargs, impl=impl)
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    above = [
        (torch.randint(-32, 33, x.shape, generator=generator) / 16 if x.dim() else torch.tensor(1.75)) for x in outs
    ]
    leaves = [x for x in given.values() if x.requires_grad]
    gradients = torch.autograd.grad(outs, leaves, [a.to(x) for a, x in zip(above, outs, strict=True)])
    return [x.detach().double() for x in (*outs, *gradients)]


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_in_bfloat16(name):
    operator = name.split()[0]
    dims, kwargs = CASES[name]
    made = cases.FACTORIES[operator](**dims)
    inputs = {n: x.to(torch.bfloat16) if x.is_floating_point() else x for n, x in made.items() if x is not None}
    oracle = _evaluate(operator, inputs, kwargs, "reference", torch.float64)
    formula = _evaluate(operator, inputs, kwargs, "reference", torch.bfloat16)
    with emulator.active("sm_86", seed=0) as session:
        got = _evaluate(operator, inputs, kwargs, "triton", torch.bfloat16)
    assert session.launches
    assert not session.findings
    for i, (x, plain, exact) in enumerate(zip(got, formula, oracle, strict=True)):
        size = exact.abs().max()
        assert (x - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5 * size, f"{name}: result {i}"


def test_pairs_of_float16_are_compared_at_once():
    """relu's gradient in float16 is the one place where a kernel compares two halves of a register."""
    made = cases.FACTORIES["glu"](batch=1, length=37, width=72, hidden=88, kind="gated")
    inputs, kwargs = {n: x.half() for n, x in made.items()}, {"kind": "gated", "activation": "relu"}
    with emulator.active("sm_86") as session:
        got = _evaluate("glu", inputs, kwargs, "triton", torch.float16)
    assert any("setp.gt.f16x2" in x.recorded.compiled.asm["ptx"] for x in session.launches)
    formula = _evaluate("glu", inputs, kwargs, "reference", torch.float16)
    oracle = _evaluate("glu", inputs, kwargs, "reference", torch.float64)
    for x, plain, exact in zip(got, formula, oracle, strict=True):
        assert (x - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [31, 33, 65, 127])
def test_a_sum_of_one_column_a_thread_is_the_same_in_every_lane(width, dtype):
    """w n + shuffle(w n) as an fma rounds one product, each lane another; a race of the lanes that write the sum."""
    x, s = (torch.randn(2, 9, width).to(dtype).requires_grad_() for _ in range(2))
    gain = torch.randn(width).to(dtype).requires_grad_()
    with emulator.active("sm_86"):
        y, z = kernels.residual_norm(x, s, gain, impl="triton")
        (y.float().sum() + z.float().square().sum()).backward()
