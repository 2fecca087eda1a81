"""Nothing to compute: zeros of the right shape, and a graph whose backward gives zeros; and no gradient unasked."""

import pytest
import torch
from test_portable_path import Largest

import kernels

F, N = 3, 0  # a size, and none


def heads(batch, length):
    return torch.randn(batch, length, 2, 16)


CALLS = {
    "attention": lambda b, n, m: (kernels.attention, [heads(b, n), heads(b, m), heads(b, m)]),
    "self": lambda b, n, m: (kernels.attention, [torch.randn(b, n, 3, 2, 16)]),
    "cross": lambda b, n, m: (kernels.attention, [heads(b, n), torch.randn(b, m, 2, 2, 16)]),
    "unified": lambda b, n, m: (kernels.attention, [*(heads(b, n),) * 3, *(heads(b, m),) * 2]),
    "packed unified": lambda b, n, m: (
        lambda q, kv, **o: kernels.attention(q, k2=kv, **o),
        [torch.randn(b, n, 3, 2, 16), torch.randn(b, m, 2, 2, 16)],
    ),
    "glu": lambda b, n, m: (kernels.glu, [torch.randn(b, n, 16), torch.randn(8, 16)]),
    "norm": lambda b, n, m: (
        lambda *x, **o: sum(kernels.residual_norm(*x, **o)),
        [torch.randn(b, n, 16), torch.randn(b, n, 16), torch.randn(16)],
    ),
    "cross entropy": lambda b, n, m: (
        lambda h, w, **o: kernels.linear_cross_entropy(h, w, torch.zeros(b, n, dtype=torch.int64), **o),
        [torch.randn(b, n, 16), torch.randn(5, 16)],
    ),
    "embedding": lambda b, n, m: (
        lambda e, t, **o: kernels.embedding(torch.zeros(b, n, dtype=torch.int64), e, t, **o),
        [torch.randn(5, 16), torch.randn(4, 16)],
    ),
}


@pytest.mark.parametrize("sizes", [(N, F, F), (F, N, F), (F, F, N), (F, N, N), (N, N, N)])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_empty_batches_have_a_graph_and_zero_gradients(impl, name, sizes):
    operator, inputs = CALLS[name](*sizes)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = operator(*leaves, impl=impl)
    assert out.requires_grad
    out.sum().backward()
    if out.numel() == 0 or name in ("cross entropy", "attention", "cross"):
        empty = 0 in sizes[:2] or (name in ("attention", "cross") and sizes[2] == 0)
        for x in leaves:
            assert x.grad is not None
            assert x.grad.shape == x.shape
            assert not (empty and x.grad.any())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_of_the_table_is_computed_without_grad(context):
    h, weight = torch.randn(1, 2, 8), torch.randn(500, 8, requires_grad=True)
    with context(), Largest() as largest:
        kernels.linear_cross_entropy(h, weight, torch.zeros(1, 2, dtype=torch.int64), impl="torch")
    assert largest.elements <= 2 * 500


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_operators_take_the_type_of_autocast(impl, name):
    """Mixed inputs too; gradients come back in each input's own type. float64 stays, as in torch's products."""
    operator, inputs = CALLS[name](2, 3, 4)
    leaves = [x.to(torch.float16 if i else torch.float32).requires_grad_() for i, x in enumerate(inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        out = operator(*leaves, impl=impl)
    expected = operator(*(x.to(torch.bfloat16) for x in leaves), impl=impl)
    assert torch.equal(out, expected)
    assert out.dtype == expected.dtype
    assert [g.dtype for g in torch.autograd.grad(out.sum(), leaves)] == [x.dtype for x in leaves]
    if impl != "triton":
        with torch.autocast("cpu", torch.bfloat16):
            assert operator(*(x.double() for x in inputs), impl=impl).dtype == torch.float64
