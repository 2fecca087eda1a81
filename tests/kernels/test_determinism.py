"""Same inputs, same bits: whatever the order in which programs run, and whatever memory held before."""

import harness
import pytest
import torch

import kernels
from kernels import cases
from kernels.dropout import Dropout, dropout_state
from kernels.fused import embedding, linear_cross_entropy, tiles_rows

RNG = dropout_state(42, 7, 3)
CALLS = {
    "residual_norm": (cases.residual_norm_inputs(3, 9, 40), {"dropout": Dropout(0.2, RNG, 1)}),
    "embedding": (
        cases.embedding_inputs(3, 9, 40, 11),
        {"dropout": Dropout(0.2, RNG, 1), "position_dropout": Dropout(0.3, RNG, 2)},
    ),
    "linear_cross_entropy": (cases.linear_cross_entropy_inputs(2, 40, 24, 300), {"scale": 0.3}),
}


def _bits(operator, order):
    inputs, kwargs = CALLS[operator]
    leaves = {
        n: x.to(harness.DEVICE, torch.float32).requires_grad_() if x.dtype.is_floating_point else x.to(harness.DEVICE)
        for n, x in inputs.items()
    }
    kwargs = {
        n: Dropout(v.p, v.rng.to(harness.DEVICE), v.site) if isinstance(v, Dropout) else v for n, v in kwargs.items()
    }
    with harness.shuffled_programs(order), harness.poisoned_allocations():
        out = getattr(kernels, operator)(**leaves, **kwargs, impl="triton")
        outputs = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in leaves.values() if x.requires_grad]
        gradients = torch.autograd.grad(
            outputs, wanted, [torch.cos(torch.arange(x.numel(), device=x.device)).view(x.shape) for x in outputs]
        )
    return [*outputs, *gradients]


@pytest.mark.parametrize("operator", CALLS)
def test_the_order_of_programs_does_not_matter(operator, monkeypatch):
    """Several programs share each sum: rows of a gain, runs of a table, splits and chunks of a vocabulary."""
    monkeypatch.setattr(tiles_rows, "PROGRAMS", 4)
    monkeypatch.setattr(embedding, "ROWS_OF_E", 3)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 1)
    first, second = _bits(operator, 1), _bits(operator, 2)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", CALLS)
def test_repeated_runs_give_the_same_bits(operator):
    first = _bits(operator, 0)
    for _ in range(20):
        for a, b in zip(first, _bits(operator, 0), strict=True):
            assert torch.equal(a, b)
