"""Calls of every operator in every form: what is asked of all of them is asked of these."""

from dataclasses import dataclass, field
from typing import Any

import torch
from harness import DEVICE
from torch import Tensor

import kernels
from kernels import cases
from kernels.dropout import Dropout, dropout_state

IMPLS = ("triton", "torch", "reference")
UNBATCHED = ("weight", "gain", "table", "positions")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One call of an operator: inputs by name, further arguments, outputs that no loss depends on; cancelling: inputs
    whose gradient has zeros that are differences of equal numbers."""

    operator: str
    inputs: dict[str, Tensor | None]
    kwargs: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    cancelling: tuple[str, ...] = ()


def cases_of(B=2, L=7, M=9, H=2, K=16, D=24, F=20, V=40, p=0.3, first=3) -> dict[str, Case]:
    """L: queries or positions, M: keys of another length, K: width of a head, F: columns of a hidden layer, V: words;
    p: dropout's probability, first: the number of the first sequence."""
    rng = dropout_state(42, 7, first, DEVICE)
    drop, gate = Dropout(p, rng, 4), Dropout(p / 1.5, rng, 5)
    lengths = (M - 5 * torch.arange(B)).clamp(min=min(M, 1))
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(3)) > 0.4
    heads = {n: randn(B, length, H, K) for n, length in (("q", L), ("k", M), ("v", M))}
    segments = {n: randn(B, L, H, K) for n in "qkv"} | {n: randn(B, M, H, K) / 2 for n in ("k2", "v2")}
    shared = {"q": heads["q"], "k": randn(1, M, 1, K), "v": randn(1, M, 1, K) / 2}
    entropy = cases.linear_cross_entropy_inputs(B, L, D, V, ignored=0.3)
    stream = cases.residual_norm_inputs(B, L, D)
    dropped, scaled = {"dropout": drop}, {"dropout": drop, "scale": 0.3}
    padded, masked = scaled | {"key_lengths": lengths}, scaled | {"key_mask": mask}

    def hidden(kind: str, **more: Any) -> Case:
        return Case("glu", cases.glu_inputs(B, L, D, F, kind=kind), {"kind": kind} | dropped | more)

    return {
        "lengths": Case("attention", heads, padded),
        "mask": Case("attention", heads, masked),
        "causal": Case("attention", heads, {"causal": True, "key_lengths": lengths.int()}, cancelling=("q", "k")),
        "shared": Case("attention", shared, scaled),
        "filled up": Case("attention", {n: randn(*x.shape[:-1], K + 7) / 2 for n, x in heads.items()}, scaled),
        "unified lengths": Case("attention", segments, padded | {"causal": True}),
        "unified mask": Case("attention", segments, masked | {"causal": True}),
        "self": Case("attention", {"q": randn(B, M, 3, H, K)}, padded | {"return_kv": True}, cancelling=("q",)),
        "cross": Case("attention", {"q": heads["q"], "k": randn(1, M, 2, 1, K)}, masked),
        "packed unified": Case(
            "attention", {"q": randn(B, L, 3, H, K), "k2": randn(B, M, 2, H, K)}, padded | {"causal": True}
        ),
        "relu": hidden("plain"),
        "relu recomputed": hidden("plain", recompute=True),
        "gelu": hidden("plain", activation="gelu"),
        "identity": hidden("plain", activation="identity", dropout=None),
        "gated": hidden("gated", activation="silu"),
        "mixed": hidden("mixed", factor=0.6, gate_dropout=gate, recompute=True),
        "mixed kept": hidden("mixed", factor=0.6, gate_dropout=gate),
        "norm": Case("residual_norm", stream, dropped),
        "norm alone": Case("residual_norm", stream | {"s": None}),
        "no residual": Case("residual_norm", stream | {"x": None}, dropped, ("y",)),
        "recompute": Case("linear_cross_entropy", entropy, {"scale": 0.3, "logits": "recompute"}),
        "chunks": Case("linear_cross_entropy", entropy, {"scale": 0.3, "logits": "chunks"}),
        "embedding": Case("embedding", cases.embedding_inputs(B, L, D, V), dropped | {"position_dropout": gate}),
    }


CASES = cases_of()
# one for each registered operator and way into it: for what is dear, and does not depend on the form
ONE_EACH = (
    *("lengths", "cross", "packed unified", "relu", "gated", "mixed"),
    *("norm", "norm alone", "recompute", "chunks", "embedding"),
)


def kwargs_of(case: Case, impl: str = "triton") -> dict[str, Any]:
    """Those that an implementation has."""
    return {n: v for n, v in case.kwargs.items() if impl == "triton" or n not in ("recompute", "logits")}


def call(case: Case, inputs: dict[str, Any], impl: str = "triton") -> list[Tensor]:
    out = getattr(kernels, case.operator)(**inputs, **kwargs_of(case, impl), impl=impl)
    return list(out) if isinstance(out, tuple) else [out]


def leaves_of(case: Case, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        n: x if x is None else x.to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device)
        for n, x in case.inputs.items()
    }


def floating(leaves: dict[str, Any]) -> dict[str, Tensor]:
    return {n: x for n, x in leaves.items() if x is not None and x.requires_grad}


def differentiate(outputs: list[Tensor], leaves: dict[str, Any]) -> tuple[Tensor, ...]:
    total = sum(x.float().square().sum() for x in outputs)
    return torch.autograd.grad(total, list(floating(leaves).values()), allow_unused=True)
