"""residual_norm in Triton's interpreter against float64: outputs, gradients, dropout."""

import pytest
import torch
from harness import DEVICE, DTYPES, check

import kernels
from kernels import cases
from kernels.dropout import Dropout, dropout_state

DROPOUT = Dropout(0.1, dropout_state(42, 7, 3), 11)


def _inputs(batch, length, width, form="both", seed=0):
    inputs = cases.residual_norm_inputs(batch, length, width, seed=seed)
    if form == "no residual":
        inputs["x"] = None
    if form == "norm alone":
        inputs["s"] = None
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["both", "no residual", "norm alone"])
@pytest.mark.parametrize("dropped", [False, True])
def test_forms(form, dropped, dtype):
    if form == "norm alone" and dropped:
        pytest.skip("there is no sublayer to drop")
    check("residual_norm", _inputs(2, 7, 40, form), {"dropout": DROPOUT if dropped else None}, dtype)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 63), (3, 5), (2, 33)])
@pytest.mark.parametrize("width", [1, 8, 380])
def test_shapes(batch, length, width):
    check("residual_norm", _inputs(batch, length, width), {"dropout": DROPOUT})


@pytest.mark.parametrize("width", [448, 512, 1000, 1024, 2048, 4096])
def test_widths(width):
    check("residual_norm", _inputs(2, 2, width), {"dropout": DROPOUT}, torch.float16)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("form", ["both", "no residual", "norm alone"])
def test_rows_filled_up_with_zeros(form, impl):
    """Columns of zeros change nothing where `features` counts the others: outputs, gradients, and dropout's masks."""
    dropout = None if form == "norm alone" else DROPOUT
    given = {n: x.float().requires_grad_() if x is not None else None for n, x in _inputs(2, 7, 30, form).items()}
    wider = {n: torch.nn.functional.pad(x, (0, 6)) if x is not None else None for n, x in given.items()}
    leaves = [x for x in given.values() if x is not None]
    results = []
    for inputs, kwargs in ((given, {}), (wider, {"features": 30})):
        y, z = kernels.residual_norm(**inputs, dropout=dropout, impl=impl, **kwargs)
        assert not y[..., 30:].any()
        assert not z[..., 30:].any()
        loss = (y[..., :30] * torch.arange(30.0)).sum() + (z[..., :30].square() * torch.arange(30.0)).sum()
        results.append((y[..., :30], z[..., :30], *torch.autograd.grad(loss, leaves)))
    for own, filled in zip(*results, strict=True):
        torch.testing.assert_close(filled, own, rtol=1e-4, atol=1e-4)


def test_features_are_counted():
    """Rows that are not zero beyond them too: what is divided by, forward and backward."""
    check("residual_norm", _inputs(2, 7, 40), {"dropout": DROPOUT, "features": 23})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["both", "no residual", "norm alone"])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 380, 448, 512, 513, 1024, 2048, 5000, 16384])
def test_every_width_and_form(width, form, dtype):
    dropout = None if form == "norm alone" else DROPOUT
    # 27 rows: of fewer, the formula's error in float16 is a matter of luck, and so would be the budget
    check("residual_norm", _inputs(3, 9, width, form), {"dropout": dropout, "eps": 1e-5}, dtype)


@pytest.mark.parametrize("layout", ["guarded", "transposed", "strided"])
def test_layouts(layout):
    check("residual_norm", _inputs(2, 6, 24), {"dropout": DROPOUT}, layout=layout)


@pytest.mark.parametrize("form", ["both", "no residual", "norm alone"])
@pytest.mark.parametrize("unused", ["y", "z"])
def test_one_output_unused(form, unused):
    dropout = None if form == "norm alone" else DROPOUT
    check("residual_norm", _inputs(2, 5, 24, form), {"dropout": dropout}, unused=(unused,))


