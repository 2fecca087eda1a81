"""Attention over two segments in the interpreter against the float64 formula, and two attentions that are merged."""

import harness
import pytest
import torch
from harness import DEVICE
from test_attention import _randn, dropout, small_tiles  # noqa: F401  a fixture

import kernels
from kernels.dropout import SEGMENT_COLUMNS, Dropout, keep_mask
from kernels.fused.attention import attention_op


def case(
    batch=1, length=5, others=7, heads=1, groups=None, other_groups=None, width=16, value_width=None, shared=False
):
    groups, other_groups, value_width = groups or heads, other_groups or heads, value_width or width
    key_batch = 1 if shared else batch
    return {
        "q": _randn(batch, length, heads, width) * width**-0.25,
        "k": _randn(batch, length, groups, width, seed=1) * width**-0.25,
        "v": _randn(batch, length, groups, value_width, seed=2),
        "k2": _randn(key_batch, others, other_groups, width, seed=3) * width**-0.25,
        "v2": _randn(key_batch, others, other_groups, value_width, seed=4),
    }


def check(inputs, kwargs, *arguments, **options):
    harness.check("attention", inputs, {"causal": True} | kwargs, *arguments, **options)


LENGTHS = [(1, 1), (1, 63), (63, 1), (33, 92), (70, 20), (16, 32)]


@pytest.mark.parametrize(("length", "others"), LENGTHS)
def test_lengths(small_tiles, length, others):  # noqa: F811
    dtype = torch.float16 if length == 33 else torch.float32
    check(case(length=length, others=others), {"dropout": dropout()}, dtype)


def test_own_keys_need_not_be_causal(small_tiles):  # noqa: F811
    check(case(2, 20, 50, heads=2), {"causal": False, "dropout": dropout(), "key_lengths": torch.tensor([50, 18])})


@pytest.mark.parametrize("width", [8, 40, 64, 112, 190])
def test_head_widths(width):
    check(case(length=19, others=37, width=width), {"dropout": dropout()})


PADDINGS = {
    # a sequence without other keys: its first query sees one key, whose gradients cancel
    "lengths": ({"key_lengths": torch.tensor([50, 0, 33])}, ("q", "k")),
    "mask": ({"key_mask": torch.rand(3, 50, generator=torch.Generator().manual_seed(3)) > 0.6}, ()),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding(small_tiles, padding):  # noqa: F811
    kwargs, cancelling = PADDINGS[padding]
    inputs = case(3, 20, 50, heads=2, groups=2, other_groups=1, value_width=24)
    check(inputs, kwargs | {"dropout": dropout()}, cancelling=cancelling)


def test_shared_other_keys(small_tiles):  # noqa: F811
    check(case(3, 20, 50, 2, 1, 1, shared=True), {"dropout": dropout(), "scale": -0.3})


def test_no_other_keys(small_tiles):  # noqa: F811
    check(case(length=20, others=0), {"dropout": dropout()}, cancelling=("q", "k"))


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_empty(batch, length):
    inputs = {n: x.float().requires_grad_() for n, x in case(batch, length).items()}
    out = kernels.attention(**inputs, causal=True, impl="triton")
    assert out.shape == (batch, length, 1, 16)
    out.sum().backward()
    assert all(not x.grad.any() for x in inputs.values())


@pytest.mark.parametrize("layout", ["guarded", "transposed", "strided"])
def test_layouts(layout):
    check(case(2, 9, 21, heads=2), {"dropout": dropout()}, layout=layout)


def test_two_attentions_merged_through_their_log_sum_exps_give_the_same(small_tiles):  # noqa: F811
    """O = (2^(lse1 - lse) O1 + 2^(lse2 - lse) O2), lse = log2(2^lse1 + 2^lse2)."""
    inputs = {n: x.float().to(DEVICE) for n, x in case(2, 40, 50).items()}
    lengths = torch.tensor([50, 0], device=DEVICE)
    q, k1, v1, k2, v2 = inputs.values()
    o1, lse1 = attention_op([q, k1, v1], None, None, None, 1.0, True, 0.0, 0)
    o2, lse2 = attention_op([q, k2, v2], lengths, None, None, 1.0, False, 0.0, 0)
    # a query without keys has an lse of +inf, which stands for an empty sum
    lse2 = torch.where(lse2 == torch.inf, -torch.inf, lse2)
    lse = torch.logaddexp2(lse1, lse2)
    w1, w2 = (torch.exp2(one - lse).transpose(1, 2)[..., None] for one in (lse1, lse2))
    merged = w1 * o1 + w2 * o2
    out = kernels.attention(**inputs, causal=True, scale=1.0, key_lengths=lengths, impl="triton")
    torch.testing.assert_close(out, merged, rtol=1e-5, atol=1e-6)


def test_masks_are_those_of_the_contract():
    """Equal scores, one-hot values: O of the last query is the mask of both segments."""
    n, d = 24, dropout(0.4)
    d = Dropout(d.p, d.rng.to(DEVICE), d.site)
    zeros = torch.zeros(1, n, 1, 16, device=DEVICE)
    one_hot = torch.eye(2 * n, device=DEVICE)[:, None]
    out = kernels.attention(
        zeros, zeros, one_hot[:n][None], zeros, one_hot[n:][None], causal=True, dropout=d, impl="triton"
    )
    own = keep_mask(d, 1, 1, n, n)[0, 0, -1]
    other = keep_mask(d, 1, 1, n, n, offset=SEGMENT_COLUMNS)[0, 0, -1]
    assert torch.equal(out[0, -1, 0] != 0, torch.cat([own, other]))
