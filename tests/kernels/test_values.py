"""Values that no type excludes: lengths, masks beside lengths, NaN in padding, labels and ids outside their range."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from harness import DEVICE
from test_launch import CASES, HEADS, LENGTHS, MASK, SEGMENTS, Case, call, differentiate, leaves_of, randn
from torch import Tensor

import kernels
from kernels.dropout import Dropout, dropout_state
from kernels.fused import attention as fused_attention

IMPLS = ("triton", "torch", "reference")
RNG = dropout_state(42, 7, 3)


LONG = torch.tensor([2**31, 2**32, 2**32 + 3, 2**63 - 1, -1, -(2**31), -(2**32), -(2**63)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["lengths", "packed unified"])
def test_lengths_of_any_value_are_bounded_before_they_are_narrowed(name, impl):
    results = []
    for lengths in (LONG, torch.where(LONG > 0, 9, 0)):
        inputs = {n: x[:1].repeat(len(LONG), *[1] * (x.dim() - 1)) for n, x in CASES[name].inputs.items()}
        case = Case("attention", inputs, {"causal": "k2" in inputs, "key_lengths": lengths.to(DEVICE)})
        leaves = leaves_of(case)
        outputs = call(case, leaves, impl)
        results.append((*outputs, *differentiate(outputs, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("form", ["q k v", "qkv", "q kv", "q k v k2 v2", "qkv kv2"])
def test_lengths_and_mask_together_are_refused_below_the_api_too(form):
    q, kv = torch.zeros(2, 9, 2, 16, device=DEVICE), torch.zeros(2, 9, 2, 2, 16, device=DEVICE)
    of = {"qkv": torch.zeros(2, 9, 3, 2, 16, device=DEVICE), "kv": kv, "kv2": kv}
    both = {"key_lengths": LENGTHS.to(DEVICE), "key_mask": MASK.to(DEVICE)}
    with pytest.raises(ValueError, match="expected key_lengths or key_mask, got both"):
        fused_attention.attention(*(of.get(n, q) for n in form.split()), scale=1.0, causal=True, dropout=None, **both)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("padding", ["key_lengths", "key_mask"])
@pytest.mark.parametrize("given", [HEADS, SEGMENTS], ids=["one segment", "two segments"])
def test_what_lies_in_padding_keys_reaches_nothing(given, padding, shared):
    """Keys and values, NaN included: outputs and gradients keep the bits that zeros there give. Shared keys: what is
    padding in one sequence alone, and in all of them."""
    real = torch.arange(9)[None] < torch.tensor([6, 4])[:, None] if padding == "key_lengths" else MASK.clone()
    real[:, -2:] = False
    argument = torch.tensor([6, 4], device=DEVICE) if padding == "key_lengths" else real.to(DEVICE)
    filling = torch.tensor([math.inf, 3e38, -math.inf]).repeat(5)[:9].index_fill(0, torch.tensor([4, 8]), math.nan)
    results = []
    for values in (torch.zeros(9), filling.flip(0), filling):
        inputs = {n: x.float() for n, x in given.items()}
        for n in list(inputs)[-2:]:
            absent = ~(real.any(0, keepdim=True) if shared else real)
            x = inputs[n][:1] if shared else inputs[n]
            inputs[n] = torch.where(absent[..., None, None], values[None, :, None, None], x)
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
        d = Dropout(0.3, RNG.to(DEVICE), 4)
        out = kernels.attention(*leaves, **{padding: argument}, causal=len(leaves) > 3, dropout=d, impl="triton")
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert results[0][0].isfinite().all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_what_is_padding_in_one_sequence_alone_stays_out_of_that_sequence():
    q, k, v = (x.float().to(DEVICE) for x in HEADS.values())
    k, v = k[:1].clone(), v[:1].clone()
    k[:, 6:], v[:, 6:] = math.nan, math.nan
    mask = torch.arange(9)[None] < torch.tensor([6, 9])[:, None]
    for padding in ({"key_mask": mask.to(DEVICE)}, {"key_lengths": torch.tensor([6, 9], device=DEVICE)}):
        assert kernels.attention(q, k, v, **padding, impl="triton")[0].isfinite().all()


# ---------------------------------------------------------------- labels and ids


OUTSIDE = [9, -1, 10**6, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)]


@contextlib.contextmanager
def no_stray_access():
    """Every address that the interpreter loads from or stores to lies in a tensor of the launch."""
    from triton.runtime import interpreter

    spans: list[tuple[int, int]] = []
    builder, true_init = interpreter.interpreter_builder, interpreter.GridExecutor._init_args_hst
    true_load, true_store = builder.create_masked_load, builder.create_masked_store

    def init(self, args, kwargs):
        host, host_kwargs = true_init(self, args, kwargs)
        tensors = [x for x in (*host, *host_kwargs.values()) if isinstance(x, Tensor) and x.numel()]
        extents = [1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        spans[:] = [(x.data_ptr(), x.data_ptr() + n * x.element_size()) for x, n in zip(tensors, extents, strict=True)]
        return host, host_kwargs

    def inside(pointers, mask):
        addresses = pointers.data[mask.data]
        known = sum(((addresses >= low) & (addresses < high)) for low, high in spans)
        assert addresses.size == 0 or known.all(), "an access outside the tensors of the launch"

    def load(pointers, mask, *rest):
        inside(pointers, mask)
        return true_load(pointers, mask, *rest)

    def store(pointers, value, mask, *rest):
        inside(pointers, mask)
        return true_store(pointers, value, mask, *rest)

    with (
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", init),
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
    ):
        yield


@pytest.mark.parametrize("ignored", [-100, -1, 0])
@pytest.mark.parametrize("label", OUTSIDE)
def test_labels_outside_the_vocabulary_give_nan_and_touch_nothing(label, ignored):
    """In every implementation and form of backward the same: NaN in the loss, in that token's, its row of dh, all of
    dE."""
    known = label == ignored
    labels = torch.tensor([[1, label, 5], [ignored, 8, 3]], device=DEVICE)
    results = []
    with no_stray_access():
        for impl, logits in (("reference", "auto"), ("torch", "auto"), ("triton", "recompute"), ("triton", "chunks")):
            h, weight = (x.float().to(DEVICE).requires_grad_() for x in (randn(2, 3, 16), randn(9, 16)))
            loss, each = kernels.linear_cross_entropy(
                h, weight, labels, ignore_index=ignored, return_per_token=True, logits=logits, impl=impl
            )
            results.append((loss, each, *torch.autograd.grad(loss, (h, weight))))
    loss, each, dh, dw = results[0]
    assert loss.isnan() == dw.isnan().all() == (not known)
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[0, 1] = not known
    assert torch.equal(each.isnan().cpu(), expected)
    assert torch.equal(dh.isnan().all(-1).cpu(), expected)
    assert torch.equal(dh.isnan().any(-1).cpu(), expected)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("token", OUTSIDE)
def test_ids_outside_the_table_give_nan_and_touch_nothing(token, drops):
    """In every implementation the same: a row of NaN, no gradient in the table from it."""
    ids = torch.tensor([[1, token, 5], [token, 8, 1]], device=DEVICE)
    rng = RNG.to(DEVICE)
    kwargs = {"dropout": Dropout(0.5, rng, 1), "position_dropout": Dropout(0.5, rng, 2)} if drops else {}
    results = []
    with no_stray_access():
        for impl in IMPLS:
            tables = [randn(n, 16).float().to(DEVICE).requires_grad_() for n in (9, 4)]
            out = kernels.embedding(ids, *tables, **kwargs, impl=impl)
            results.append((out, *torch.autograd.grad(out, tables, torch.ones_like(out))))
    assert torch.equal(results[0][0].isnan().all(-1), ids == token)
    assert torch.equal(results[0][0].isnan().any(-1), ids == token)
    assert not results[0][1][[i for i in range(9) if i not in (1, 5, 8)]].any()
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_debug_switch_names_the_index(impl, monkeypatch):
    h, table, positions = (randn(*n).float().to(DEVICE) for n in ((2, 3, 16), (9, 16), (4, 16)))
    indices = torch.tensor([[1, 2, -100], [3, 2**32, -1]], device=DEVICE)
    monkeypatch.setenv("KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"expected labels in \[0, 9\) or -100, got 4294967296 at \[1, 1\]"):
        kernels.linear_cross_entropy(h, table, indices, impl=impl)
    with pytest.raises(ValueError, match=r"expected ids in \[0, 9\), got -100 at \[0, 2\]"):
        kernels.embedding(indices, table, positions, impl=impl)
    fine = indices.clamp(0, 8)
    kernels.linear_cross_entropy(h, table, fine, impl=impl)
    kernels.embedding(fine, table, positions, impl=impl)
    with pytest.raises(ValueError, match="expected a vocabulary of at least 1, got 0"):
        kernels.embedding(fine, table[:0], positions, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [[1, 2]]}, "labels as a tensor, got list; convert it"),
        ({"weight": None}, "weight as a tensor, got NoneType"),
        ({"ignore_index": -100.0}, "ignore_index as an int of 64 bits, got -100.0"),
        ({"ignore_index": None}, "ignore_index as an int of 64 bits, got None"),
        ({"ignore_index": 2**63}, "ignore_index as an int of 64 bits, got 9223372036854775808"),
        ({"logits": "chunk"}, "logits among auto, recompute, chunks, got 'chunk'"),
    ],
)
def test_arguments_of_another_type_are_refused_in_every_implementation(changed, message, impl):
    given = {"h": randn(1, 2, 16).float(), "weight": randn(9, 16).float(), "labels": torch.tensor([[1, 2]])}
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(**given | changed, impl=impl)
