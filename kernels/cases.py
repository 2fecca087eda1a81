"""Input factories and shapes of the operators, shared by tests and bench.

A factory gives an operator's tensors by argument name, drawn from a seed on the CPU and then moved: the same numbers
on every device. `calls(experiment)` lists the operator calls of one forward pass of an experiment, with the dead work
of the last encoder block left out; a test of march compares it with the experiments themselves.

B batch, L positions (Lq queries, Lk keys), H heads, G key/value heads, K head width, D stream width, F hidden width,
V vocabulary, S states.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

ENCODER_LENGTH, DECODER_LENGTH, MICRO_BATCH, VOCABULARY, POSITIONS = 921, 206, 64, 30_000, 1024


class _Draw:
    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        if torch.device(self.device).type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (torch.randn(shape, generator=self.generator, dtype=wide) * scale).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        if torch.device(self.device).type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator).to(self.device)


def attention_inputs(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    width: int,
    *,
    value_width: int | None = None,
    key_heads: int | None = None,
    key_batch: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | None]:
    """q [B, Lq, H, K], k [B or 1, Lk, G, K], v [B or 1, Lk, G, Kv]; scores of variance 1 at scale 1."""
    draw = _Draw(seed, dtype, device)
    shared, groups = batch if key_batch is None else key_batch, heads if key_heads is None else key_heads
    return {
        "q": draw.normal(batch, queries, heads, width, scale=width**-0.5),
        "k": draw.normal(shared, keys, groups, width),
        "v": draw.normal(shared, keys, groups, width if value_width is None else value_width),
    }


def unified_attention_inputs(
    batch: int,
    queries: int,
    other: int,
    heads: int,
    width: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | None]:
    """q, k_own, v_own [B, L, H, K]; k_other, v_other [B, Lo, H, K]."""
    draw = _Draw(seed, dtype, device)
    return {
        "q": draw.normal(batch, queries, heads, width, scale=width**-0.5),
        "k_own": draw.normal(batch, queries, heads, width),
        "v_own": draw.normal(batch, queries, heads, width),
        "k_other": draw.normal(batch, other, heads, width),
        "v_other": draw.normal(batch, other, heads, width),
    }


def glu_inputs(
    batch: int,
    length: int,
    width: int,
    hidden: int,
    *,
    kind: str = "gated",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | None]:
    """x [B, L, D], weight [F or 2 F, D]; products of variance 1."""
    draw = _Draw(seed, dtype, device)
    rows = hidden if kind == "plain" else 2 * hidden
    return {"x": draw.normal(batch, length, width), "weight": draw.normal(rows, width, scale=width**-0.5)}


def residual_norm_inputs(
    batch: int,
    length: int,
    width: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | None]:
    """x, s [B, L, D], gain [D] near 1."""
    draw = _Draw(seed, dtype, device)
    stream, sublayer = draw.normal(batch, length, width), draw.normal(batch, length, width)
    return {"x": stream, "s": sublayer, "gain": 1 + draw.normal(width, scale=0.1)}


def linear_cross_entropy_inputs(
    batch: int,
    length: int,
    width: int,
    vocabulary: int,
    *,
    ignored: float = 0.1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | None]:
    """h [B, L, D], weight [V, D], labels [B, L] of which about the share `ignored` is -100."""
    draw = _Draw(seed, dtype, device)
    labels = draw.integers(vocabulary, batch, length)
    if labels.device.type != "meta":
        labels = labels.masked_fill(draw.integers(1000, batch, length) < 1000 * ignored, -100)
    return {"h": draw.normal(batch, length, width), "weight": draw.normal(vocabulary, width), "labels": labels}


def embedding_inputs(
    batch: int,
    length: int,
    width: int,
    vocabulary: int,
    *,
    positions: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | None]:
    """ids [B, L], half of them among the first tenth of the vocabulary; table [V, D]; positions [P, D]."""
    draw = _Draw(seed, dtype, device)
    ids, common = draw.integers(vocabulary, batch, length), draw.integers(max(1, vocabulary // 10), batch, length)
    if ids.device.type != "meta":
        ids = torch.where(draw.integers(2, batch, length) == 0, ids, common)
    return {
        "ids": ids,
        "table": draw.normal(vocabulary, width),
        "positions": draw.normal(length if positions is None else positions, width),
    }


FACTORIES: dict[str, Callable[..., dict[str, Tensor | None]]] = {
    "attention": attention_inputs,
    "unified_attention": unified_attention_inputs,
    "glu": glu_inputs,
    "residual_norm": residual_norm_inputs,
    "linear_cross_entropy": linear_cross_entropy_inputs,
    "embedding": embedding_inputs,
}


# ---------------------------------------------------------------- the experiments' shapes


@dataclass(frozen=True)
class Shape:
    """What of an experiment determines the shapes of its operators. heads, widths: one entry a block of a stack."""

    width: int = 512
    heads: tuple[int, ...] = (8, 8, 8)
    widths: tuple[int, ...] = (64, 64, 64)
    hidden: int = 2048
    kind: str = "plain"
    activation: str = "relu"
    factor: float = 1.0
    slow_dropout: bool = False
    combine: str = "average"
    states: int = 0
    unified: bool = False
    residual: bool = True
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Call:
    """`count` calls of an operator with one shape. dims: arguments of its factory; kwargs: plain arguments of the
    operator; dropouts: its arguments that drop, with their probabilities; form: of residual_norm, which streams it has;
    padded: it has key lengths."""

    operator: str
    count: int
    dims: dict[str, Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dropouts: dict[str, float] = field(default_factory=dict)
    form: str = "both"
    padded: bool = False

    def inputs(
        self, seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor | None]:
        """The operator's tensors, without key lengths and dropout."""
        inputs = FACTORIES[self.operator](**self.dims, seed=seed, dtype=dtype, device=device)
        if self.form in ("norm alone", "no residual"):
            inputs["s" if self.form == "norm alone" else "x"] = None
        return inputs


