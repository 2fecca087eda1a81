"""The sublayers, and the block that adds them to the stream. Legend: march.model.modules.

A sublayer is f in x = x + dropout(f(norm(x))): it maps z = norm(x) [B, L, D'] to s [B, L, D'].
"""

from typing import Any, ClassVar

from torch import Tensor, nn

import kernels
from march.config import BlockConfig, ModelConfig
from march.model.modules import Axis, Dropout, ForwardContext, Linear, Norm, ResidualStream


class Sublayer(nn.Module):
    """f with the norm before it and the dropout behind it."""

    name: ClassVar[str]  # in its block, and so of its parameters

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__()
        self.norm, self.dropout, self.residual = Norm(config.dim_model), Dropout(config.dropout), True


class Attention(Sublayer):
    """dropout(softmax(Q K^T + mask)) V Wo; a subclass says where Q, K and V are from."""

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        self.index, self.heads = block.index, block.num_heads
        self.stream_axis = Axis("stream", config.dim_model)
        self.heads_axis = Axis("heads", block.dim_qkv, block.num_heads)
        self.attention_dropout = Dropout(config.dropout)
        self.o = Linear(config.linear_init, self.heads_axis, o=self.stream_axis)

    def options(self, ctx: ForwardContext) -> dict[str, Any]:
        """What every attention operator is told."""
        return {"dropout": self.attention_dropout(ctx), "impl": ctx.impl}


class SelfAttention(Attention):
    """Wq, Wk, Wv, Wo; in the encoder all keys, masked by padding, in the decoder the earlier ones."""

    name = "self_attention"

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        self.causal, heads = block.stack == "decoder", self.heads_axis
        self.qkv = Linear(config.linear_init, self.stream_axis, q=heads, k=heads, v=heads)

    def forward(self, z: Tensor, ctx: ForwardContext) -> Tensor:
        qkv = self.qkv(z, ctx).unflatten(-1, (3, self.heads, -1))
        key_mask = None if self.causal else ctx.key_mask
        mixed, kv = kernels.self_attention(qkv, causal=self.causal, key_mask=key_mask, **self.options(ctx))
        if not self.causal:
            ctx.encoder_kv.append(kv)
        return self.o(mixed.flatten(2), ctx)

    def project_kv(self, z: Tensor, ctx: ForwardContext) -> None:
        """Keys and values alone, for the decoder: all that the last encoder block is needed for."""
        ctx.encoder_kv.append(self.qkv(z, ctx, skip=self.qkv.rows["q"]).unflatten(-1, (2, self.heads, -1)))


class UnifiedAttention(SelfAttention):
    """One softmax over [own keys, causal | encoder block i's keys, padding-masked]."""

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        self.as_published = config.unified_mask == "as_published"

    def options(self, ctx: ForwardContext) -> dict[str, Any]:
        # the faulty mask exists in the reference only; the rest of the model runs as chosen
        impl = {"impl": "reference", "as_published": True} if self.as_published else {}
        return super().options(ctx) | {"key_mask": ctx.key_mask} | impl

    def forward(self, z: Tensor, ctx: ForwardContext) -> Tensor:
        qkv = self.qkv(z, ctx).unflatten(-1, (3, self.heads, -1))
        mixed = kernels.packed_unified_attention(qkv, ctx.encoder_kv[self.index], **self.options(ctx))
        return self.o(mixed.flatten(2), ctx)


class CrossAttention(Attention):
    """Wq and Wo; keys and values are those of encoder block i's self-attention."""

    name = "cross_attention"

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        self.q = Linear(config.linear_init, self.stream_axis, q=self.heads_axis)

    def attend(self, q: Tensor, ctx: ForwardContext) -> Tensor:
        """q [B, L, H, K'] to the mixed values [B, L, H, K']."""
        return kernels.cross_attention(q, ctx.encoder_kv[self.index], key_mask=ctx.key_mask, **self.options(ctx))

    def forward(self, z: Tensor, ctx: ForwardContext) -> Tensor:
        q = self.q(z, ctx).unflatten(-1, (self.heads, -1))
        return self.o(self.attend(q, ctx).flatten(2), ctx)


class DatabaseAttention(CrossAttention):
    """Wq and Wo; keys and values are the learned bank, one head shared by all, no mask."""

    name = "database_attention"

    def attend(self, q: Tensor, ctx: ForwardContext) -> Tensor:
        assert ctx.database is not None
        return kernels.attention(q, *ctx.database, **self.options(ctx))


class FeedForward(Sublayer):
    """dropout(act(z Wup)) Wdown; gated: act(z Wgate) * (z Wup); mixed: factor (sigmoid(z Wgate) + relu(z Wup))."""

    name = "feedforward"

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        self.form: dict[str, Any] = {"kind": config.feedforward, "activation": config.activation}
        stream, hidden = Axis("stream", config.dim_model), Axis("hidden", config.dim_feedforward)
        gate = {} if config.feedforward == "plain" else {"gate": hidden}
        self.up = Linear(config.linear_init, stream, **gate, up=hidden)
        self.down = Linear(config.linear_init, hidden, down=stream)
        self.factor = config.mixed_factor if config.feedforward == "mixed" else 1.0
        self.hidden_dropout, self.gate_dropout = Dropout(config.dropout), Dropout(config.slow_dropout)

    def forward(self, z: Tensor, ctx: ForwardContext) -> Tensor:
        drops = {"dropout": self.hidden_dropout(ctx), "gate_dropout": self.gate_dropout(ctx)}
        hidden = kernels.glu(z, self.up.matrix(z, ctx), **self.form, factor=self.factor, **drops, impl=ctx.impl)
        return self.down(hidden, ctx)


class Block(nn.Module):
    """x = x + dropout(f(norm(x))) for each sublayer f in turn.

    An idea is a subclass with other `classes`, or a `forward` of its own: `march.build_model(..., block=Mine)`.
    """

    classes: ClassVar[dict[str, type[Sublayer]]] = {
        "self_attention": SelfAttention,
        "unified_attention": UnifiedAttention,
        "cross_attention": CrossAttention,
        "database_attention": DatabaseAttention,
        "feedforward": FeedForward,
    }

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__()
        self.names = []
        for sublayer in block.sublayers:
            layer = self.classes[sublayer.kind](config, block)
            layer.residual = sublayer.residual
            self.add_module(layer.name, layer)
            self.names.append(layer.name)

    @property
    def layers(self) -> list[Any]:
        """The sublayers in order."""
        return [getattr(self, name) for name in self.names]

    def forward(self, stream: ResidualStream, ctx: ForwardContext) -> None:
        for layer in self.layers:
            stream.add(layer(stream.norm(layer.norm), ctx), dropout=layer.dropout(ctx), residual=layer.residual)

    def project_kv(self, stream: ResidualStream, ctx: ForwardContext) -> None:
        """What the decoder reads of the last encoder block; all of it runs where the block, or its self-attention, has
        a `forward` of its own and no `project_kv` beside it."""
        attention = self.layers[0]
        if all(_defines(x, "project_kv") <= _defines(x, "forward") for x in (self, attention)):
            attention.project_kv(stream.norm(attention.norm), ctx)
        else:
            self(stream, ctx)


def _defines(module: nn.Module, method: str) -> int:
    """How far up its classes `module` finds `method`."""
    return next((i for i, c in enumerate(type(module).__mro__) if method in vars(c)), len(type(module).__mro__))
