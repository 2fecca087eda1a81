"""glu in Triton against the formula in float64: every kind and activation, gradients, dropout, shapes, strides."""

import pytest
import torch
from harness import DEVICE, check
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.activations import ACTIVATIONS
from kernels.dropout import Dropout, dropout_state, keep_scale, stream_keep_mask
from kernels.fused import tiles_glu

HALVES = {"plain": 1, "gated": 2, "mixed": 2}


def _dropout(site, p=0.25, first=5):
    return Dropout(p, dropout_state(42, 3, first), site)


def _inputs(kind, batch=2, length=9, depth=40, width=85):
    generator = torch.Generator().manual_seed(batch + 7 * length + 11 * depth + 13 * width)
    x = torch.randn(batch, length, depth, generator=generator, dtype=torch.float64)
    weight = torch.randn(HALVES[kind] * width, depth, generator=generator, dtype=torch.float64)
    return {"x": x, "weight": weight / max(depth, 1) ** 0.5}


FORMS = {
    **{
        f"{kind} {activation}": {"kind": kind, "activation": activation}
        for kind in ("plain", "gated")
        for activation in ACTIVATIONS
    },
    "mixed": {"kind": "mixed"},
    "mixed half": {"kind": "mixed", "factor": 0.5},
    "mixed dropout": {"kind": "mixed", "factor": 0.5, "gate_dropout": _dropout(3, 0.5)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_dropout(form, dtype):
    settings = FORMS[form]
    check("glu", _inputs(settings["kind"]), {**settings, "dropout": _dropout(2)}, dtype)


@pytest.mark.parametrize("form", ["plain relu", "plain silu", "gated gelu", "mixed half"])
def test_without_dropout(form):
    settings = FORMS[form]
    check("glu", _inputs(settings["kind"]), settings)


@pytest.mark.parametrize("dropout", [None, _dropout(2)], ids=["", "dropout"])
@pytest.mark.parametrize("form", ["plain relu", "plain gelu", "gated silu", "mixed dropout"])
def test_recompute_instead_of_save(form, dropout):
    settings = FORMS[form]
    check("glu", _inputs(settings["kind"]), {**settings, "dropout": dropout, "recompute": True})


# rows beyond a tile, columns beyond a tile and beyond a multiple of 16, inner widths around a block's 32
SHAPES = [(3, 63, 40, 85), (2, 1, 32, 133), (1, 130, 33, 16), (5, 1, 1, 1), (1, 2, 65, 17), (130, 1, 8, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain relu", "gated silu"])
def test_odd_sizes(form, shape):
    settings = FORMS[form]
    check("glu", _inputs(settings["kind"], *shape), {**settings, "dropout": _dropout(2)})


@pytest.mark.parametrize("shape", [(3, 63, 40, 84), (1, 130, 36, 136), (2, 5, 136, 96)], ids=str)
def test_aligned_rows_in_16_bits(shape):
    """Tiles of 128 x 128, two words of bits a step, the last of which may not exist; odd widths take 64 x 64."""
    check("glu", _inputs("plain", *shape), {**FORMS["plain relu"], "dropout": _dropout(2)}, torch.float16)


def test_broadcast_input():
    inputs = _inputs("gated")
    expanded = {**inputs, "x": inputs["x"][:1].expand(3, -1, -1)}
    got = kernels.glu(expanded["x"].float().to(DEVICE), inputs["weight"].float().to(DEVICE), impl="triton")
    one = kernels.glu(inputs["x"][:1].float().to(DEVICE), inputs["weight"].float().to(DEVICE), impl="triton")
    torch.testing.assert_close(got, one.expand(3, -1, -1))


def _float(kind, **sizes):
    return [x.float().to(DEVICE).requires_grad_() for x in _inputs(kind, **sizes).values()]


def test_dropout_is_the_contracts_mask_exactly():
    x, weight = _float("plain", length=63)
    dropout = Dropout(0.3, dropout_state(7, 9, 11, device=DEVICE), 5)
    plain = kernels.glu(x, weight, kind="plain", activation="identity", impl="triton")
    dropped = kernels.glu(x, weight, kind="plain", activation="identity", dropout=dropout, impl="triton")
    keep = stream_keep_mask(dropout, plain)
    assert torch.equal(dropped != 0, keep & (plain != 0))
    torch.testing.assert_close(dropped[keep], plain[keep] * keep_scale(0.3))


@pytest.mark.parametrize(("length", "width"), [(1, 31), (530, 85)])
def test_the_gradient_of_the_weight_in_several_splits(length, width):
    """Rows in shares of whole blocks, the last one cut, added in order: `tiles_glu.splits` from the shape alone."""
    inputs = _inputs("plain", 3, length, 16, width)
    tile = tiles_glu.gradient_tile("sm_86", "dw", 32, 1)
    splits, share = tiles_glu.splits(-(-width // tile.m), 3 * length, tile.k)
    assert (splits > 1) == (length > 1)
    assert (splits - 1) * share < 3 * length <= splits * share
    check("glu", inputs, {**FORMS["plain relu"], "dropout": _dropout(2)})


def test_an_underflow_keeps_its_gradient():
    """What the relu lets through is decided in float32: a hidden element that float16 rounds to 0 has its gradient."""
    x = torch.full((1, 1, 8), 2.0**-13, dtype=torch.float16, device=DEVICE, requires_grad=True)
    weight = torch.full((16, 8), 2.0**-15, dtype=torch.float16, device=DEVICE)
    hidden = kernels.glu(x, weight, kind="plain", activation="relu", impl="triton")
    assert not hidden.any()
    (got,) = torch.autograd.grad(hidden, [x], torch.ones_like(hidden))
    assert torch.equal(got, torch.full_like(got, 16 * 2.0**-15))


def test_flops_are_those_of_the_products():
    """2 M D rows forward, as much for each of d_x and d_weight, and again where recomputed."""
    rows, depth = 2 * 9, 40
    for form, recompute, passes in (
        ("gated relu", False, 1),
        ("gated relu", True, 2),
        ("plain relu", False, 1),
        ("plain relu", True, 2),
    ):
        width = 96 * HALVES[FORMS[form]["kind"]]
        x = torch.empty(2, 9, depth, device="meta", requires_grad=True)
        weight = torch.empty(width, depth, device="meta", requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            hidden = kernels.glu(x, weight, impl="triton", recompute=recompute, **FORMS[form])
            hidden.backward(torch.empty_like(hidden))
        assert counter.get_total_flops() == (passes + 2) * 2 * rows * depth * width


def test_rows_of_the_hidden_layer_are_aligned():
    x, weight = _float("gated")
    hidden = kernels.glu(x, weight, impl="triton")
    assert hidden.shape == (2, 9, 85)
    assert hidden.stride() == (9 * 96, 96, 1)


def test_no_products_are_written_in_evaluation():
    x, weight = _float("gated")
    with torch.no_grad():
        _, product = torch.ops.march.glu(x, weight, None, None, "gated", "relu", 1.0, 0.0, 0, 0.0, 0, "")
    assert product.numel() == 0


def test_a_length_unseen_compiles_no_new_graph():
    _, weight = _float("gated")
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    layer = torch.compile(
        lambda x: kernels.glu(x, weight, impl="triton"), backend=backend, dynamic=True, fullgraph=True
    )
    for length in (5, 9, 13):
        x, _ = _float("gated", length=length)
        assert torch.equal(layer(x), kernels.glu(x, weight, impl="triton"))
    assert len(graphs) == 1
