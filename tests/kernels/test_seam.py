"""The seam: names, refusals, what `auto` takes, the libraries, and the self-test on a device."""

import json
import logging
import sys
import types

import pytest
import torch
from harness import DEVICE, evaluate

import kernels
from kernels import cases, dispatch, portable, reference, selftest
from kernels.calls import generic_calls
from kernels.dropout import Dropout, dropout_state
from kernels.operators import OPERATORS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RNG = dropout_state(42, 7, 3)
DROPOUT, SECOND = Dropout(0.2, RNG, 1), Dropout(0.3, RNG, 2)


@pytest.fixture(autouse=True)
def fresh_seam(monkeypatch, tmp_path):
    """Nothing loaded, nothing said, and a cache of its own."""
    monkeypatch.setattr(dispatch, "_LOADED", {})
    monkeypatch.setattr(dispatch, "_SAID", set())
    monkeypatch.setenv("MARCH_CACHE", str(tmp_path))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("auto", "auto"),
        ("reference", "reference"),
        ("attention=flash_attn,residual_norm=apex", {"attention": "flash_attn", "residual_norm": "apex"}),
        ("glu = torch", {"glu": "torch"}),
    ],
)
def test_names_are_parsed(text, parsed):
    assert kernels.parse_impl(text) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tritn", "expected one of auto, triton, torch, reference"),
        ("flash_attn", "use attention=flash_attn"),
        ("apex", "use residual_norm=apex"),
        ("glu=flash_attn", "use attention=flash_attn"),
        ("attntion=torch", "expected an operator among"),
        ("attention=torch,glu", "expected a name or operator=name"),
        ("glu=torch, glu =reference", "expected each operator once"),
    ],
)
def test_wrong_names_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        kernels.parse_impl(text)


def test_auto_takes_triton_on_cuda_and_torch_elsewhere():
    for operator in dispatch.OPERATORS:
        expected = "triton" if dispatch.fused_available(operator) else "torch"
        assert dispatch.choice(operator, "auto", CUDA) == expected
        assert dispatch.choice(operator, "auto", CPU) == "torch"
        assert dispatch.choice(operator, {"glu": "reference"}, CPU) == ("reference" if operator == "glu" else "torch")


def test_auto_says_once_what_it_took(caplog):
    x, s, gain = cases.residual_norm_inputs(1, 2, 8).values()
    with caplog.at_level(logging.WARNING, logger="kernels"):
        for _ in range(3):
            kernels.residual_norm(x, s, gain)
    assert [r.getMessage() for r in caplog.records] == ["kernels: impl='auto' on cpu takes every operator: torch"]
    with caplog.at_level(logging.WARNING, logger="kernels"):
        kernels.residual_norm(x, s, gain, impl="torch")
    assert len(caplog.records) == 1


def test_triton_on_a_cpu_raises_and_says_what_to_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, s, gain = (t.float() for t in cases.residual_norm_inputs(1, 2, 8).values())
    with pytest.raises(kernels.ImplementationError, match=r"residual_norm: .* needs a CUDA device.*use impl='torch'"):
        kernels.residual_norm(x, s, gain, impl="triton")


def test_triton_that_is_not_installed_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "fused_available", lambda operator: False)
    with pytest.raises(kernels.ImplementationError, match="no fused kernel"):
        dispatch.implementation("residual_norm", "triton", CUDA, torch.bfloat16)
    assert dispatch.choice("residual_norm", "auto", CUDA) == "torch"


# ---------------------------------------------------------------- torch against reference