def test_many_rows_for_each_program(monkeypatch):
    """The loop over tiles and the sum over programs, with programs that do unequal work."""
    from kernels.fused import tiles_rows

    monkeypatch.setattr(tiles_rows, "PROGRAMS", 5)
    check("residual_norm", _inputs(3, 31, 40), {"dropout": DROPOUT})


@pytest.mark.parametrize("p", [0.5, 0.9, 1e-9])
def test_probabilities(p):
    check("residual_norm", _inputs(2, 5, 40), {"dropout": Dropout(p, dropout_state(1, 2, 3), 5)})


@pytest.mark.parametrize("form", ["both", "no residual", "norm alone"])
@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_empty(form, batch, length):
    dropout = None if form == "norm alone" else DROPOUT
    check("residual_norm", _inputs(batch, length, 16, form), {"dropout": dropout})


def test_zero_rows_stay_finite():
    inputs = _inputs(2, 5, 24)
    inputs["x"][:, 2] = 0.0
    inputs["s"][:, 2] = 0.0
    check("residual_norm", inputs, {"dropout": None})


def test_bits_do_not_depend_on_the_micro_batch():
    """Sequences 2 and 3 of a batch of 4, alone: the same masks, the same bits."""
    inputs = {n: None if x is None else x.float().to(DEVICE) for n, x in _inputs(4, 5, 24).items()}
    rng = dropout_state(42, 7, 3, DEVICE)
    whole = kernels.residual_norm(**inputs, dropout=Dropout(0.3, rng, 4), impl="triton")
    part = {"x": inputs["x"][2:], "s": inputs["s"][2:], "gain": inputs["gain"]}
    later = Dropout(0.3, dropout_state(42, 7, 5, DEVICE), 4)
    for a, b in zip(whole, kernels.residual_norm(**part, dropout=later, impl="triton"), strict=True):
        assert torch.equal(a[2:], b)


def test_refusals():
    inputs = {n: x.to(DEVICE) for n, x in _inputs(1, 2, 8).items()}
    with pytest.raises(ValueError, match="float64"):
        kernels.residual_norm(**inputs, impl="triton")
    wide = {n: x.float().to(DEVICE) for n, x in _inputs(1, 1, 16385).items()}
    with pytest.raises(ValueError, match="16384"):
        kernels.residual_norm(**wide, impl="triton")


@pytest.mark.parametrize("form", ["both", "norm alone"])
def test_checkpointing_and_compile(form):
    inputs = {n: None if x is None else x.float().to(DEVICE) for n, x in _inputs(2, 5, 24, form).items()}
    dropout = None if form == "norm alone" else Dropout(0.3, dropout_state(42, 7, 3, DEVICE), 4)

    def run(wrap):
        leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in inputs.items()}

        def function(leaves):
            y, z = kernels.residual_norm(**leaves, dropout=dropout, impl="triton")
            return (y * z).sum()

        wrap(function)(leaves).backward()
        return [x.grad for x in leaves.values() if x is not None]

    plain = run(lambda f: f)
    recomputed = run(lambda f: lambda x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False))
    compiled = run(lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))
    for a, b, c in zip(plain, recomputed, compiled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_registered_operator():
    from kernels.fused.residual_norm import _forward_op

    tensors = (*(x.float().to(DEVICE) for x in _inputs(2, 3, 8).values()), dropout_state(1, 2, 3, DEVICE))
    torch.library.opcheck(_forward_op, (*tensors, 0.25, 3, 1e-6, 8), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("form", ["both", "no residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 513])
def test_the_norm_is_that_of_the_y_that_is_returned(form, dtype, impl, width):
    """Bit by bit: backward and whoever reads the stream know y as it was rounded, not the sum before."""
    inputs = {n: x if x is None else x.to(dtype) for n, x in _inputs(2, 9, width, form).items()}
    y, z = kernels.residual_norm(**inputs, dropout=DROPOUT, impl=impl)
    again, of_y = kernels.residual_norm(y, None, inputs["gain"], impl=impl)
    assert torch.equal(again, y)
    assert torch.equal(of_y, z)
