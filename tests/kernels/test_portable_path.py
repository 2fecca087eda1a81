"""impl='torch' against impl='reference': outputs, every gradient, masks; what it keeps, what it must not build."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels.activations import ACTIVATIONS
from kernels.dropout import keep_mask, keep_words, site_keys
from kernels.portable import chunked_attention as attention_module
from kernels.portable import loss as loss_module
from kernels.portable import products

STATE = (2**32 - 5, 2**31 + 3, 2**32 - 2)  # keys and counters that wrap
TOLERANCE = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-5, 1e-5)}


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drop(p, site=3):
    return kernels.Dropout(p, kernels.dropout_state(*STATE), site) if p else None


def run(operator, tensors, dtype, impl, **options):
    """Outputs, and gradients of all tensors from random output gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = operator(*leaves, impl=impl, **options)
    outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    weights = [draw(*x.shape, seed=9 + i).to(x.dtype) for i, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, weights, retain_graph=True)
    again = torch.autograd.grad(outputs, leaves, weights)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True)), "a second backward differs"
    return [x.detach() for x in (*outputs, *gradients)]


def agree(operator, tensors, dtype, **options):
    """float64 and float32 by tolerance; 16-bit by budget: no further from float64 than twice the plain formula."""
    ours = run(operator, tensors, dtype, "torch", **options)
    if dtype in TOLERANCE:
        rtol, atol = TOLERANCE[dtype]
        for a, b in zip(ours, run(operator, tensors, dtype, "reference", **options), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, b.abs().max().item()))
        return
    rounded = [x.to(dtype).double() for x in tensors]
    exact = run(operator, rounded, torch.float64, "reference", **options)
    plain = run(operator, rounded, dtype, "reference", **options)
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        error, budget = ((x.double() - c).norm().item() for x in (a, b))
        assert error <= 2 * budget + 1e-5 * c.norm().item(), (i, error, budget)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])

# batch, queries, keys, heads, key heads, K, Kv, and what is masked
ATTENTION = {
    "plain": (3, 7, 13, 4, 4, 8, 8, {}),
    "one": (1, 1, 1, 1, 1, 1, 1, {}),
    "causal": (2, 9, 9, 2, 2, 16, 16, {"causal": True}),
    "causal wide": (2, 5, 9, 2, 2, 16, 16, {"causal": True}),
    "lengths": (3, 5, 11, 2, 2, 8, 8, {"lengths": [11, 4, 0]}),
    "mask": (3, 5, 11, 2, 2, 8, 8, {"mask": True}),
    "causal mask": (3, 43, 43, 2, 2, 8, 8, {"mask": True, "causal": True}),
    "values wider": (2, 6, 10, 3, 3, 5, 12, {}),
    "grouped": (2, 6, 10, 6, 2, 8, 8, {"mask": True}),
    "scale": (2, 6, 10, 2, 2, 8, 8, {"scale": 0.3}),
    "bank": (3, 6, 10, 4, 1, 8, 8, {"bank": True}),
    "odd head": (2, 17, 33, 2, 2, 95, 95, {}),
}


def attention_case(name):
    batch, queries, keys, heads, groups, width, value_width, what = ATTENTION[name]
    shared = 1 if what.get("bank") else batch
    tensors = [
        draw(batch, queries, heads, width, seed=1),
        draw(shared, keys, groups, width, seed=2),
        draw(shared, keys, groups, value_width, seed=3),
    ]
    options = {"scale": what.get("scale", 1.0)} | {key: what[key] for key in ("causal",) if key in what}
    if "lengths" in what:
        options["key_lengths"] = torch.tensor(what["lengths"])
    if "mask" in what:
        options["key_mask"] = draw(batch, keys, seed=4) > 0
        options["key_mask"][0] = False
    return tensors, options


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, p, dtype, monkeypatch):
    tensors, options = attention_case(name)
    monkeypatch.setattr(attention_module, "CHUNK_SCORES", 100)  # several chunks
    agree(kernels.attention, tensors, dtype, dropout=drop(p), **options)


