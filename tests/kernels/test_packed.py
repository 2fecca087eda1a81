"""Packed attention: queries, keys and values of one product, keys and values that are handed on."""

import harness
import pytest
import torch
from harness import DEVICE
from test_attention import _randn, dropout, small_tiles  # noqa: F401  a fixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import reference, selftest
from kernels.calls import generic_calls
from kernels.fused import attention as fused


def case(form, batch=2, queries=20, keys=50, heads=2, groups=None, width=16, shared=False):
    """Inputs of a form whose scores have a standard deviation of 1 at scale 1."""

    def parts(count, length, n, of=batch):
        some = [_randn(of, length, n, width, seed=seed) for seed in range(count)]
        # of three the queries and keys, of two the keys
        return torch.stack([x * (width**-0.25 if i < count - 1 else 1.0) for i, x in enumerate(some)], 2)

    other = parts(2, keys, groups or heads, 1 if shared else batch)
    if form == "self_attention":
        return {"q": parts(3, queries, heads)}
    if form == "cross_attention":
        return {"q": _randn(batch, queries, heads, width, seed=7) * width**-0.25, "k": other}
    return {"q": parts(3, queries, heads), "k2": other}


FORMS = {"self_attention": {"return_kv": True}, "cross_attention": {}, "two_segments": {"causal": True}}
LENGTHS = {
    "self_attention": torch.tensor([20, 9]),
    "cross_attention": torch.tensor([50, 18]),
    "two_segments": torch.tensor([50, 18]),
}


def named(form, **given):
    return {"dropout": dropout(), "key_lengths": LENGTHS[form]} | FORMS[form] | given


def check(form, inputs, kwargs=None, *arguments, **options):
    harness.check("attention", inputs, FORMS[form] | (kwargs or {}), *arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_forms(small_tiles, form, dtype):  # noqa: F811
    """Outputs and the packed gradients against the float64 formula; what is handed on has a gradient of its own."""
    check(form, case(form), named(form, scale=0.5), dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_self_attention_without_another_reader(small_tiles, causal):  # noqa: F811
    cancelling = ("q",) if causal else ()
    check("self_attention", case("self_attention"), {"causal": causal}, unused=("kv",), cancelling=cancelling)


def test_keys_and_values_alone(small_tiles):  # noqa: F811
    """Only what is handed on is used: the gradient of O is None."""
    check("self_attention", case("self_attention"), unused=("out",))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [8, 112, 190])
def test_head_widths(form, width):
    check(form, case(form, 1, 19, 37, width=width), {"dropout": dropout()})


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_grouped_and_shared_keys(small_tiles, shared):  # noqa: F811
    """Partial sums of a packed dK and dV land in its rows."""
    for form in ("cross_attention", "two_segments"):
        check(form, case(form, 2, 20, 40, heads=2, groups=1, shared=shared), {"dropout": dropout()})


@pytest.mark.parametrize("layout", ["guarded", "strided"])
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form, layout):
    check(form, case(form, 2, 9, 21), {"dropout": dropout()}, layout=layout)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_empty(form, batch, queries):
    inputs = {n: x.float().requires_grad_() for n, x in case(form, batch, queries, 5).items()}
    out = kernels.attention(**inputs, **FORMS[form], impl="triton")
    sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs.values())


# ---------------------------------------------------------------- what is handed on


def model(qkv, first, second, impl, readers):
    """Self-attention whose keys and values two more read, as many as `readers`; a loss of all outputs."""
    out, kv = kernels.attention(qkv, return_kv=True, dropout=dropout(), impl=impl)
    loss = out.square().sum()
    if readers > 0:
        loss = loss + kernels.attention(first, kv, dropout=dropout(site=3), impl=impl).square().sum()
    if readers > 1:
        loss = loss + kernels.attention(second, k2=kv, causal=True, impl=impl).sin().sum()
    return loss


def leaves(dtype=torch.float32):
    qkv, q, second = _randn(2, 20, 3, 2, 16), _randn(2, 7, 2, 16), _randn(2, 5, 3, 2, 16)
    return [(x * 0.5).to(DEVICE, dtype).requires_grad_() for x in (qkv, q, second)]


