"""What reaches the kernels, and where they run: strides of every tensor, the device, fills, subclasses."""

import contextlib
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from harness import DEVICE, check
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import cases
from kernels.dropout import Dropout, dropout_state
from kernels.fused import attention as fused_attention
from kernels.fused import launch

IMPLS = ("triton", "torch", "reference")
DROPOUT = Dropout(0.3, dropout_state(42, 7, 3), 4)
GATE = Dropout(0.2, dropout_state(42, 7, 3), 5)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One call of an operator: inputs by name, further arguments, outputs that no loss depends on."""

    operator: str
    inputs: dict[str, Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


LENGTHS, MASK = torch.tensor([9, 4]), torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) > 0.4
HEADS = {n: randn(2, length, 2, 16) for n, length in (("q", 7), ("k", 9), ("v", 9))}
SEGMENTS = {n: randn(2, length, 2, 16) for n, length in zip("qkv", (7, 7, 7), strict=True)}
SEGMENTS |= {n: randn(2, 9, 2, 16) / 2 for n in ("k2", "v2")}
ENTROPY = cases.linear_cross_entropy_inputs(2, 5, 24, 40, ignored=0.3)
STREAM = cases.residual_norm_inputs(2, 5, 24)
CASES = {
    "lengths": Case("attention", HEADS, {"key_lengths": LENGTHS, "dropout": DROPOUT}),
    "mask": Case("attention", HEADS, {"key_mask": MASK, "dropout": DROPOUT}),
    "causal": Case("attention", HEADS, {"causal": True, "key_lengths": LENGTHS.int()}),
    "unified lengths": Case("attention", SEGMENTS, {"causal": True, "key_lengths": LENGTHS, "dropout": DROPOUT}),
    "unified mask": Case("attention", SEGMENTS, {"causal": True, "key_mask": MASK, "dropout": DROPOUT}),
    "self": Case(
        "attention",
        {"q": randn(2, 9, 3, 2, 16)},
        {"return_kv": True, "key_lengths": LENGTHS, "dropout": DROPOUT},
    ),
    "cross": Case("attention", {"q": HEADS["q"], "k": randn(1, 9, 2, 1, 16)}, {"key_mask": MASK, "dropout": DROPOUT}),
    "packed unified": Case(
        "attention",
        {"q": randn(2, 7, 3, 2, 16), "k2": randn(2, 9, 2, 2, 16)},
        {"causal": True, "key_lengths": LENGTHS, "dropout": DROPOUT},
    ),
    "relu": Case("glu", cases.glu_inputs(2, 5, 24, 40, kind="plain"), {"kind": "plain", "dropout": DROPOUT}),
    "gated": Case("glu", cases.glu_inputs(2, 5, 24, 20, kind="gated"), {"activation": "silu", "dropout": DROPOUT}),
    "mixed": Case(
        "glu",
        cases.glu_inputs(2, 5, 24, 20, kind="mixed"),
        {"kind": "mixed", "factor": 0.6, "dropout": DROPOUT, "gate_dropout": GATE, "recompute": True},
    ),
    "norm": Case("residual_norm", STREAM, {"dropout": DROPOUT}),
    "norm alone": Case("residual_norm", STREAM | {"s": None}),
    "no residual": Case("residual_norm", STREAM | {"x": None}, {"dropout": DROPOUT}, ("y",)),
    "recompute": Case("linear_cross_entropy", ENTROPY, {"scale": 0.3, "logits": "recompute"}),
    "chunks": Case("linear_cross_entropy", ENTROPY, {"scale": 0.3, "logits": "chunks"}),
    "embedding": Case("embedding", cases.embedding_inputs(2, 5, 24, 9), {"dropout": DROPOUT, "position_dropout": GATE}),
}


def call(case: Case, inputs: dict[str, Any], impl: str = "triton") -> list[Tensor]:
    kwargs = {
        n: Dropout(v.p, v.rng.to(DEVICE), v.site) if isinstance(v, Dropout) else v for n, v in case.kwargs.items()
    }
    out = getattr(kernels, case.operator)(**inputs, **kwargs, impl=impl)
    return list(out) if isinstance(out, tuple) else [out]


def leaves_of(case: Case, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        n: x if x is None else x.to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device)
        for n, x in case.inputs.items()
    }


def differentiate(outputs: list[Tensor], leaves: dict[str, Any]) -> tuple[Tensor, ...]:
    floating = [x for x in leaves.values() if x is not None and x.requires_grad]
    return torch.autograd.grad(sum(x.float().square().sum() for x in outputs), floating, allow_unused=True)


# ---------------------------------------------------------------- strides


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_in_odd_strides(name, impl):
    """Inputs, lengths, masks, generator states, upstream gradients, saved tensors: `harness.check` lays all of them out
    as no kernel would choose."""
    case = CASES[name]
    kwargs = {n: v for n, v in case.kwargs.items() if impl == "triton" or n not in ("recompute", "logits")}
    cancelling = ("q", "k", "qkv") if name in ("causal", "self") else ()
    check(case.operator, case.inputs, kwargs, impl=impl, layout="strided", unused=case.unused, cancelling=cancelling)


@pytest.mark.parametrize("impl", IMPLS)
def test_small_tensors_of_stride_0(impl):
    """One length or one row of a mask for all sequences, one id for all positions, one gradient for all elements."""
    inputs = [x.float().to(DEVICE).requires_grad_() for x in HEADS.values()]
    length, row = torch.tensor(4, device=DEVICE), MASK[:1].to(DEVICE)
    rng = torch.tensor(5, device=DEVICE)
    for name, one, many in (("key_lengths", length.expand(2), length.repeat(2)),
                            ("key_mask", row.expand(2, -1), row.repeat(2, 1))):  # fmt: skip
        results = []
        for padding, state in ((one, rng.expand(3)), (many, rng.repeat(3))):
            out = kernels.attention(*inputs, **{name: padding}, dropout=Dropout(0.3, state, 4), impl=impl)
            results.append((out, *torch.autograd.grad(out, inputs, torch.ones((), device=DEVICE).expand_as(out))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name
    table, positions = (randn(n, 24).float().to(DEVICE).requires_grad_() for n in (9, 5))
    label = torch.tensor(3, device=DEVICE)
    results = [
        (kernels.embedding(x, table, positions, impl=impl), kernels.linear_cross_entropy(h, table, x, impl=impl))
        for h in [randn(2, 5, 24).float().to(DEVICE)]
        for x in (label.expand(2, 5), label.repeat(2, 5))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------- devices and memory


@pytest.mark.parametrize("name", CASES)
def test_every_launch_runs_on_its_tensors_device(name, monkeypatch):
    """On a CPU the guard is a mock, and each launch asks whether it is held."""
    from triton.runtime import interpreter

    held, launched = [], []

    @contextlib.contextmanager
    def guard(x):
        held.append(x.device)
        yield
        held.pop()

    true = interpreter.GridExecutor.__call__

    def launched_once(self, *args, **kwargs):
        launched.append((self.fn.__name__, list(held)))
        return true(self, *args, **kwargs)

    monkeypatch.setattr(launch, "on_device", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched_once)
    leaves = leaves_of(CASES[name])
    differentiate(call(CASES[name], leaves), leaves)
    assert len(launched) > 1
    assert all(devices == [torch.device(DEVICE)] for _, devices in launched), launched


def test_the_guard_sets_the_cuda_device_of_the_tensor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("guard", device))
    assert launch.on_device(mock.Mock(device=torch.device("cuda", 1))) == ("guard", torch.device("cuda", 1))
    with launch.on_device(torch.empty(0)):
        pass


class _Fills(TorchDispatchMode):
    """Counts the tensors that are filled with one value."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.split(".")[0] in ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full"):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_backward_fills_no_tensor(name):
    """A gradient of an output that nobody uses is None, no tensor of zeros."""
    leaves = leaves_of(CASES[name], "meta", torch.float16)
    case = CASES[name]
    kwargs = {n: v for n, v in case.kwargs.items() if not isinstance(v, Dropout)}
    kwargs = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in kwargs.items() if n != "key_mask"}
    out = call(Case(case.operator, {}, kwargs), leaves)
    loss = [x for x in out if x.requires_grad]
    floating = [x for x in leaves.values() if x is not None and x.requires_grad]
    upstream = [torch.empty_like(x) for x in loss]
    with _Fills() as fills:
        torch.autograd.grad(loss, floating, upstream)
    assert fills.found == []