COMPARED = {
    "attention": (
        cases.attention_inputs(2, 9, 9, 4, 8, key_heads=2, value_width=6),
        {"causal": True, "key_lengths": torch.tensor([7, 0]), "scale": 0.7, "dropout": DROPOUT},
    ),
    "attention, shared bank": (cases.attention_inputs(3, 9, 13, 4, 8, key_heads=1, key_batch=1), {"dropout": DROPOUT}),
    "attention, mask": (
        cases.attention_inputs(2, 5, 9, 2, 8),
        {"key_mask": torch.arange(18).view(2, 9) % 3 > 0, "dropout": DROPOUT},
    ),
    "attention, two segments": (
        cases.attention_inputs(2, 7, 9, 2, 8, segments=2),
        {"causal": True, "key_lengths": torch.tensor([4, 9]), "scale": 0.7, "dropout": DROPOUT},
    ),
    "glu": (cases.glu_inputs(2, 5, 12, 9), {"kind": "gated", "activation": "gelu", "dropout": DROPOUT}),
    "glu, plain": (cases.glu_inputs(2, 5, 12, 9, kind="plain"), {"kind": "plain", "dropout": DROPOUT}),
    "glu, mixed": (
        cases.glu_inputs(2, 5, 12, 9, kind="mixed"),
        {"kind": "mixed", "factor": 0.5, "dropout": DROPOUT, "gate_dropout": SECOND},
    ),
    "residual_norm": (cases.residual_norm_inputs(2, 5, 12), {"dropout": DROPOUT}),
    "linear_cross_entropy": (cases.linear_cross_entropy_inputs(2, 9, 12, 17), {"scale": 0.3}),
    "embedding": (
        cases.embedding_inputs(2, 5, 12, 9, positions=8),
        {"dropout": DROPOUT, "position_dropout": SECOND},
    ),
}


