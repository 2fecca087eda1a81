"""The layers: they own the parameters and call the operators.

Legend: B batch, L positions, D dim_model, H heads, K dim_qkv, F dim_feedforward, S database states. Weights are
[out, in]; Wq, Wk, Wv are one product, so one packed parameter [3 H K, D], and so are gate and up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import kernels
from march.config import BlockConfig, ModelConfig, SublayerConfig


class Sites:
    """Numbers the places that drop, in the order of construction: the site of the dropout contract."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count - 1


@dataclass
class Pass:
    """What the sublayers of one forward pass share.

    rng: dropout state (None: no dropout, in evaluation). memory: keys and values [B, Le, 2, H, K] that each encoder
    block's self-attention computed; the encoder appends, decoder block i reads entry i. key_mask: bool [B, Le], True
    where an encoder token is real. database: the bank's keys and values, each [1, S, 1, K].
    """

    impl: kernels.Impl
    rng: Tensor | None
    key_mask: Tensor | None
    dtype: torch.dtype | None = None
    memory: list[Tensor] = field(default_factory=list)
    database: tuple[Tensor, Tensor] | None = None

    def cast(self, x: Tensor) -> Tensor:
        """A parameter as the pass computes with it; its gradient comes back in its own type."""
        return x if self.dtype is None else x.to(self.dtype)

    def linear(self, z: Tensor, weight: Tensor) -> Tensor:
        """z W^T."""
        return kernels.linear(z, self.cast(weight), impl=self.impl)

    def dropout(self, p: float, site: int) -> kernels.Dropout | None:
        return None if self.rng is None or p == 0 else kernels.Dropout(p, self.rng, site)


def fill(weight: Tensor, rows: int, columns: int, parts: int = 1) -> Tensor:
    """`weight` [parts R, C] with zeros in further rows of each part, up to `rows`, and in further columns, up to
    `columns`: the weight itself where nothing is missing. The gradient is that of its own elements."""
    more = (rows - weight.shape[0] // parts, columns - weight.shape[1])
    if not any(more):
        return weight
    return pad(weight.unflatten(0, (parts, -1)), (0, more[1], 0, more[0])).flatten(0, 1)


class Norm(nn.Module):
    """The gain [D] of an RMSNorm; the norm itself is part of `residual_norm`."""

    def __init__(self, dim_model: int):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(dim_model))


