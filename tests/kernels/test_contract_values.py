"""Values that 16 bits and padding must not spoil, in every implementation."""

import harness
import pytest
import torch

import kernels

pytestmark = pytest.mark.skipif(not harness.INTERPRETED, reason="of every implementation on a CPU")
every_implementation = pytest.mark.parametrize("impl", ["reference", "torch", "triton"])


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(form: str, q, k, v, impl: str, **padding) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(O, gradients) of q, k, v [B, L, H, K] through an operator whose padded keys are k and v."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    settings = {"scale": 1.0, "impl": impl, **padding}
    if form == "attention":
        out = kernels.attention(*leaves, **settings)
    elif form == "causal":
        out = kernels.attention(*leaves, causal=True, **settings)
    elif form == "self_attention":
        out = kernels.attention(torch.stack(leaves, 2), **settings)
    elif form == "cross_attention":
        out = kernels.attention(leaves[0], torch.stack(leaves[1:], 2), **settings)
    else:
        own = draw(*k.shape, seed=7)
        out = kernels.attention(leaves[0], own, own, *leaves[1:], causal=True, **settings)
    return out.detach(), list(torch.autograd.grad(out, leaves, draw(*out.shape, dtype=out.dtype, seed=9)))


@every_implementation
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("padding", ["key_lengths", "key_mask"])
@pytest.mark.parametrize("form", ["attention", "causal", "cross_attention", "two_segments"])
def test_padding_reaches_nothing(form, padding, value, impl):
    q, k, v = (draw(2, 4, 2, 16, seed=seed) for seed in range(3))
    real = torch.tensor([[True, True, False, False], [True, True, True, False]])
    settings = {"key_mask": real} if padding == "key_mask" else {"key_lengths": real.sum(1)}
    expected = attend(form, q, k, v, impl, **settings)
    spoiled = [x.masked_fill(~real[..., None, None], value) for x in (k, v)]
    out, gradients = attend(form, q, *spoiled, impl, **settings)
    for a, b in zip((out, *gradients), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["attention", "causal", "self_attention", "cross_attention"])
def test_a_query_without_keys_gives_zeros_whatever_its_scores(form, dtype, impl):
    q, k = torch.full((2, 3, 1, 16), 4.0, dtype=dtype), torch.full((2, 3, 1, 16), -4.0, dtype=dtype)  # scores -256
    out, gradients = attend(form, q, k, k, impl, key_lengths=torch.tensor([0, 3]))
    assert not out[0].any()
    assert out[1].isfinite().all()
    assert not any(x[0].any() or not x.isfinite().all() for x in gradients)


@every_implementation
@pytest.mark.parametrize("factor", [1 / 3, 1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_applies_the_incoming_gradient_in_float32(dtype, factor, impl):
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 is not among the interpreter's types here")
    h, weight = draw(1, 64, 32, dtype=dtype), draw(48, 32, dtype=dtype, seed=1)
    labels = torch.arange(64)[None] % 48
    labels[0, :5] = -100

    def gradients(dtype, impl):
        leaves = [x.to(dtype).requires_grad_() for x in (h, weight)]
        loss = kernels.linear_cross_entropy(*leaves, labels, scale=0.2, impl=impl)
        return torch.autograd.grad(loss * factor, leaves)

    for ours, exact in zip(gradients(dtype, impl), gradients(torch.float64, "reference"), strict=True):
        assert ours.isfinite().all()
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < 3 * torch.finfo(dtype).eps, f"{error:.2e}"