def test_rows_without_a_key_are_zero_and_have_zero_gradients():
    tensors, options = attention_case("lengths")
    out, dq, dk, dv = run(kernels.attention, tensors, torch.float32, "torch", **options)
    for x in (out, dq, dk, dv):
        assert x[2].abs().max() == 0
        assert x[0].abs().max() > 0
    assert dk[1, 4:].abs().max() == 0


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("padding", ["none", "real", "lengths", "mask"])
def test_unified_attention(padding, p, dtype, monkeypatch):
    monkeypatch.setattr(attention_module, "CHUNK_SCORES", 300)
    tensors = [
        draw(2, 7, 4, 8, seed=1),
        draw(2, 7, 2, 8, seed=2),
        draw(2, 7, 2, 12, seed=3),
        draw(2, 11, 4, 8, seed=4),
        draw(2, 11, 4, 12, seed=5),
    ]
    options = {
        "none": {},
        "real": {"key_mask": torch.ones(2, 11, dtype=torch.bool)},
        "lengths": {"key_lengths": torch.tensor([11, 0])},
        "mask": {"key_mask": draw(2, 11, seed=6) > 0},
    }[padding]
    agree(kernels.attention, tensors, dtype, dropout=drop(p), causal=True, **options)


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "activation"),
    [("mixed", "relu"), *((kind, name) for kind in ("plain", "gated") for name in ACTIVATIONS)],
)
def test_glu(kind, activation, p, dtype):
    tensors = [draw(2, 5, 12, seed=1), draw(14 if kind == "plain" else 28, 12, seed=2, scale=0.3)]
    more = {"factor": 0.5, "gate_dropout": drop(0.5, site=8)} if kind == "mixed" else {}
    agree(kernels.glu, tensors, dtype, kind=kind, activation=activation, dropout=drop(p), **more)


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("given", ["both", "x", "s"])
def test_residual_norm(given, p, dtype):
    x, s, gain = draw(3, 5, 24, seed=1), draw(3, 5, 24, seed=2), 1 + 0.1 * draw(24, seed=3)

    def operator(*tensors, impl, dropout):
        first = {"both": tensors[:2], "x": (tensors[0], None), "s": (None, tensors[0])}[given]
        y, z = kernels.residual_norm(*first, tensors[-1], dropout=None if given == "x" else dropout, impl=impl)
        return y * 1.0, z

    tensors = {"both": [x, s, gain], "x": [x, gain], "s": [s, gain]}[given]
    agree(operator, tensors, dtype, dropout=drop(p))


def test_residual_norm_with_one_output_used():
    x, s, gain = (draw(2, 3, 8, seed=i).requires_grad_() for i in (1, 2, 3))
    gain = gain[0, 0].detach().requires_grad_()
    for index in (0, 1):
        results = []
        for impl in ("torch", "reference"):
            out = kernels.residual_norm(x, s, gain, dropout=drop(0.1), impl=impl)[index]
            results.append(torch.autograd.grad(out.square().sum(), (x, s, gain), allow_unused=True))
        for a, b in zip(*results, strict=True):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-9)