def _heads(heads: int, width: int = 64, blocks: int = 3) -> dict[str, Any]:
    return {"heads": (heads,) * blocks, "widths": (width,) * blocks}


def _experiments() -> dict[str, Shape]:
    base = Shape()
    gated = {"hidden": 1365, "kind": "gated"}
    mixed = {"hidden": 1365, "kind": "mixed"}
    changes: dict[str, dict[str, Any]] = {
        "Baseline": {},
        "BaselineFP32": {"dtype": torch.float32},
        "Best": {"width": 1024, "hidden": 4096} | _heads(16, 64, 24),
        "MoreHeadsLessLayers": _heads(16, 64, 2),
        "MoreHeadsLessQKVDim": _heads(16, 32),
        "MoreHeadsLessQKVDimLessLayers": _heads(24, 32, 2),
        "LessHeadsMoreQKVDim": _heads(4, 128),
        "ScalingHeads": {"heads": (12, 8, 4)},
        "InverseScalingHeads": {"heads": (4, 8, 12)},
        "ScalingHeadsConstant": {"heads": (16, 8, 4), "widths": (32, 64, 128)},
        "InverseScalingHeadsConstant": {"heads": (4, 8, 16), "widths": (128, 64, 32)},
        "APESumOverAverage": {"combine": "sum"},
        "APEUnitVariance": {},
        "ReLUGatedLinearUnit": gated | {"activation": "relu"},
        "GELUGatedLinearUnit": gated | {"activation": "gelu"},
        "SiLUGatedLinearUnit": gated | {"activation": "silu"},
        "MixedAct": mixed | {"factor": 0.5},
        "MixedActSumOverMean": mixed,
        "MixedActSOMDropout": mixed | {"slow_dropout": True},
        "NoSelfAttentionResidual": {"residual": False},
        "Database": {"states": 512},
        "DatabaseFromHeads": {"states": 1536} | _heads(4),
        "DatabaseFromHeads2": {"states": 512} | _heads(7),
        "DatabaseFromLayers": {"states": 1024} | _heads(8, 64, 2),
        "DatabaseFromDim": {"width": 448, "hidden": 1792, "states": 1344} | _heads(7),
        "UnifiedAttention": {"unified": True} | _heads(12),
        "BigHeads": {"width": 448, "hidden": 1792} | _heads(8, 112),
        "BigHeads2": {"width": 380, "hidden": 1520} | _heads(8, 190),
        "BigHeads3": {"width": 380, "hidden": 1520} | _heads(8, 380),
    }
    return {name: replace(base, **change) for name, change in changes.items()}


