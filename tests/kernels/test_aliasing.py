"""No operator writes into what it was given: inputs, upstream gradients and earlier outputs keep every bit."""

from itertools import product

import harness
import pytest
import torch

import kernels
from kernels.dropout import Dropout, dropout_state

SIZES = {"B": 2, "L": 3, "H": 2, "K": 16, "D": 16, "F": 4, "V": 7}
LAYOUTS = ("contiguous", "expanded", "transposed", "overlapping")


def site(number: int) -> Dropout:
    return Dropout(0.4, dropout_state(1, 2), number)


def lay_out(shape: tuple[int, ...], layout: str, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """A leaf of `shape` whose memory is a view of something larger, or shared by its own elements."""
    count = 4 * max(1, torch.Size(shape).numel())
    store = torch.randn(count, generator=generator).to(dtype)
    if layout == "expanded":
        return store[: torch.Size(shape[1:]).numel()].view(1, *shape[1:]).expand(shape)
    if layout == "transposed" and len(shape) > 1:
        return store[: torch.Size(shape).numel()].view(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "overlapping":  # every row starts one element after the last one's start
        return store.as_strided(shape, (*range(1, len(shape)), 1))
    return store[: torch.Size(shape).numel()].view(shape)


def operators(n: dict[str, int]) -> dict:
    """name: (shapes of the floating inputs, call)."""
    ids = torch.arange(n["B"] * n["L"]).view(n["B"], n["L"]) % n["V"]
    heads = (n["B"], n["L"], n["H"], n["K"])
    packed = [(n["B"], n["L"], parts, n["H"], n["K"]) for parts in (3, 2)]
    stream, table, lengths = (n["B"], n["L"], n["D"]), (n["V"], n["D"]), torch.full((n["B"],), max(1, n["L"] - 1))
    padded = {"key_lengths": lengths, "dropout": site(0), "scale": 0.5}

    def hidden(kind: str, activation: str):
        rows = n["F"] * (1 if kind == "plain" else 2)
        gate = {"gate_dropout": site(1)} if kind == "mixed" else {}
        return [stream, (rows, n["D"])], lambda x, w, **o: kernels.glu(
            x, w, kind=kind, activation=activation, dropout=site(0), **gate, **o
        )

    return {
        "attention": ([heads] * 3, lambda q, k, v, **o: kernels.attention(q, k, v, **padded, **o)),
        "causal": ([heads] * 3, lambda q, k, v, **o: kernels.attention(q, k, v, scale=1.0, causal=True, **o)),
        "self": (packed[:1], lambda x, **o: kernels.attention(x, **padded, **o)),
        "cross": ([heads, packed[1]], lambda q, kv, **o: kernels.attention(q, kv, **padded, **o)),
        "unified": ([heads] * 5, lambda *x, **o: kernels.attention(*x, causal=True, **padded, **o)),
        "packed unified": (packed, lambda q, kv, **o: kernels.attention(q, k2=kv, causal=True, **padded, **o)),
        "plain relu": hidden("plain", "relu"),
        "plain identity": hidden("plain", "identity"),
        "gated": hidden("gated", "silu"),
        "mixed": hidden("mixed", "relu"),
        "residual norm": (
            [stream, stream, stream[2:]],
            lambda x, s, g, **o: kernels.residual_norm(x, s, g, dropout=site(0), **o),
        ),
        "norm alone": ([stream, stream[2:]], lambda x, g, **o: kernels.residual_norm(x, None, g, **o)),
        "no residual": (
            [stream, stream[2:]],
            lambda s, g, **o: kernels.residual_norm(None, s, g, dropout=site(0), **o),
        ),
        "cross entropy": ([stream, table], lambda h, w, **o: kernels.linear_cross_entropy(h, w, ids, scale=0.5, **o)),
        "embedding": (
            [table, (n["L"], n["D"])],
            lambda t, p, **o: kernels.embedding(ids, t, p, dropout=site(0), position_dropout=site(1), **o),
        ),
        "linear": ([stream, (n["F"], n["D"])], lambda x, w, **o: kernels.linear(x, w, **o)),
        "tied table": ([table], lambda t, **o: kernels.tied_table(t, **o)),
    }


def changed(before: list[torch.Tensor], after: list[torch.Tensor]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)]


def check(name: str, one: str | None, layout: str, impl: str, dtype: torch.dtype = torch.float32) -> None:
    shapes, call = operators(SIZES | ({one: 1} if one else {}))[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [lay_out(shape, layout, generator, dtype).requires_grad_() for shape in shapes]
    kept = [x.detach().clone() for x in inputs]
    where = f"{name}, {one or 'nothing'} 1, {layout}, {impl}, {dtype}"
    with torch.no_grad():  # the buffers that no backward needs may be reused: never one that was given
        call(*inputs, impl=impl)
    assert not changed(kept, [x.detach() for x in inputs]), f"{where}: a forward without grad wrote into an input"
    outputs = call(*inputs, impl=impl)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    assert not changed(kept, [x.detach() for x in inputs]), f"{where}: forward wrote into an input"
    returned = [x.detach().clone() for x in outputs]
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    given = [x.clone() for x in upstream]
    first = torch.autograd.grad(outputs, inputs, upstream, retain_graph=True, allow_unused=True)
    first = [None if x is None else x.to_dense().clone() for x in first]
    again = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    assert not changed(kept, [x.detach() for x in inputs]), f"{where}: backward wrote into an input"
    assert not changed(given, upstream), f"{where}: backward wrote into an upstream gradient"
    assert not changed(returned, [x.detach() for x in outputs]), f"{where}: backward wrote into an output"
    for a, b in zip(first, again, strict=True):
        assert a is None or torch.equal(a, b.to_dense()), f"{where}: a second backward gives another gradient"


NAMES = list(operators(SIZES))
every_operator = pytest.mark.parametrize("name", NAMES)


@pytest.mark.skipif(not harness.INTERPRETED, reason="of every implementation on a CPU")
@pytest.mark.parametrize("impl", ["reference", "torch"])
@every_operator
def test_nothing_given_changes(name, impl):
    """Every size of one as it lies, the batch of one in every layout: what is copied without need shows in both."""
    for one in (None, *SIZES):
        check(name, one, "contiguous", impl)
    for layout in LAYOUTS[1:]:
        check(name, "B", layout, impl)


@pytest.mark.skipif(not harness.INTERPRETED, reason="of every implementation on a CPU")
@every_operator
def test_nothing_given_changes_fused(name):
    check(name, "B", "contiguous", "triton")


@pytest.mark.slow
@pytest.mark.skipif(not harness.INTERPRETED, reason="of every implementation on a CPU")
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@every_operator
def test_nothing_given_changes_in_any_layout(name, impl):
    for one, layout, dtype in product((None, *SIZES), LAYOUTS, (torch.float32, torch.float16)):
        check(name, one, layout, impl, dtype)