def gradients(function, inputs):
    return torch.autograd.grad(function(*inputs), inputs, allow_unused=True)


@pytest.mark.parametrize("readers", [0, 1, 2])
def test_gradients_of_all_readers_meet(readers):
    """The fused backward's sums are those that autograd makes of the formula, and a second backward repeats them."""
    expected = gradients(lambda *x: model(*x, "reference", readers), leaves(torch.float64))
    inputs = leaves()
    loss = model(*inputs, "triton", readers)
    got = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, allow_unused=True)
    for one, two, oracle in zip(got, again, expected, strict=True):
        if oracle is None:
            assert one is None
            continue
        assert torch.equal(one, two)
        torch.testing.assert_close(one.double(), oracle, rtol=1e-4, atol=2e-5 * oracle.abs().max().item())


def test_sums_are_rounded_once():
    """In float16 dK and dV of both readers are added in float32: nearer to float64 than the sum of two roundings."""
    oracle = gradients(lambda *x: model(*x, "reference", 1), leaves(torch.float16))[0]
    exact = gradients(lambda *x: model(*[y.half().double() for y in x], "reference", 1), leaves(torch.float64))[0]
    fused_gradient = gradients(lambda *x: model(*x, "triton", 1), leaves(torch.float16))[0]
    errors = [(x.double() - exact)[:, :, 1:].norm() for x in (fused_gradient, oracle)]
    assert errors[0] <= 1.05 * errors[1]


class _Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_copied_or_added_between_the_readers():
    inputs = leaves()
    loss = model(*inputs, "triton", 1)
    with _Called() as called:
        torch.autograd.grad(loss, inputs, allow_unused=True)
    assert called.names.count("march_kernels::attention_backward") == 2
    moving = {"aten::stack", "aten::cat", "aten::add", "aten::clone", "aten::copy_", "aten::slice_backward"}
    assert not moving & set(called.names)


@pytest.mark.parametrize("form", ["cross_attention", "two_segments"])
def test_keys_and_values_that_need_no_gradient(form):
    inputs = {n: x.float().to(DEVICE) for n, x in case(form).items()}
    first, second = inputs
    inputs[first].requires_grad_()
    outputs = [kernels.attention(**inputs, **FORMS[form], impl=impl) for impl in IMPLS]
    got = [torch.autograd.grad(out.sum(), inputs[first])[0] for out in outputs]
    torch.testing.assert_close(got[0], got[1], rtol=1e-4, atol=1e-5)
    assert inputs[second].grad is None