def test_keys_and_values_alone_launch_no_backward():
    qkv = randn(1, 5, 3, 2, 16).float().to(DEVICE).requires_grad_()
    _, kv = kernels.attention(qkv, return_kv=True, impl="triton")
    with mock.patch.object(fused_attention, "attention_backward_op", side_effect=AssertionError("launched")):
        (gradient,) = torch.autograd.grad(kv.sum(), qkv)
    assert torch.equal(gradient[:, :, 1:], torch.ones_like(kv))
    assert not gradient[:, :, 0].any()


class _Named(Tensor):
    pass


@pytest.mark.parametrize("name", CASES)
def test_subclasses_give_the_right_result(name):
    """With memory of their own, a lazy sign, or standing for two tensors."""
    case = CASES[name]
    expected = call(case, leaves_of(case))
    for wrap in (lambda x: x.as_subclass(_Named), lambda x: torch._neg_view(-x), lambda x: TwoTensor(x, x.clone())):
        inputs = {
            n: wrap(x.detach()) if x is not None and x.is_floating_point() else x for n, x in leaves_of(case).items()
        }
        for got, want in zip(call(case, inputs), expected, strict=True):
            assert torch.equal(got.a if isinstance(got, TwoTensor) else got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_dense_is_refused_in_one_line(name, impl):
    """Sparse, of another library, nested; indices, lengths and masks too."""
    case = CASES[name]
    leaves = {n: x.detach() for n, x in leaves_of(case).items() if x is not None}
    tensors = leaves | {n: x for n, x in case.kwargs.items() if isinstance(x, Tensor)}
    forms = [(n, x.to_sparse(), "torch.sparse_coo") for n, x in tensors.items()]
    forms += [(n, torch.nested.nested_tensor(list(x)), "a nested one") for n, x in tensors.items() if x.dim() > 1]
    forms += [(n, x.to_mkldnn(), "torch._mkldnn") for n, x in leaves.items() if x.is_floating_point()][
        : DEVICE == "cpu"
    ]
    for n, x, got in forms:
        inputs, kwargs = ({k: x if k == n else y for k, y in given.items()} for given in (case.inputs, case.kwargs))
        with pytest.raises(ValueError, match=f"{n} as a dense tensor, got {got}; "):
            call(Case(case.operator, {}, kwargs), leaves | {n: x} if n in inputs else leaves_of(case), impl)


def second_derivative(case: Case, impl: str) -> None:
    leaves = leaves_of(case)
    floating = [x for x in leaves.values() if x is not None and x.requires_grad]
    loss = sum(x.square().sum() for x in call(case, leaves, impl))
    first = torch.autograd.grad(loss, floating, create_graph=True)
    torch.autograd.grad(sum(x.square().sum() for x in first), floating, allow_unused=True)


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused_whatever_it_is_asked_of(name):
    """Asked of some inputs alone, autograd leaves out what it cannot follow, and what is left is wrong."""
    with pytest.raises(RuntimeError, match="expected a first derivative, got create_graph=True"):
        second_derivative(CASES[name], "torch")
    if name == "relu":  # the interpreter is slow; the fused operators' graphs end in torch's own refusal
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            second_derivative(CASES[name], "triton")


@pytest.mark.parametrize("transform", [torch.func.functionalize, torch.func.vmap])
def test_tensors_without_memory_are_refused_where_kernels_launch(transform):
    with pytest.raises(TypeError, match="glu: expected tensors with memory, got Tensor; unwrap it first"):
        transform(lambda x: launch.require_memory("glu", x))(torch.zeros(2, 5, 24))


@pytest.mark.parametrize("name", CASES)
def test_functionalised_operators_give_the_right_result(name):
    case = CASES[name]
    inputs = {n: x if x is None else x.detach() for n, x in leaves_of(case).items()}
    names = [n for n, x in inputs.items() if x is not None]
    function = torch.func.functionalize(lambda *xs: tuple(call(case, inputs | dict(zip(names, xs, strict=True)))))
    for got, want in zip(function(*(inputs[n] for n in names)), call(case, inputs), strict=True):
        assert torch.equal(got, want)