EXPERIMENTS = _experiments()


class _Stream:
    """Collects the calls of one stack, of sequences of one length."""

    def __init__(self, shape: Shape, batch: int, length: int, p: float):
        self.shape, self.batch, self.length, self.p = shape, batch, length, p
        self.calls: list[Call] = []
        self.dims = {"batch": batch, "length": length, "width": shape.width}

    def embed(self, vocabulary: int) -> None:
        dims = self.dims | {"vocabulary": vocabulary, "positions": POSITIONS}
        dropouts = {"dropout": self.p, "position_dropout": self.p}
        self.calls.append(Call("embedding", 1, dims, {"combine": self.shape.combine}, dropouts))
        self.calls.append(Call("residual_norm", 1, self.dims, form="norm alone"))

    def norm(self, form: str = "both") -> None:
        self.calls.append(Call("residual_norm", 1, self.dims, {}, {"dropout": self.p}, form))

    def attend(self, block: int, keys: int, causal: bool = False, padded: bool = False, bank: bool = False) -> None:
        dims = {"batch": self.batch, "queries": self.length, "keys": keys}
        dims |= {"heads": self.shape.heads[block], "width": self.shape.widths[block]}
        dims |= {"key_heads": 1, "key_batch": 1} if bank else {}
        self.calls.append(
            Call("attention", 1, dims, {"scale": 1.0, "causal": causal}, {"dropout": self.p}, padded=padded)
        )

    def unify(self, block: int, other: int) -> None:
        dims = {"batch": self.batch, "queries": self.length, "other": other}
        dims |= {"heads": self.shape.heads[block], "width": self.shape.widths[block]}
        self.calls.append(Call("unified_attention", 1, dims, {"scale": 1.0}, {"dropout": self.p}, padded=True))

    def feed(self) -> None:
        shape = self.shape
        kwargs = {"kind": shape.kind, "activation": shape.activation, "factor": shape.factor}
        dropouts = {"dropout": self.p} | ({"gate_dropout": 0.5} if shape.slow_dropout else {})
        self.calls.append(Call("glu", 1, self.dims | {"hidden": shape.hidden, "kind": shape.kind}, kwargs, dropouts))


def calls(
    experiment: str,
    *,
    batch: int = MICRO_BATCH,
    encoder: int = ENCODER_LENGTH,
    decoder: int = DECODER_LENGTH,
    vocabulary: int = VOCABULARY,
    dropout: float = 0.1,
) -> list[Call]:
    """The operator calls of one forward pass; equal ones are counted, in the order of their first use."""
    shape = EXPERIMENTS[experiment]
    after_self = "both" if shape.residual else "no residual"
    enc, dec = _Stream(shape, batch, encoder, dropout), _Stream(shape, batch, decoder, dropout)
    enc.embed(vocabulary)
    # of the last encoder block only the keys and values are used: its norm is part of the block before
    for block in range(len(shape.heads) - 1):
        enc.attend(block, encoder, padded=True)
        enc.norm(after_self)
        if shape.states:
            enc.attend(block, shape.states, bank=True)
            enc.norm()
        enc.feed()
        enc.norm()
    dec.embed(vocabulary)
    for block in range(len(shape.heads)):
        if shape.unified:
            dec.unify(block, encoder)
            dec.norm()
        else:
            dec.attend(block, decoder, causal=True)
            dec.norm(after_self)
            dec.attend(block, encoder, padded=True)
            dec.norm()
        if shape.states:
            dec.attend(block, shape.states, bank=True)
            dec.norm()
        dec.feed()
        dec.norm()
    loss = Call("linear_cross_entropy", 1, dec.dims | {"vocabulary": vocabulary}, {"scale": shape.width**-0.5})
    merged: list[Call] = []
    for call in (*enc.calls, *dec.calls, loss):
        same = [i for i, other in enumerate(merged) if replace(other, count=1) == call]
        if same:
            merged[same[0]] = replace(merged[same[0]], count=merged[same[0]].count + 1)
        else:
            merged.append(call)
    return merged