IMPLS = ("triton", "reference", "torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_handed_on_is_a_view(impl):
    qkv = case("self_attention")["q"].float().to(DEVICE)
    for x in (qkv, qkv.clone().requires_grad_()):
        out, kv = kernels.attention(x, return_kv=True, impl=impl)
        assert kv.data_ptr() == x[:, :, 1:].data_ptr()
        assert torch.equal(kv, x[:, :, 1:])
        assert out.requires_grad == kv.requires_grad == x.requires_grad


def test_the_portable_path_is_the_formula():
    expected = gradients(lambda *x: model(*x, "reference", 2), leaves(torch.float64))
    got = gradients(lambda *x: model(*x, "torch", 2), leaves(torch.float64))
    for one, oracle in zip(got, expected, strict=True):
        torch.testing.assert_close(one, oracle)


def test_a_library_that_is_not_here_is_named_for_packed_tensors_too():
    with pytest.raises(kernels.ImplementationError, match="'flash_attn' needs a CUDA device"):
        kernels.attention(leaves()[0], impl={"attention": "flash_attn"})


# ---------------------------------------------------------------- torch's own machinery


def direct(qkv, first, second):
    """The fused functions themselves, as a graph without the seam's imports."""
    common = {"scale": 0.5, "key_lengths": None, "key_mask": None, "dropout": dropout()}
    out, kv = fused.attention(qkv, causal=True, return_kv=True, **common)
    other = fused.attention(first, kv, causal=False, **common)
    two = fused.attention(second, k2=kv, causal=True, **common)
    return out.square().sum() + other.square().sum() + two.sum()


def test_compile_and_checkpoint_give_the_same_bits():
    inputs = leaves()
    plain = gradients(direct, inputs)
    compiled = torch.compile(direct, backend="aot_eager", fullgraph=True)
    for other in (compiled, lambda *x: checkpoint(direct, *x, use_reentrant=False)):
        for got, expected in zip(gradients(other, inputs), plain, strict=True):
            assert torch.equal(got, expected)


def test_the_seam_compiles_whole():
    inputs = leaves()
    plain = gradients(lambda *x: model(*x, "triton", 2), inputs)
    compiled = torch.compile(lambda *x: model(*x, "triton", 2), backend="aot_eager", fullgraph=True)
    for got, expected in zip(gradients(compiled, inputs), plain, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_backward_operators_satisfy_torch(form):
    """Schemas and fakes of the registered backward with packed sources, and of self-attention with what came back."""
    inputs = [x.half().to(DEVICE) for x in case(form).values()]
    d = dropout()
    settings = (None, None, d.rng.to(DEVICE), 1.0, form == "two_segments", d.p, d.site)
    outputs = fused.attention_op(inputs, *settings)
    handed = torch.ones_like(inputs[0][:, :, 1:]) if form == "self_attention" else None
    arguments = (torch.ones_like(outputs[0]), inputs, *outputs, handed, *settings)
    torch.library.opcheck(fused.attention_backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("form", FORMS)
def test_saves_packed_inputs_output_and_log_sum_exp_only(form):
    inputs = {n: x.float().to(DEVICE).requires_grad_() for n, x in case(form).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = kernels.attention(**inputs, **FORMS[form], dropout=dropout(), impl="triton")
    known = {x.data_ptr() for x in inputs.values()} | {
        x.data_ptr() for x in (out if isinstance(out, tuple) else (out,))
    }
    assert sorted(x.numel() for x in saved if x.data_ptr() not in known) == [3, 2 * 2 * 20]


# ---------------------------------------------------------------- the seam


@pytest.mark.parametrize(
    ("width", "impl", "wanted"),
    [
        (1, "triton", 16),
        (23, "triton", 32),
        (40, "triton", 48),
        (64, "triton", 64),
        (104, "triton", 112),
        (190, "triton", 192),
        (380, "triton", 384),
        (190, "torch", 190),
        (190, "auto", 190),  # of a CPU: torch
        (190, {"attention": "triton", "glu": "torch"}, 192),
    ],
)
def test_the_seam_says_which_head_width_it_wants(width, impl, wanted):
    assert kernels.head_width(width, torch.device("cpu"), impl=impl) == wanted


@pytest.mark.parametrize(
    ("operator", "width", "dtype", "impl", "wanted"),
    [
        ("residual_norm", 380, torch.bfloat16, "triton", 384),
        ("residual_norm", 380, torch.float32, "triton", 380),
        ("residual_norm", 380, torch.bfloat16, {"residual_norm": "torch"}, 380),
        ("residual_norm", 512, torch.bfloat16, "triton", 512),
        ("glu", 1365, torch.bfloat16, "triton", 1376),
        ("glu", 1365, torch.float32, "triton", 1376),
        ("glu", 1520, torch.bfloat16, "triton", 1520),
        ("glu", 1365, torch.bfloat16, "torch", 1365),
        ("glu", 1365, torch.bfloat16, "auto", 1365),  # of a CPU: torch
        ("glu", 63, torch.bfloat16, "triton", 64),
        ("glu", 24, torch.bfloat16, "triton", 24),
    ],
)
def test_the_seam_says_which_row_width_it_wants(operator, width, dtype, impl, wanted):
    assert kernels.row_width(operator, width, dtype, torch.device("cpu"), impl=impl) == wanted


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (2, 5, 2, 4, 8)}, r"q as \[B, Lk, 3, H, K\], got \[2, 5, 2, 4, 8\]"),
        ({"q": (2, 5, 4, 8)}, r"x.unflatten\(-1, \(3, H, K\)\)"),
        ({"q": (2, 5, 4, 8), "k": (2, 5, 3, 4, 8)}, r"k as \[2 or 1, Lk, 2, G, 8\], got \[2, 5, 3, 4, 8\]"),
        ({"q": (2, 5, 4, 8), "k": (3, 5, 2, 4, 8)}, r"k as \[2 or 1, Lk, 2, G, 8\], got \[3, 5, 2, 4, 8\]"),
        ({"q": (2, 5, 3, 4, 8), "k2": (2, 5, 4, 8)}, r"k2 as \[2 or 1, Lk, 2, G', 8\], got \[2, 5, 4, 8\]"),
        ({"q": (2, 5, 3, 4, 8), "k2": (2, 5, 2, 4, 16)}, r"k2 as \[2 or 1, Lk, 2, G', 8\], got \[2, 5, 2, 4, 16\]"),
        # values are as wide as keys wherever one of the segments is packed
        ({"q": (2, 5, 3, 4, 8), "k2": (2, 7, 4, 8), "v2": (2, 7, 4, 9)}, r"v2 as \[2, 7, 4, 8\], got \[2, 7, 4, 9\]"),
        (
            {"q": (2, 5, 4, 8), "k": (2, 5, 4, 8), "v": (2, 5, 4, 9), "k2": (2, 7, 2, 4, 8)},
            r"v as \[2, 5, 4, 8\], got \[2, 5, 4, 9\]",
        ),
        ({"q": (2, 5, 4, 8), "v": (2, 5, 4, 8)}, "expected q, k, v or .* got q, v; give the others"),
        ({"q": (2, 5, 3, 4, 8), "v2": (2, 5, 4, 8)}, "expected q, k, v or .* got q, v2; give the others"),
    ],
)
def test_wrong_shapes_say_what_is_expected(shapes, message):
    with pytest.raises(ValueError, match=message):
        kernels.attention(**{name: torch.zeros(shape) for name, shape in shapes.items()}, impl="reference")


