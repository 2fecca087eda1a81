"""Inputs and shapes of the operators, shared by tests and bench.

`calls(experiment)` lists the operator calls of one forward pass of an experiment, with the dead work of the last
encoder block left out; a test of march compares it with the experiments themselves.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.operators import OPERATORS
from kernels.operators.record import DECODER_LENGTH, ENCODER_LENGTH, MICRO_BATCH, POSITIONS, VOCABULARY

FACTORIES = {name: record.inputs for name, record in OPERATORS.items()}
attention_inputs, unified_attention_inputs = FACTORIES["attention"], FACTORIES["unified_attention"]
glu_inputs, residual_norm_inputs = FACTORIES["glu"], FACTORIES["residual_norm"]
linear_cross_entropy_inputs, embedding_inputs = FACTORIES["linear_cross_entropy"], FACTORIES["embedding"]


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