@pytest.mark.parametrize("name", COMPARED)
def test_torch_is_reference(name, monkeypatch):
    """In float64 to 1e-9, outputs and every gradient, with chunks that do not divide the work."""
    monkeypatch.setattr(portable.chunked_attention, "CHUNK_SCORES", 100)
    monkeypatch.setattr(portable.loss, "CHUNK_LOGITS", 70)
    operator = name.split(",")[0]
    inputs, kwargs = COMPARED[name]
    expected = evaluate(operator, inputs, kwargs, torch.float64, "reference")
    got = evaluate(operator, inputs, kwargs, torch.float64, "torch")
    for kind in ("outputs", "gradients"):
        for n, x in getattr(expected, kind).items():
            torch.testing.assert_close(getattr(got, kind)[n], x, rtol=1e-9, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")


# ---------------------------------------------------------------- validation


def _t(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


_IDS = _t(2, 5, dtype=torch.int64)
REFUSED = [
    ("attention", (_t(2, 5, 8), _t(2, 5, 2, 4), _t(2, 5, 2, 4)), {}, r"q as \[B, Lq, H, K\]"),
    ("attention", (_t(2, 5, 2, 4), _t(3, 5, 2, 4), _t(3, 5, 2, 4)), {}, r"k as \[2 or 1"),
    ("attention", (_t(2, 5, 2, 4), _t(2, 5, 2, 4), _t(2, 6, 2, 4)), {}, r"v as \[2, 5, 2, Kv\]"),
    ("attention", (_t(2, 5, 2, 4), _t(2, 5, 2, 3), _t(2, 5, 2, 4)), {}, r"k as \[2 or 1, Lk, G, 4\]"),
    ("attention", (_t(2, 5, 3, 4), _t(2, 5, 2, 4), _t(2, 5, 2, 4)), {}, "divides 3"),
    ("attention", (_t(1, 1, 1, 513), _t(1, 1, 1, 513), _t(1, 1, 1, 8)), {}, "from 1 to 512"),
    ("attention", (_t(2, 5, 2, 4), _t(2, 5, 2, 4).double(), _t(2, 5, 2, 4)), {}, "k as torch.float32"),
    ("attention", (_t(2, 5, 2, 4),) * 3, {"key_lengths": torch.tensor([1])}, r"key_lengths as integers \[2\]"),
    ("attention", (_t(2, 5, 2, 4),) * 3, {"key_mask": _t(2, 5)}, "key_mask as bool"),
    (
        "attention",
        (_t(2, 5, 2, 4),) * 3,
        {"key_mask": _t(2, 5).bool(), "key_lengths": torch.tensor([1, 2])},
        "key_lengths or key_mask",
    ),
    ("attention", (_t(2, 5, 2, 4), *(_t(2, 6, 2, 4),) * 4), {}, r"k as \[2 or 1, 5, G, 4\]"),
    ("attention", (*(_t(2, 5, 2, 4),) * 3, _t(2, 6, 2, 4), _t(2, 6, 2, 5)), {}, r"v2 as \[2, 6, 2, 4\]"),
    ("attention", (_t(2, 5, 2, 4),) * 3, {"return_kv": True}, "return_kv with q packed and alone"),
    ("attention", (_t(2, 5, 2, 4),) * 3, {"as_published": True}, "as_published with a second segment"),
    ("glu", (_t(2, 5), _t(8, 5)), {}, r"x as \[B, L, D\]"),
    ("glu", (_t(2, 5, 4), _t(8, 5)), {}, r"weight as \[rows, 4\]"),
    ("glu", (_t(2, 5, 4), _t(7, 4)), {}, "even number of rows"),
    ("glu", (_t(2, 5, 4), _t(8, 4)), {"kind": "gate"}, "kind plain, gated or mixed"),
    ("glu", (_t(2, 5, 4), _t(8, 4)), {"activation": "swish"}, "relu, gelu, silu"),
    ("glu", (_t(2, 5, 4), _t(8, 4)), {"factor": 0.5}, "kind 'mixed' only"),
    ("residual_norm", (None, None, _t(4)), {}, "expected x or s"),
    ("residual_norm", (_t(2, 4), None, _t(4)), {}, r"\[B, L, D\]"),
    ("residual_norm", (_t(2, 5, 4), _t(2, 6, 4), _t(4)), {}, r"s as \[2, 5, 4\]"),
    ("residual_norm", (_t(2, 5, 4), None, _t(5)), {}, r"gain as \[4\]"),
    ("residual_norm", (_t(2, 5, 4), None, _t(4)), {"dropout": DROPOUT}, "no dropout without s"),
    ("residual_norm", (_t(2, 5, 4), None, _t(4)), {"features": 5}, "features from 1 to 4"),
    ("linear_cross_entropy", (_t(2, 4), _t(9, 4), _IDS), {}, r"h as \[B, L, D\]"),
    ("linear_cross_entropy", (_t(2, 5, 4), _t(9, 5), _IDS), {}, r"weight as \[V, 4\]"),
    ("linear_cross_entropy", (_t(2, 5, 4), _t(9, 4), _IDS.int()), {}, "labels as int64"),
    ("linear_cross_entropy", (_t(2, 5, 4), _t(9, 4), _IDS.to("meta")), {}, "labels on cpu"),
    ("embedding", (_IDS[0], _t(9, 4), _t(5, 4)), {}, r"ids as int64 \[B, L\]"),
    ("embedding", (_IDS, _t(9, 4), _t(5, 3)), {}, "positions as"),
    ("embedding", (_IDS, _t(9, 4), _t(4, 4)), {}, "at most 4 positions"),
    ("embedding", (_IDS, _t(9, 4), _t(5, 4)), {"combine": "mean"}, "average or sum"),
    ("embedding", (_IDS, _t(9, 4, dtype=torch.int64), _t(5, 4)), {}, "floating dtype"),
]


@pytest.mark.parametrize(("operator", "arguments", "kwargs", "message"), REFUSED)
def test_wrong_arguments_are_refused(operator, arguments, kwargs, message):
    """ValueError with what was expected, what came and, after the semicolon, the fix."""
    with pytest.raises(ValueError, match=message) as error:
        getattr(kernels, operator)(*arguments, **kwargs)
    text = str(error.value)
    assert text.startswith(f"{operator}: expected ")
    assert ", got " in text
    assert len(text.split("; ")[-1]) > 5


def test_the_published_mask_is_in_reference_only():
    inputs = cases.attention_inputs(1, 3, 4, 2, 4, segments=2)
    kernels.attention(**inputs, causal=True, as_published=True, impl="reference")
    with pytest.raises(kernels.ImplementationError, match="'reference' only"):
        kernels.attention(**inputs, causal=True, as_published=True, impl="torch")


# ---------------------------------------------------------------- the self-test

WRONG = {
    "attention": ("dv", lambda f: lambda q, k, v, *s, **kw: f(q, k, v.detach() + 0.5 * (v - v.detach()), *s, **kw)),
    "glu": ("output 0", lambda f: lambda *a, **kw: f(*a, **kw | {"activation": "silu"})),
    "residual_norm": ("output 0", lambda f: lambda *a, **kw: f(*a, **kw | {"dropout": SECOND})),
    "linear_cross_entropy": ("dweight", lambda f: lambda h, w, labels, **kw: f(h, w.detach() + 0 * w, labels, **kw)),
    "embedding": ("output 0", lambda f: lambda *a, **kw: f(*a, **kw | {"position_dropout": None})),
}


def _positional(function, operator):
    """The check calls by keyword; the wrong kernels above are written by position."""
    names = OPERATORS[operator].contract.tensors

    def call(**kwargs):
        tensors = [kwargs.pop(n) for n in names]
        return function(*tensors, **kwargs)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_the_check_accepts_a_right_kernel(operator, dtype):
    assert (
        selftest.disagreements(
            generic_calls(operator, dtype)[0], dispatch.implementation(operator, "torch", CPU, dtype), CPU
        )
        == []
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_the_check_refuses_a_wrong_kernel(operator, dtype):
    where, spoil = WRONG.get(operator, ("output 0", lambda f: lambda *a, **kw: 1.1 * f(*a, **kw)))
    wrong = _positional(spoil(getattr(reference, operator)), operator)
    problems = selftest.disagreements(generic_calls(operator, dtype)[0], wrong, CPU)
    assert any(p.startswith(where) for p in problems), problems


@pytest.mark.parametrize("operator", [n for n in dispatch.OPERATORS if dispatch.fused_available(n)])
def test_the_check_accepts_the_fused_kernels(operator):
    function = dispatch.implementation(operator, "triton", torch.device(DEVICE), torch.float32)
    assert selftest.disagreements(generic_calls(operator, torch.float32)[0], function, torch.device(DEVICE)) == []


def test_a_pass_is_remembered_by_device_and_versions(monkeypatch, tmp_path):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return portable.residual_norm(*args, **kwargs)

    def verify(dtype=torch.float32):
        return selftest.verify("residual_norm", "triton", counted, CPU, dtype)

    assert verify().startswith("passed in")
    assert verify() == "remembered"
    assert len(calls) == 1
    assert verify(torch.bfloat16).startswith("passed in")
    monkeypatch.setattr(selftest, "_sources", lambda: "edited")
    assert verify().startswith("passed in")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert verify().startswith("passed in")
    assert len(calls) == 4
    assert len(json.loads((tmp_path / "self_test.json").read_text())) == 4


@pytest.mark.parametrize("content", ["", "{", "[1, 2]"])
def test_a_broken_memory_is_forgotten(tmp_path, content):
    (tmp_path / "self_test.json").write_text(content)
    assert selftest.verify("residual_norm", "triton", portable.residual_norm, CPU, torch.float32).startswith("passed")
    assert selftest.verify("residual_norm", "triton", portable.residual_norm, CPU, torch.float32) == "remembered"


def test_a_disagreement_raises_and_is_not_remembered(tmp_path):
    wrong = _positional(WRONG["residual_norm"][1](reference.residual_norm), "residual_norm")
    for _ in range(2):
        with pytest.raises(kernels.ImplementationError, match=r"residual_norm: impl='triton' disagrees .* use impl="):
            selftest.verify("residual_norm", "triton", wrong, CPU, torch.float32)
    assert not (tmp_path / "self_test.json").exists()


def test_a_cuda_device_is_checked_before_the_first_use(monkeypatch):
    """The seam's part, with a check that is only counted: no device is needed."""
    seen = []
    monkeypatch.setattr(selftest, "verify", lambda *a: seen.append((a[0], a[1], a[4])) or "remembered")
    for _ in range(2):
        dispatch.implementation("residual_norm", "triton", CUDA, torch.bfloat16)
        dispatch.implementation("residual_norm", "reference", CUDA, torch.bfloat16)
    assert seen == [("residual_norm", "triton", torch.bfloat16)]
    dispatch.implementation("residual_norm", "triton", CUDA, torch.float32)
    assert seen[1:] == [("residual_norm", "triton", torch.float32)]


def test_a_refused_kernel_stays_refused(monkeypatch):
    def refuse(*args):
        raise kernels.ImplementationError("residual_norm: disagrees")

    monkeypatch.setattr(selftest, "verify", refuse)
    for _ in range(2):
        with pytest.raises(kernels.ImplementationError, match="disagrees"):
            dispatch.implementation("residual_norm", "triton", CUDA, torch.bfloat16)


def test_self_test_reports_every_operator():
    report = kernels.self_test({"glu": "reference"}, CPU, torch.float32)
    assert set(report) == set(dispatch.OPERATORS)
    assert report["glu"].startswith("reference")
    assert report["attention"].startswith("torch")
    assert set(kernels.self_test("torch", CPU, torch.float32, ("glu",))) == {"glu"}


# ---------------------------------------------------------------- libraries


def _missing(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_libraries_need_a_cuda_device():
    x = torch.zeros(1, 2, 1, 8)
    with pytest.raises(kernels.ImplementationError, match="'flash_attn' needs a CUDA device"):
        kernels.attention(x, x, x, impl={"attention": "flash_attn"})


def test_flash_attn_missing(monkeypatch):
    from kernels.libraries import flash_attn

    _missing(monkeypatch, "flash_attn")
    with pytest.raises(kernels.ImplementationError, match="pip install flash-attn --no-build-isolation"):
        flash_attn.library()
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.raises(kernels.ImplementationError, match="no flash_attn_func"):
        flash_attn.library()


@pytest.fixture
def flash(monkeypatch):
    """A stand-in for the library with its signature, computed by the formula."""
    module = types.ModuleType("flash_attn")

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert k.shape[0] == v.shape[0] == q.shape[0]
        assert dropout_p == 0.0
        return reference.attention(q, k, v, scale=softmax_scale, causal=causal)

    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    from kernels.libraries import flash_attn

    return flash_attn.attention


ARGUMENTS = {"scale": 0.5, "causal": False, "key_lengths": None, "key_mask": None, "dropout": None}


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_is_called_as_it_wants(flash, causal):
    inputs = cases.attention_inputs(2, 6, 6, 4, 8, key_heads=2, key_batch=1, dtype=torch.bfloat16)
    got = flash(**inputs, **ARGUMENTS | {"causal": causal})
    torch.testing.assert_close(got, reference.attention(**inputs, scale=0.5, causal=causal))
    (call,) = generic_calls("attention", torch.bfloat16, library=True)
    assert selftest.disagreements(call, flash, CPU) == []


@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width", "dtype", "kwargs", "message"),
    [
        (6, 6, 8, 8, torch.float32, {}, "float16 or bfloat16"),
        (6, 6, 8, 16, torch.bfloat16, {}, "values as wide"),
        (6, 6, 190, 190, torch.bfloat16, {}, "multiple of 8"),
        (6, 6, 264, 264, torch.bfloat16, {}, "multiple of 8 up to 256"),
        (5, 6, 8, 8, torch.bfloat16, {"causal": True}, "as many queries as keys"),
        (6, 6, 8, 8, torch.bfloat16, {"key_lengths": torch.tensor([3, 6])}, "without padding"),
    ],
)
def test_flash_attn_refuses_what_it_cannot_do(flash, queries, keys, width, value_width, dtype, kwargs, message):
    inputs = cases.attention_inputs(2, queries, keys, 2, width, value_width=value_width, dtype=dtype)
    with pytest.raises(kernels.ImplementationError, match=message):
        flash(**inputs, **ARGUMENTS | kwargs)


def test_flash_attn_has_one_segment_of_keys(flash):
    inputs = cases.attention_inputs(2, 6, 6, 2, 8, segments=2, dtype=torch.bfloat16)
    with pytest.raises(kernels.ImplementationError, match="one segment of keys, got two"):
        flash(**inputs, **ARGUMENTS)


def _package(root, name, **modules):
    """A package on disk with submodules of the given sources."""
    directory = root
    for part in name.split("."):
        directory = directory / part
        directory.mkdir(exist_ok=True)
        (directory / "__init__.py").touch()
    for module, source in modules.items():
        (directory / f"{module}.py").write_text(source)


def _forget_apex():
    for name in [n for n in sys.modules if n == "apex" or n.startswith("apex.") or n == "fused_layer_norm_cuda"]:
        del sys.modules[name]


@pytest.fixture
def apex_path(monkeypatch, tmp_path):
    """A directory first on the path, for an apex of our making."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "site").mkdir()
    _forget_apex()
    yield tmp_path / "site"
    _forget_apex()


def test_the_apex_of_pypi_is_recognised(apex_path):
    from kernels.libraries import apex

    _package(apex_path, "apex.lib", session="")
    with pytest.raises(kernels.ImplementationError, match=r"not NVIDIA's .*pip uninstall apex.*github.com/NVIDIA/apex"):
        apex.library()


def test_apex_missing(monkeypatch):
    from kernels.libraries import apex

    monkeypatch.setattr(apex, "_found", lambda name: False)
    with pytest.raises(kernels.ImplementationError, match="not installed"):
        apex.library()


NVIDIA = """
import torch
def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return torch.nn.functional.rms_norm(input, tuple(normalized_shape), weight, eps)
"""


def test_nvidias_apex(apex_path):
    from kernels.libraries import apex

    _package(apex_path, "apex.normalization", fused_layer_norm=NVIDIA)
    with pytest.raises(kernels.ImplementationError, match="without its CUDA extension"):
        apex.library()
    (apex_path / "fused_layer_norm_cuda.py").touch()
    assert selftest.disagreements(generic_calls("residual_norm", torch.float32)[0], apex.residual_norm, CPU) == []
    inputs = cases.residual_norm_inputs(2, 3, 8)
    for form in ({}, {"x": None}, {"s": None}):
        got = apex.residual_norm(**inputs | form, dropout=None, eps=1e-6)
        for a, b in zip(got, reference.residual_norm(**inputs | form), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(kernels.ImplementationError, match="expected features 8, got 6"):
        apex.residual_norm(**inputs, dropout=None, eps=1e-6, features=6)


def test_an_old_apex(apex_path):
    from kernels.libraries import apex

    _package(apex_path, "apex.normalization", fused_layer_norm="")
    (apex_path / "fused_layer_norm_cuda.py").touch()
    with pytest.raises(kernels.ImplementationError, match="too old"):
        apex.library()


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_attention_without_a_scale_is_that_of_every_library(impl):
    q, k, v = (torch.randn(2, 5, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    library = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    kv = torch.stack([k, v], 2)
    results = [
        kernels.attention(q, k, v, impl=impl),
        kernels.attention(torch.stack([q, k, v], 2), impl=impl),
        kernels.attention(q, kv, impl=impl),
    ]
    for out in results:
        torch.testing.assert_close(out, library.transpose(1, 2), rtol=1e-4, atol=1e-5)
    given = kernels.attention(q, k, v, k, v, scale=0.25, impl=impl)
    assert torch.equal(kernels.attention(q, k, v, k, v, impl=impl), given)
    assert torch.equal(kernels.attention(torch.stack([q, k, v], 2), k2=kv, impl=impl), given)