@pytest.mark.parametrize("impl", IMPLS)
def test_every_form_gives_the_bits_of_separate_tensors(impl):
    """Of one segment and of two, outputs and gradients: packing is a layout."""
    q, k, v, k2, v2 = (_randn(2, n, 2, 16, seed=i).float().to(DEVICE) for i, n in enumerate((7, 7, 7, 9, 9)))
    qkv, kv, kv2 = torch.stack([q, k, v], 2), torch.stack([k, v], 2), torch.stack([k2, v2], 2)
    for second in ({}, {"k2": k2, "v2": v2}, {"k2": kv2}):
        results = []
        for first in ({"q": q, "k": k, "v": v}, {"q": q, "k": kv}, {"q": qkv}):
            inputs = {n: x.detach().requires_grad_() for n, x in (first | second).items()}
            out = kernels.attention(**inputs, causal=True, dropout=on_device(), impl=impl)
            found = torch.autograd.grad(out.square().sum(), list(inputs.values()))
            results.append([out, *(x for one in found for x in (one.unbind(2) if one.dim() == 5 else (one,)))])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def on_device():
    d = dropout()
    return kernels.Dropout(d.p, d.rng.to(DEVICE), d.site)


@pytest.mark.parametrize("call", generic_calls("attention", torch.float32), ids=lambda x: "-".join(x.contract.tensors))
def test_the_self_test_checks_the_forms(call):
    """The formula passes; one that forgets a gradient, such as what came back to keys and values, does not."""
    device = torch.device("cpu")
    assert selftest.disagreements(call, reference.attention, device) == []

    def forgetful(**arguments):
        if call.kwargs.get("return_kv"):
            out, kv = reference.attention(**arguments)
            return out, kv.detach().requires_grad_()
        name = call.contract.tensors[-1]
        return reference.attention(**arguments | {name: arguments[name].detach()})

    problems = selftest.disagreements(call, forgetful, device)
    assert [one for one in problems if one.startswith("d")] == problems != []