@DTYPES
@pytest.mark.parametrize("chunk", [10**9, 60])
@pytest.mark.parametrize("ignored", [0, 4, 10])
def test_linear_cross_entropy(ignored, chunk, dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", 50)
    tensors = [draw(2, 5, 12, seed=1), draw(19, 12, seed=2)]
    labels = torch.arange(10).view(2, 5)
    labels.view(-1)[:ignored] = -100
    agree(lambda *t, impl: kernels.linear_cross_entropy(*t, labels, scale=0.7, impl=impl), tensors, dtype)
    ours, theirs = (
        kernels.linear_cross_entropy(*tensors, labels, scale=0.7, return_per_token=True, impl=impl)
        for impl in ("torch", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_very_unlikely_label_has_its_true_loss():
    """Its probability underflows; the loss must not come from its logarithm."""
    h = torch.full((1, 1, 4), 100.0)
    weight = torch.eye(4, 4).requires_grad_() * torch.tensor([10.0, 1.0, 1.0, -10.0])
    loss = kernels.linear_cross_entropy(h, weight, torch.tensor([[3]]), impl="torch")
    assert loss.item() == pytest.approx(2000.0)


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("combine", ["average", "sum"])
def test_embedding(combine, p, dtype):
    ids = torch.tensor([[1, 5, 5, 0, 2], [5, 5, 3, 2, 1]])
    agree(
        lambda *t, impl: kernels.embedding(
            ids, *t, combine=combine, dropout=drop(p), position_dropout=drop(p, site=4), impl=impl
        ),
        [draw(7, 12, seed=1), draw(9, 12, seed=2)],
        dtype,
    )


def test_a_frequent_token_loses_no_small_gradient():
    """10,000 rows of 1.0 at one token: bfloat16 accumulation stops at 256."""
    table = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.zeros(10_000, 4, dtype=torch.bfloat16)
    ids = torch.ones(1, 10_000, dtype=torch.int64)
    kernels.embedding(ids, table, positions, combine="sum", impl="torch").sum().backward()
    assert table.grad[1].tolist() == [9984.0] * 4  # 10,000 in bfloat16


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_tied_table_has_the_sum_of_its_gradients(dtype):
    """Look-ups and output layer meet in one dense gradient of the parameter's type, whichever of them are used."""
    table = draw(7, 12).float().requires_grad_()
    positions = draw(9, 12, seed=2).float()
    ids = torch.tensor([[1, 5, 5, 0, 2], [5, 5, 3, 2, 1]])
    weight = draw(12, 7, seed=5).float()

    def total(lookup, output, parts):
        looked_up = [kernels.embedding(ids[:, :n], lookup, positions, dropout=drop(0.1), impl="torch") for n in (5, 2)]
        terms = {"lookups": sum((x**2).sum() for x in looked_up), "output": (output.float() @ weight).sum()}
        return sum(terms[part] for part in parts)

    for parts in (["lookups"], ["output"], ["lookups", "output"]):
        tied = torch.autograd.grad(total(*kernels.tied_table(table, dtype), parts), table)[0]
        apart = torch.autograd.grad(total(table, table.to(dtype or table.dtype), parts), table)[0]
        assert tied.layout == torch.strided
        assert tied.dtype == torch.float32
        torch.testing.assert_close(tied, apart, rtol=1e-6, atol=1e-6)
    lookup, output = kernels.tied_table(table, dtype, impl="reference")
    assert lookup is table
    assert output.dtype == (dtype or torch.float32)


def test_a_tied_table_of_float16_has_the_sum_too():
    """Its look-ups hand back dense gradients: float16 has no addition of sparse ones."""
    table, weight = draw(7, 12).half().requires_grad_(), draw(7, 12, seed=5).half()
    ids = torch.tensor([[1, 5, 5, 0, 2]])
    lookup, output = kernels.tied_table(table)
    looked_up = kernels.embedding(ids, lookup, torch.zeros(5, 12).half(), combine="sum", impl="torch")
    (looked_up.sum() + (output * weight).sum()).backward()
    torch.testing.assert_close(table.grad, weight + torch.bincount(ids[0], minlength=7)[:, None].half())


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.3, 0.5, 0.9999])
def test_words_are_the_contract(p):
    """The signed in-place form against the definition in unsigned arithmetic of Python integers."""
    dropout = drop(p)
    keys = site_keys(dropout, 2, 3, 5, (7, 4))
    words = keep_words(keys.a, keys.b, keys.c, p).view(2, 3, 5, 11).bool()
    own = keep_mask(dropout, 2, 3, 5, 7)
    other = keep_mask(dropout, 2, 3, 5, 4, offset=kernels.dropout.SEGMENT_COLUMNS)
    assert torch.equal(words, torch.cat([own, other], -1))
    a, b = (x.view(-1)[0].item() % 2**32 for x in (keys.a, keys.b ^ -(1 << 31)))
    limit = min(round(p * 2**32), 2**32 - 1)
    expected = [(a * (c % 2**32) + b) % 2**32 >= limit for c in keys.c.tolist()]
    assert words[0, 0, 0].tolist() == expected


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, x.numel())
        return out