class Sublayer(nn.Module):
    """A sublayer with the gain of the norm before it. forward: z [B, L, D'] (normalised) to s [B, L, D'].

    D' is D, or the width that the kernels want of a stream (`kernels.row_width`), with zeros in the columns from D on.
    """

    def __init__(self, config: ModelConfig, block: BlockConfig, index: int, residual: bool, sites: Sites):
        super().__init__()
        self.dropout = config.dropout
        self.heads, self.width, self.index, self.residual = block.num_heads, block.dim_qkv, index, residual
        self.norm = Norm(config.dim_model)
        self.inner_site = sites()  # of attention probabilities or of the hidden layer
        self.output_site = sites()  # of what is added to the stream

    def projection(self, rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(rows, columns))

    def split(self, z: Tensor, weight: Tensor, shared: Pass, *parts: int) -> Tensor:
        """z W^T, W [(parts) H K, D], as [B, L, (parts), H, K']: K' is K, or the width that attention wants.

        Zero rows of W fill the heads up, and zero columns meet those of z: no activation is copied for it.
        """
        width = kernels.head_width(self.width, weight.device, impl=shared.impl)
        weight = fill(weight, width, z.shape[-1], weight.shape[0] // self.width)
        return shared.linear(z, weight).unflatten(-1, (*parts, self.heads, width))

    def join(self, mixed: Tensor, weight: Tensor, z: Tensor, shared: Pass) -> Tensor:
        """All heads of mixed [B, L, H, K'] through W [D, H K], with zero columns where K' is more than K, and zero rows
        up to the width of the stream, that of z."""
        missing = mixed.shape[-1] - self.width
        if missing:
            weight = pad(weight.unflatten(1, (self.heads, self.width)), (0, missing)).flatten(1)
        return shared.linear(mixed.flatten(2), fill(weight, z.shape[-1], weight.shape[1]))


class SelfAttention(Sublayer):
    """Wq, Wk, Wv, Wo; in the encoder all keys, masked by padding, and in the decoder the earlier ones."""

    def __init__(
        self, config: ModelConfig, block: BlockConfig, index: int, residual: bool, sites: Sites, *, decoder: bool
    ):
        super().__init__(config, block, index, residual, sites)
        inner = self.heads * self.width
        self.decoder = decoder
        self.w_qkv = self.projection(3 * inner, config.dim_model)
        self.w_o = self.projection(config.dim_model, inner)

    def forward(self, z: Tensor, shared: Pass) -> Tensor:
        mixed, kv = kernels.self_attention(
            self.split(z, self.w_qkv, shared, 3),
            causal=self.decoder,
            key_mask=None if self.decoder else shared.key_mask,
            dropout=shared.dropout(self.dropout, self.inner_site),
            impl=shared.impl,
        )
        if not self.decoder:
            shared.memory.append(kv)
        return self.join(mixed, self.w_o, z, shared)

    def remember(self, z: Tensor, shared: Pass) -> None:
        """Keys and values alone: all that the last encoder block is needed for."""
        rows = self.heads * self.width
        shared.memory.append(self.split(z, self.w_qkv[rows:], shared, 2))


class CrossAttention(Sublayer):
    """Wq and Wo; keys and values are those of encoder block i's self-attention."""

    def __init__(self, config: ModelConfig, block: BlockConfig, index: int, residual: bool, sites: Sites):
        super().__init__(config, block, index, residual, sites)
        inner = self.heads * self.width
        self.w_q = self.projection(inner, config.dim_model)
        self.w_o = self.projection(config.dim_model, inner)

    def attend(self, q: Tensor, shared: Pass, dropout: kernels.Dropout | None) -> Tensor:
        """q [B, L, H, K] to O [B, L, H, K]."""
        kv = shared.memory[self.index]
        return kernels.cross_attention(q, kv, key_mask=shared.key_mask, dropout=dropout, impl=shared.impl)

    def forward(self, z: Tensor, shared: Pass) -> Tensor:
        q = self.split(z, self.w_q, shared)
        mixed = self.attend(q, shared, shared.dropout(self.dropout, self.inner_site))
        return self.join(mixed, self.w_o, z, shared)


class DatabaseAttention(CrossAttention):
    """Wq and Wo; keys and values are the learned bank, one head shared by all, no mask."""

    def attend(self, q: Tensor, shared: Pass, dropout: kernels.Dropout | None) -> Tensor:
        assert shared.database is not None
        missing = q.shape[-1] - self.width
        bank = [pad(x, (0, missing)) if missing else x for x in shared.database]
        return kernels.attention(q, *bank, dropout=dropout, impl=shared.impl)


class UnifiedAttention(Sublayer):
    """Wq, Wk, Wv, Wo; one softmax over [own keys, causal | encoder block i's keys, padding-masked]."""

    def __init__(self, config: ModelConfig, block: BlockConfig, index: int, residual: bool, sites: Sites):
        super().__init__(config, block, index, residual, sites)
        inner = self.heads * self.width
        self.as_published = config.unified_mask == "as_published"
        self.w_qkv = self.projection(3 * inner, config.dim_model)
        self.w_o = self.projection(config.dim_model, inner)

    def forward(self, z: Tensor, shared: Pass) -> Tensor:
        mixed = kernels.packed_unified_attention(
            self.split(z, self.w_qkv, shared, 3),
            shared.memory[self.index],
            key_mask=shared.key_mask,
            dropout=shared.dropout(self.dropout, self.inner_site),
            as_published=self.as_published,
            # the faulty mask exists in the reference only; the rest of the model runs as chosen
            impl="reference" if self.as_published else shared.impl,
        )
        return self.join(mixed, self.w_o, z, shared)


class FeedForward(Sublayer):
    """W_in [F or 2 F, D] (gate or slow rows first) and Wdown [D, F]."""

    def __init__(self, config: ModelConfig, block: BlockConfig, index: int, residual: bool, sites: Sites):
        super().__init__(config, block, index, residual, sites)
        self.kind, self.activation = config.feedforward, config.activation
        self.factor = config.mixed_factor if self.kind == "mixed" else 1.0
        self.slow_dropout = config.slow_dropout
        self.slow_site = sites()
        self.halves = 1 if self.kind == "plain" else 2
        self.w_in = self.projection(self.halves * config.dim_feedforward, config.dim_model)
        self.w_down = self.projection(config.dim_model, config.dim_feedforward)

    def forward(self, z: Tensor, shared: Pass) -> Tensor:
        w_in = shared.cast(self.w_in)
        # hidden units without weights add nothing: whatever they are, the columns of Wdown that they meet are zeros
        width = kernels.row_width("glu", self.w_down.shape[1], w_in.dtype, w_in.device, impl=shared.impl)
        hidden = kernels.glu(
            z,
            fill(w_in, width, z.shape[-1], self.halves),
            kind=self.kind,
            activation=self.activation,
            factor=self.factor,
            dropout=shared.dropout(self.dropout, self.inner_site),
            gate_dropout=shared.dropout(self.slow_dropout, self.slow_site),
            impl=shared.impl,
        )
        return shared.linear(hidden, fill(self.w_down, z.shape[-1], width))


_CLASSES: dict[str, Callable[..., Sublayer]] = {
    "cross_attention": CrossAttention,
    "database_attention": DatabaseAttention,
    "unified_attention": UnifiedAttention,
    "feedforward": FeedForward,
}


def build_sublayer(
    config: ModelConfig, block: BlockConfig, index: int, sublayer: SublayerConfig, sites: Sites, *, decoder: bool
) -> Sublayer:
    """The module of one sublayer of block `index`."""
    if sublayer.kind == "self_attention":
        return SelfAttention(config, block, index, sublayer.residual, sites, decoder=decoder)
    return _CLASSES[sublayer.kind](config, block, index, sublayer.residual, sites)
