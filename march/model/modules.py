"""What the layers are made of: projections, norms, places that drop, and the residual stream.

What the kernels ask of a model is here and nowhere else: several projections in one GEMM, weights filled up with zeros
to widths that kernels read fast (docs/kernels/widths.md), and an addition that waits for the norm behind it.

Legend: B batch, L positions, D dim_model, H heads, G heads of keys and values, K dim_qkv, F dim_feedforward; D', K',
F': these, or more with zeros in the rest. Weights are [out, in].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import kernels
from kernels.reference import drop
from march.model.init import Parts, Rule, normal, ones, uniform


@dataclass
class ForwardContext:
    """What the layers of one forward pass share.

    impl: implementation of the operators, see `kernels.dispatch`. dtype, device: what is computed in, and where.
    rng: dropout state; None in evaluation, where nothing drops. key_mask: bool [B, Le], True where an encoder token is
    real. encoder_kv: keys and values [B, Le, 2, G, K'] of encoder block i's self-attention, for decoder block i.
    encoder_output: [B, Le, D'], where the decoder reads that. database: the bank's keys and values, each [1, S, 1, K'].
    """

    impl: kernels.Impl
    dtype: torch.dtype
    device: torch.device
    rng: Tensor | None = None
    key_mask: Tensor | None = None
    encoder_kv: dict[int, Tensor] = field(default_factory=dict)
    encoder_output: Tensor | None = None
    database: tuple[Tensor, Tensor] | None = None
    recorded: bool = field(default_factory=torch.is_grad_enabled)

    def require_recording(self) -> None:
        """RuntimeError in a part that autograd does not record while it does the rest: what the part shares with others
        through this context, or gives back in a stream, would lose its gradient in silence."""
        if self.recorded and not torch.is_grad_enabled():
            raise RuntimeError(
                "march: expected every part of a forward pass to be recorded by autograd like the pass, got one under "
                "torch.no_grad, as activation checkpointing of a part with use_reentrant=True has it; give checkpoint "
                "use_reentrant=False, or checkpoint the whole model"
            )


@dataclass(frozen=True)
class Axis:
    """One side of a projection: `count` times (heads) `width` features of a kind, which says what reads them."""

    kind: Literal["stream", "heads", "hidden"]
    width: int
    count: int = 1

    def padded(self, ctx: ForwardContext) -> int:
        """The width that the kernels want: `width`, or more with zeros in the rest."""
        if self.kind == "heads":
            return kernels.head_width(self.width, ctx.device, impl=ctx.impl)
        operator = "residual_norm" if self.kind == "stream" else "glu"
        return kernels.row_width(operator, self.width, ctx.dtype, ctx.device, impl=ctx.impl)


def zero_pad(weight: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """`weight` [r R, c C] as [r R', c C']: zeros behind each of the r and c groups; rows (R, R'), columns (C, C').

    The weight itself where nothing is missing. The gradient is that of its own elements.
    """
    more = (rows[1] - rows[0], columns[1] - columns[0])
    if not any(more):
        return weight
    grouped = weight.unflatten(1, (-1, columns[0])).unflatten(0, (-1, rows[0]))
    return pad(grouped, (0, more[1], 0, 0, 0, more[0])).flatten(2).flatten(0, 1)


def rotate(x: Tensor, width: int, base: float = 10_000.0) -> Tensor:
    """x [B, L, H, K'] turned by its positions 0 ... L - 1 (Su et al., 2021); width: K, the rest of K' stays.

    Features i and i + K/2 are a plane, turned by position base^(-2 i / K); in float32, or float64 of float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = torch.arange(width // 2, device=x.device, dtype=wide)
    angle = torch.arange(x.shape[1], device=x.device, dtype=wide)[:, None, None] * base ** (half * (-2 / width))
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : width // 2], x[..., width // 2 : width]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., width:]], -1)


class Dropout(nn.Module):
    """A place that drops. Its id, from which it draws its masks, is a hash of its name in the model (`initialise`)."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.dropout_id = p, -1

    def forward(self, ctx: ForwardContext) -> kernels.Dropout | None:
        """What an operator takes as `dropout`."""
        return None if ctx.rng is None or self.p == 0 else kernels.Dropout(self.p, ctx.rng, self.dropout_id)

    def drop(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """dropout(x), x [B, L, F], in plain torch: for ideas that no operator computes."""
        return drop(x, self(ctx))


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019) of the last dimension with a gain [width].

    Another norm is a subclass with a `formula`.
    """

    formula: ClassVar[Callable[..., Tensor] | None] = None  # (self, x [B, L, width]) to the norm of x, of a subclass

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.gain = nn.Parameter(torch.empty(width))
        self.init_rules: dict[str, Rule] = {"gain": ones}

    def add(
        self, x: Tensor | None, s: Tensor | None, ctx: ForwardContext, dropout: kernels.Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """y = x + dropout(s) and norm(y), in one pass; x or s may be None, then y is the other."""
        more = (s if x is None else x).shape[-1] - self.width  # type: ignore[union-attr]
        if self.formula is not None:
            added = None if s is None else drop(s, dropout)
            y: Tensor = x if added is None else added if x is None else x + added  # type: ignore[assignment]
            return y, pad(self.formula(y[..., : self.width]).to(y.dtype), (0, more))
        gain = pad(self.gain.to(ctx.dtype), (0, more)) if more else self.gain.to(ctx.dtype)
        return kernels.residual_norm(x, s, gain, dropout=dropout, features=self.width, impl=ctx.impl)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """norm(x) alone, x [B, L, ..., width']."""
        return self.add(x.flatten(1, -2), None, ctx)[1].view(x.shape)


class Linear(nn.Module):
    """x W^T without bias. Several outputs are one weight, their rows in turn, and one GEMM.

    scheme "torch" draws U(+-in^-1/2), PyTorch's default, which the published runs had. "t5" (Raffel et al., 2020) draws
    std in^-1/2, of Wq (in K)^-1/2: the variances that make attention without 1/sqrt(K) start flat.
    """

    def __init__(self, scheme: str, inputs: Axis, **outputs: Axis):
        """scheme: ModelConfig.linear_init. outputs: by name, of one kind and width."""
        super().__init__()
        self.inputs, self.outputs, self.output = inputs, outputs, next(iter(outputs.values()))
        self.rows = {name: axis.count * axis.width for name, axis in outputs.items()}
        fan_in = inputs.count * inputs.width
        self.weight = nn.Parameter(torch.empty(sum(self.rows.values()), fan_in))

        def rule(name: str) -> Rule:
            if scheme == "torch":
                return uniform(fan_in**-0.5)
            return normal((fan_in * self.output.width if name == "q" else fan_in) ** -0.5)

        self.init_rules: dict[str, Parts] = {"weight": [(name, rows, rule(name)) for name, rows in self.rows.items()]}

    def matrix(self, x: Tensor, ctx: ForwardContext, skip: int = 0) -> Tensor:
        """The weight as x, and what reads the product, want it; without the first `skip` rows."""
        weight = (self.weight[skip:] if skip else self.weight).to(ctx.dtype)
        columns = (self.inputs.width, x.shape[-1] // self.inputs.count)
        return zero_pad(weight, (self.output.width, self.output.padded(ctx)), columns)

    def forward(self, x: Tensor, ctx: ForwardContext, skip: int = 0) -> Tensor:
        """x [B, L, in'] to all outputs side by side [B, L, out']."""
        return kernels.linear(x, self.matrix(x, ctx, skip), impl=ctx.impl)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {', '.join(f'{name} {rows}' for name, rows in self.rows.items())}"

    def split(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, ...]:
        """Each output apart: heads as [B, L, H, K'], others as [B, L, out']."""
        counts = [axis.count for axis in self.outputs.values()]
        parts = self(x, ctx).unflatten(-1, (sum(counts), -1)).split(counts, 2)
        return parts if self.output.kind == "heads" else tuple(part.flatten(2) for part in parts)


class ResidualStream:
    """x [B, L, D'], to which sublayers add. An addition waits for the norm behind it: both are one pass over x."""

    def __init__(self, x: Tensor, ctx: ForwardContext):
        ctx.require_recording()
        self.ctx, self._x = ctx, x
        self._pending: tuple[Tensor | None, kernels.Dropout | None, bool] = None, None, True

    def copy(self) -> "ResidualStream":
        """Another stream with what this one has: a block adds to a copy, so that it can be run again from its input."""
        stream = ResidualStream(self._x, self.ctx)
        stream._pending = self._pending
        return stream

    def add(self, s: Tensor, dropout: kernels.Dropout | None = None, residual: bool = True) -> None:
        """x = x + dropout(s), or without the residual x = dropout(s)."""
        self._x, self._pending = self.x, (s, dropout, residual)

    def norm(self, norm: Norm) -> Tensor:
        """norm(x), x with all that was added."""
        s, dropout, residual = self._pending
        self.x, z = norm.add(self._x if residual else None, s, self.ctx, dropout)
        return z

    @property
    def x(self) -> Tensor:
        """x with all that was added; by itself, for what reads it without a norm."""
        s, dropout, residual = self._pending
        if s is not None:
            self.x = self._x + drop(s, dropout) if residual else drop(s, dropout)
        return self._x

    @x.setter
    def x(self, value: Tensor) -> None:
        self._x, self._pending = value, (None, None, True)