def test_no_more_scores_than_a_chunk_and_no_more_logits_live():
    q = draw(4, 32, 8, 16).float().requires_grad_()
    all_scores = 4 * 8 * 32 * 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "CHUNK_SCORES", all_scores // 8)
        with Largest() as largest:
            kernels.attention(q, q, q, dropout=drop(0.1), impl="torch").sum().backward()
    assert largest.elements == max(all_scores // 8, q.numel())
    weight, h = draw(500, 8).float().requires_grad_(), draw(1, 64, 8).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_LOGITS", 8 * 500)
        with Largest() as largest:
            kernels.linear_cross_entropy(h, weight, torch.zeros(1, 64, dtype=torch.int64), impl="torch").backward()
    assert largest.elements == 8 * 500


def test_relu_keeps_one_tensor_for_backward():
    x, weight = draw(2, 8, 16).float().requires_grad_(), draw(64, 16).float().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hidden = kernels.glu(x, weight, kind="plain", dropout=drop(0.1), impl="torch")
    # the weight may be kept transposed, by the library that was measured to be faster
    wide = {t.data_ptr() for t in saved if t.shape[-1] == 64 and t.data_ptr() != weight.data_ptr()}
    assert wide == {hidden.data_ptr()}


@pytest.mark.parametrize(
    "what", ["plain", "causal", "mask", "causal mask", "bank", "grouped", "lengths", "values wider"]
)
def test_library_attention_is_the_same_function(what):
    """What CUDA takes without Triton, computed here: SDPA with the masks it is given."""
    tensors, options = attention_case(what)
    tensors = [x.requires_grad_() for x in tensors]
    q, k, v = tensors
    padding = None
    if "key_mask" in options or "key_lengths" in options:
        lengths, mask = options.get("key_lengths"), options.get("key_mask")
        padding = kernels.reference.key_padding(q.shape[0], k.shape[1], lengths, mask, q.device)
    causal = options.get("causal", False)
    ours = attention_module._library(q, k, v, 1.0, causal, padding, None, None)
    theirs = kernels.attention(q, k, v, impl="reference", **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    weight = draw(*ours.shape, seed=7)
    for a, b in zip(*(torch.autograd.grad(out, tensors, weight) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_library_attention_says_whose_dropout_it_is(caplog):
    attention_module._say_library_dropout.cache_clear()
    (q, k, v), _ = attention_case("plain")
    for _ in range(2):
        attention_module._library(q, k, v, 1.0, False, None, None, drop(0.1))
    assert sum("torch's generator" in record.message for record in caplog.records) == 1


def test_library_attention_has_no_scores_without_a_mask_that_needs_them():
    q = draw(1, 64, 2, 8).float()
    padding = torch.ones(1, 64, dtype=torch.bool)
    for causal, mask in ((False, None), (True, None), (False, padding)):
        with Largest() as largest:
            attention_module._library(q, q, q, 1.0, causal, mask, None, None)
        assert largest.elements < 64 * 64


@pytest.mark.parametrize("operator", ["attention", "residual_norm", "glu", "linear_cross_entropy"])
def test_compiled_is_the_same(operator):
    x = draw(2, 6, 2, 8).float() if operator == "attention" else draw(2, 6, 8).float()
    weight, gain = draw(10, 8, seed=2).float(), draw(8, seed=3).float()
    call = {
        "attention": lambda x: kernels.attention(x, x, x, causal=True, dropout=drop(0.1), impl="torch"),
        "residual_norm": lambda x: kernels.residual_norm(x, x, gain, dropout=drop(0.1), impl="torch")[1],
        "glu": lambda x: kernels.glu(x, weight, kind="gated", dropout=drop(0.1), impl="torch"),
        "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(
            x, weight, torch.zeros(2, 6, dtype=torch.int64), impl="torch"
        ),
    }[operator]
    compiled = torch.compile(call, backend="aot_eager")
    results = []
    for function in (call, compiled):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_float32_products_by_onednn_are_float32_products(monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch is built without oneDNN")
    x, weight = draw(3, 40, 33), draw(21, 33, seed=2)
    expected = run(lambda a, b, impl: torch.nn.functional.linear(a, b), [x, weight], torch.float64, "torch")
    for chosen in (True, False):
        monkeypatch.setattr(products, "onednn_float32", lambda chosen=chosen: chosen)
        ours = run(kernels.linear, [x, weight], torch.float32, "torch")
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    batch = draw(3, 5, 7).float(), draw(3, 7, 6, seed=2).float()
    monkeypatch.setattr(products, "onednn_float32", lambda: True)
    torch.testing.assert_close(products.bmm(*batch), torch.bmm(*batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("gain", "dtype"), [(3.9, torch.bfloat16), (1.1, torch.float32), (0.1, torch.float32)])
def test_the_type_of_products_follows_the_measurement_and_is_said_once(gain, dtype, monkeypatch, caplog):
    monkeypatch.setattr(products, "_gain_of_bfloat16", lambda: gain)
    choose = functools.cache(products.product_dtype.__wrapped__)
    assert choose() is choose() is dtype
    said = [record.message for record in caplog.records if "CPU products" in record.message]
    assert len(said) == 1
    assert f"run in {str(dtype)[6:]}" in said[0]
    assert products.product_dtype.__wrapped__("cuda") == torch.float32


def test_the_measurement_leaves_the_threads_alone():
    before = torch.get_num_threads()
    assert products._ratio(lambda: torch.ones(200_000).exp(), lambda: torch.ones(10).exp()) > 1
    assert torch.get_num_threads() == before
