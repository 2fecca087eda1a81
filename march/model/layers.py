"""The sublayers, and the block that adds them to the stream. Legend: march.model.modules.

A sublayer is f in x = x + dropout(f(norm(x))): it maps z = norm(x) [B, L, D'] to s [B, L, D'].
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import kernels
from march.config import BlockConfig, ModelConfig
from march.model.modules import Axis, Dropout, ForwardContext, Linear, Norm, ResidualStream, rotate


class Sublayer(nn.Module):
    """f with the norm before it and the dropout behind it; under norm_placement "sandwich" a norm between them."""

    name: ClassVar[str]  # in its block, and so of its parameters

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__()
        self.Norm = config.part("norm", Norm)
        self.norm, self.dropout, self.residual = self.Norm(config.dim_model), Dropout(config.dropout), True
        self.post_norm = self.Norm(config.dim_model) if config.norm_placement == "sandwich" else None


class Attention(Sublayer):
    """dropout(softmax(scale Q K^T + mask)) V Wo; a subclass says where Q, K and V are from.

    scale is 1, and K^-1/2 where queries and keys are normalised (qk_norm: Henry et al., 2020; Dehghani et al., 2023).
    """

    reads_encoder: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        self.index, self.heads, self.width = block.index, block.num_heads, block.dim_qkv
        self.scale = self.width**-0.5 if config.qk_norm else 1.0
        self.stream_axis = Axis("stream", config.dim_model)
        self.heads_axis = Axis("heads", self.width, self.heads)
        self.kv_axis = Axis("heads", self.width, block.num_kv_heads)
        self.attention_dropout = Dropout(config.dropout)
        self.o = Linear(config.linear_init, self.heads_axis, o=self.stream_axis)
        self.q_norm = self.Norm(self.width) if config.qk_norm else None
        own = self.reads_encoder and config.cross_attention == "encoder_output"
        kv = {"encoder_k": self.kv_axis, "encoder_v": self.kv_axis}
        self.kv = Linear(config.linear_init, self.stream_axis, **kv) if own else None
        self.k_norm = self.Norm(self.width) if config.qk_norm and (own or isinstance(self, SelfAttention)) else None

    def options(self, ctx: ForwardContext) -> dict[str, Any]:
        """What every attention operator is told."""
        return {"scale": self.scale, "dropout": self.attention_dropout(ctx), "impl": ctx.impl}

    def queries(self, q: Tensor, ctx: ForwardContext) -> Tensor:
        """q [B, L, H, K'], normalised where it shall be."""
        return q if self.q_norm is None else self.q_norm(q, ctx)

    def keys_values(self, kv: Tensor, ctx: ForwardContext) -> Tensor:
        """kv [B, L, 2 G K'] as [B, L, 2, G, K'], the keys normalised where they shall be."""
        kv = kv.unflatten(-1, (2, self.kv_axis.count, -1))
        return kv if self.k_norm is None else torch.stack([self.k_norm(kv[:, :, 0], ctx), kv[:, :, 1]], 2)

    def encoder_kv(self, ctx: ForwardContext) -> Tensor:
        """What the decoder attends to: encoder block i's keys and values, or its own of the encoder's output."""
        ctx.require_recording()
        if self.kv is None:
            return ctx.encoder_kv[self.index]
        assert ctx.encoder_output is not None
        return self.keys_values(self.kv(ctx.encoder_output, ctx), ctx)


class SelfAttention(Attention):
    """Wq, Wk, Wv, Wo; in the encoder all keys, masked by padding, in the decoder the earlier ones."""

    name = "self_attention"

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        self.causal, self.rotary = block.stack == "decoder", config.positions == "rotary"
        self.qkv = Linear(config.linear_init, self.stream_axis, q=self.heads_axis, k=self.kv_axis, v=self.kv_axis)
        # nothing to do between the GEMM and attention: kernels read its product as it lies
        self.packed = self.heads_axis == self.kv_axis and not self.rotary and not config.qk_norm

    def options(self, ctx: ForwardContext) -> dict[str, Any]:
        return super().options(ctx) | {"causal": self.causal, "key_mask": None if self.causal else ctx.key_mask}

    def attend_packed(self, qkv: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """qkv [B, L, 3, H, K'] to the mixed values [B, L, H, K'], and kv [B, L, 2, H, K']."""
        return kernels.attention(qkv, return_kv=True, **self.options(ctx))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
        """q [B, L, H, K'], k and v [B, L, G, K'] to the mixed values [B, L, H, K']."""
        return kernels.attention(q, k, v, **self.options(ctx))

    def forward(self, z: Tensor, ctx: ForwardContext) -> Tensor:
        qkv = self.qkv(z, ctx)
        if self.packed:
            mixed, kv = self.attend_packed(qkv.unflatten(-1, (3, self.heads, -1)), ctx)
        else:
            heads = (self.heads, 2 * self.kv_axis.count)
            q, kv = qkv.unflatten(-1, (sum(heads), -1)).split(heads, 2)
            q, kv = self.queries(q, ctx), self.keys_values(kv.flatten(2), ctx)
            k, v = kv.unbind(2)
            if self.rotary:
                q, k = rotate(q, self.width), rotate(k, self.width)
            mixed = self.attend(q, k, v, ctx)
        if not self.causal:
            self.give_decoder(kv, ctx)
        return self.o(mixed.flatten(2), ctx)

    def project_kv(self, z: Tensor, ctx: ForwardContext) -> None:
        """Keys and values alone, for the decoder: all that the last encoder block is needed for."""
        self.give_decoder(self.keys_values(self.qkv(z, ctx, skip=self.qkv.rows["q"]), ctx), ctx)

    def give_decoder(self, kv: Tensor, ctx: ForwardContext) -> None:
        """Keys and values kv [B, Le, 2, G, K'] of this block, for the decoder's."""
        ctx.require_recording()
        ctx.encoder_kv[self.index] = kv


class UnifiedAttention(SelfAttention):
    """One softmax over [own keys, causal | encoder keys, padding-masked]."""

    reads_encoder = True

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        # the faulty mask exists in the reference only; the rest of the model runs as chosen
        as_published = config.unified_mask == "as_published"
        self.changed = {"impl": "reference", "as_published": True} if as_published else {}

    def options(self, ctx: ForwardContext) -> dict[str, Any]:
        return Attention.options(self, ctx) | {"causal": True, "key_mask": ctx.key_mask} | self.changed

    def attend_packed(self, qkv: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        return kernels.attention(qkv, k2=self.encoder_kv(ctx), **self.options(ctx)), qkv[:, :, 1:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
        return kernels.attention(q, k, v, self.encoder_kv(ctx), **self.options(ctx))


class CrossAttention(Attention):
    """Wq and Wo; keys and values are those of encoder block i's self-attention, or own ones of the encoder's output."""

    name = "cross_attention"
    reads_encoder = True

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__(config, block)
        self.q = Linear(config.linear_init, self.stream_axis, q=self.heads_axis)

    def attend(self, q: Tensor, ctx: ForwardContext) -> Tensor:
        """q [B, L, H, K'] to the mixed values [B, L, H, K']."""
        return kernels.attention(q, self.encoder_kv(ctx), key_mask=ctx.key_mask, **self.options(ctx))

    def forward(self, z: Tensor, ctx: ForwardContext) -> Tensor:
        q = self.queries(self.q(z, ctx).unflatten(-1, (self.heads, -1)), ctx)
        return self.o(self.attend(q, ctx).flatten(2), ctx)


class DatabaseAttention(CrossAttention):
    """Wq and Wo; keys and values are the learned bank, one head shared by all, no mask."""

    name = "database_attention"
    reads_encoder = False

    def attend(self, q: Tensor, ctx: ForwardContext) -> Tensor:
        ctx.require_recording()
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

    An idea is another class for a sublayer, or a block with a `forward` of its own (docs/own_ideas.md).
    """

    classes: ClassVar[Mapping[str, type[Sublayer]]] = MappingProxyType(
        {
            "self_attention": SelfAttention,
            "unified_attention": UnifiedAttention,
            "cross_attention": CrossAttention,
            "database_attention": DatabaseAttention,
            "feedforward": FeedForward,
        }
    )

    def __init__(self, config: ModelConfig, block: BlockConfig):
        super().__init__()
        self.names = []
        for sublayer in block.sublayers:
            layer = config.part(sublayer.kind, self.classes[sublayer.kind])(config, block)
            layer.residual = sublayer.residual
            self.add_module(layer.name, layer)
            self.names.append(layer.name)

    @property
    def layers(self) -> list[Any]:
        """The sublayers in order."""
        return [getattr(self, name) for name in self.names]

    def forward(self, stream: ResidualStream, ctx: ForwardContext) -> ResidualStream:
        """The stream behind the block; the one that is given stays as it is."""
        stream = stream.copy()
        for layer in self.layers:
            s = layer(stream.norm(layer.norm), ctx)
            if layer.post_norm is not None:
                s = layer.post_norm(s, ctx)
            stream.add(s, dropout=layer.dropout(ctx), residual=layer.residual)
        return stream

    def project_kv(self, stream: ResidualStream, ctx: ForwardContext) -> None:
        """What the decoder reads of the last encoder block; all of it runs where the block, or its self-attention, has
        a `forward` of its own and no `project_kv` beside it."""
        attention = self.layers[0]
        if all(_defines(x, "project_kv") <= _defines(x, "forward") for x in (self, attention)):
            attention.project_kv(stream.copy().norm(attention.norm), ctx)
        else:
            self(stream, ctx)


def _defines(module: nn.Module, method: str) -> int:
    """How far up its classes `module` finds `method`."""
    return next((i for i, c in enumerate(type(module).__mro__) if method in vars(c)), len(type(module).__mro__))
