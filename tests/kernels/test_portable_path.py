"""impl='torch' against impl='reference': outputs, every gradient, masks; what it keeps, what it must not build."""

import functools

import pytest
import torch
from operator_cases import Case, call, cases_of, floating, leaves_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
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


def run(case, dtype, impl):
    """Outputs, and gradients of all inputs from random output gradients, twice."""
    leaves = leaves_of(case, dtype=dtype)
    outputs = [x for x in call(case, leaves, impl) if x.requires_grad]
    weights = [draw(*x.shape, seed=9 + i).to(x.dtype) for i, x in enumerate(outputs)]
    wanted = list(floating(leaves).values())
    gradients = torch.autograd.grad(outputs, wanted, weights, retain_graph=True)
    again = torch.autograd.grad(outputs, wanted, weights)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True)), "a second backward differs"
    return [x.detach() for x in (*outputs, *gradients)]


def forms(p):
    """Every case, in sizes that no chunk divides; and one of everything, odd widths, no key at all, other values."""
    cases = cases_of(B=3, L=7, M=11, H=4, K=8, D=12, F=14, V=19, p=p)
    q, k, v = (draw(2, n, h, w, seed=w) for n, h, w in ((6, 6, 5), (10, 2, 5), (10, 2, 12)))
    kwargs = cases["lengths"].kwargs
    hidden = cases["mask"].kwargs | {"causal": True, "key_mask": torch.arange(33).view(3, 11) % 11 > 1}
    one, none = dict.fromkeys("BLMHK", 1), torch.tensor([11, 0, 0])
    return cases | {
        "one": cases_of(**one)["lengths"],
        "odd head": cases_of(B=2, L=17, M=33, K=95, p=p)["lengths"],
        "causal, first keys masked": Case("attention", cases["mask"].inputs, hidden),  # some rows see no key
        "no key": Case("attention", cases["lengths"].inputs, kwargs | {"key_lengths": torch.tensor([11, 4, 0])}),
        "no other key": Case("attention", cases["unified mask"].inputs, kwargs | {"causal": True, "key_lengths": none}),
        "grouped, values wider": Case("attention", {"q": q, "k": k, "v": v}, {"dropout": kwargs["dropout"]}),
        "all labels": replaced(cases["chunks"], labels=torch.arange(21).view(3, 7) % 19),
        "no label": replaced(cases["chunks"], labels=torch.full((3, 7), -100)),
        "sum": Case("embedding", cases["embedding"].inputs, cases["embedding"].kwargs | {"combine": "sum"}),
    }


def replaced(case, **inputs):
    return Case(case.operator, case.inputs | inputs, case.kwargs)


FORMS = {p: forms(p) for p in (0.0, 0.1, 0.5)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("p", FORMS)
@pytest.mark.parametrize("name", FORMS[0.0])
def test_every_form_is_the_formula(name, p, dtype, monkeypatch):
    """In several chunks. float64 and float32 by tolerance; 16-bit by budget: no further from float64 than twice the
    plain formula."""
    monkeypatch.setattr(attention_module, "CHUNK_SCORES", 100)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 70)
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", 50)
    case = FORMS[p][name]
    if dtype in TOLERANCE:
        rtol, atol = TOLERANCE[dtype]
        for a, b in zip(run(case, dtype, "torch"), run(case, dtype, "reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, b.abs().max().item()))
        return
    rounded = replaced(case, **{n: x.to(dtype).double() for n, x in floating(leaves_of(case)).items()})
    ours, plain = (run(rounded, dtype, impl) for impl in ("torch", "reference"))
    for i, (a, b, c) in enumerate(zip(ours, plain, run(rounded, torch.float64, "reference"), strict=True)):
        error, budget = ((x.double() - c).norm().item() for x in (a, b))
        assert error <= 2 * budget + 1e-5 * c.norm().item(), (i, error, budget)


def test_rows_without_a_key_are_zero_and_have_zero_gradients():
    out, dq, dk, dv = run(FORMS[0.1]["no key"], torch.float32, "torch")
    for x in (out, dq, dk, dv):
        assert x[2].abs().max() == 0
        assert x[0].abs().max() > 0
    assert dk[1, 4:].abs().max() == 0


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


def test_a_very_unlikely_label_has_its_true_loss():
    """Its probability underflows; the loss must not come from its logarithm."""
    h = torch.full((1, 1, 4), 100.0)
    weight = torch.eye(4, 4).requires_grad_() * torch.tensor([10.0, 1.0, 1.0, -10.0])
    loss = kernels.linear_cross_entropy(h, weight, torch.tensor([[3]]), impl="torch")
    assert loss.item() == pytest.approx(2000.0)


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
    "name", ["lengths", "mask", "causal", "shared", "filled up", "no key", "grouped, values wider"]
)
def test_library_attention_is_the_same_function(name):
    """What CUDA takes without Triton, computed here: SDPA with the masks it is given."""
    case = FORMS[0.0][name]
    kwargs = {n: x for n, x in case.kwargs.items() if n != "dropout"}
    q, k, v = tensors = list(leaves_of(case, dtype=torch.float64).values())
    padding = None
    if "key_mask" in kwargs or "key_lengths" in kwargs:
        lengths, mask = kwargs.get("key_lengths"), kwargs.get("key_mask")
        padding = kernels.reference.key_padding(q.shape[0], k.shape[1], lengths, mask, q.device)
    scale = kwargs.setdefault("scale", 1.0)
    ours = attention_module._library(q, k, v, scale, kwargs.get("causal", False), padding, None, None)
    theirs = kernels.attention(q, k, v, impl="reference", **kwargs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    weight = draw(*ours.shape, seed=7)
    for a, b in zip(*(torch.autograd.grad(out, tensors, weight) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_library_attention_says_whose_dropout_it_is(caplog):
    attention_module._say_library_dropout.cache_clear()
    q, k, v = FORMS[0.0]["lengths"].inputs.values()
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

    def of(linear, dtype):
        leaves = [y.to(dtype).requires_grad_() for y in (x, weight)]
        out = linear(*leaves)
        return [out, *torch.autograd.grad(out, leaves, draw(*out.shape, seed=9).to(dtype))]

    expected = of(torch.nn.functional.linear, torch.float64)
    for chosen in (True, False):
        monkeypatch.setattr(products, "onednn_float32", lambda chosen=chosen: chosen)
        ours = of(functools.partial(kernels.linear, impl="torch"), torch.float32)
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
