"""The predecessor's model in eager PyTorch.

`Eager` computes the same function as `march.Transformer` without anything clever: one product a projection, masks and
probabilities materialised, every encoder block run to its end, logits in full; norms with float32 statistics as T5's,
one dropout draw of the position table for the whole micro-batch, no mask on the bank. Benchmarks time it as the
baseline, after `load` has copied a march model's parameters and the losses agree; the projection counts it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activations import activation_of
from march.config import BlockConfig, ModelConfig, resolve, unpublished

KeysValues = tuple[Tensor, Tensor]


class Dropout(nn.Dropout):
    """On meta tensors as CUDA dispatches it, one kernel that writes its output and a mask of bytes; torch would take
    the three operators of a CPU there."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0] if x.is_meta and self.p else super().forward(x)


class RMSNorm(nn.Module):
    """Statistics in float32, as T5's: x is widened, squared, and multiplied in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(self.weight.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Any of the four kinds; returns its output, and its keys and values [B, H, L, K]."""

    def __init__(self, config: ModelConfig, block: BlockConfig, kind: str, causal: bool):
        super().__init__()
        inner = block.num_heads * block.dim_qkv
        self.heads, self.kind, self.causal = block.num_heads, kind, causal
        self.swapped = config.unified_mask == "as_published"
        self.own_keys = kind in ("self_attention", "unified_attention")
        self.q, self.o = _linear(config.dim_model, inner), _linear(inner, config.dim_model)
        if self.own_keys:
            self.k, self.v = _linear(config.dim_model, inner), _linear(config.dim_model, inner)
        self.dropout = Dropout(config.dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, hidden: Tensor | None, encoder_kv: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """x [B, L, D]; hidden: bool, broadcast to [B, H, L, keys of the encoder or own], True where masked."""
        batch, length, _ = x.shape
        q = self.split(self.q(x))
        if self.own_keys:
            k, v = self.split(self.k(x)), self.split(self.v(x))
            if self.causal:
                later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)[None, None]
                if self.kind == "self_attention":
                    hidden = later
                else:
                    assert hidden is not None
                    parts = [later.expand(batch, -1, -1, -1), hidden.expand(-1, -1, length, -1)]
                    hidden = torch.cat(parts[::-1] if self.swapped else parts, -1)
            if self.kind == "unified_attention":
                assert encoder_kv is not None
                k, v = (torch.cat(pair, 2) for pair in zip((k, v), encoder_kv, strict=True))
        else:
            assert encoder_kv is not None
            k, v = encoder_kv
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        mixed = torch.matmul(self.dropout(torch.softmax(scores, -1)), v)
        return self.o(mixed.transpose(1, 2).reshape(batch, length, -1)), (k, v)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.up = _linear(config.dim_model, config.dim_feedforward)
        if config.feedforward != "plain":
            self.gate = _linear(config.dim_model, config.dim_feedforward)
        self.down = _linear(config.dim_feedforward, config.dim_model)
        self.dropout, self.slow_dropout = Dropout(config.dropout), Dropout(config.slow_dropout)

    def forward(self, x: Tensor) -> Tensor:
        act = activation_of(self.config.activation).formula
        if self.config.feedforward == "plain":
            hidden = act(self.up(x))
        elif self.config.feedforward == "gated":
            hidden = act(self.gate(x)) * self.up(x)
        else:
            hidden = (self.slow_dropout(torch.sigmoid(self.gate(x))) + F.relu(self.up(x))) * self.config.mixed_factor
        return self.down(self.dropout(hidden))


class Stack(nn.Module):
    def __init__(self, config: ModelConfig, blocks: tuple[BlockConfig, ...], decoder: bool):
        super().__init__()
        self.decoder = decoder
        self.sublayers = [(i, sublayer) for i, block in enumerate(blocks) for sublayer in block.sublayers]
        self.blocks = nn.ModuleList(
            FeedForward(config) if one.kind == "feedforward" else Attention(config, blocks[i], one.kind, decoder)
            for i, one in self.sublayers
        )
        self.norms = nn.ModuleList(RMSNorm(config.dim_model) for _ in self.sublayers)
        self.final_norm = RMSNorm(config.dim_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, hidden: Tensor, encoder_kv: list[KeysValues], bank: KeysValues | None) -> Tensor:
        """An encoder appends its blocks' keys and values to `encoder_kv`, a decoder reads them."""
        for module, norm, (i, sublayer) in zip(self.blocks, self.norms, self.sublayers, strict=True):
            z = norm(x)
            if sublayer.kind == "feedforward":
                out = module(z)
            elif sublayer.kind == "database_attention":
                out, _ = module(z, None, bank)
            else:
                out, kv = module(z, hidden, encoder_kv[i] if self.decoder and i < len(encoder_kv) else None)
                if not self.decoder:
                    encoder_kv.append(kv)
            out = self.dropout(out)
            x = x + out if sublayer.residual else out
        return self.final_norm(x)


class Eager(nn.Module):
    """The model of a configuration in eager PyTorch; forward returns the mean cross entropy."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        for name, value in unpublished(config).items():
            raise ValueError(f"eager model: expected the published architecture, got {name}={value}; leave it out")
        self.config, resolved = config, resolve(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim_model)
        self.positions = nn.Parameter(torch.empty(config.max_length, config.dim_model))
        shape = (1, 1, config.database_states, resolved.encoder[0].dim_qkv)
        self.bank = nn.ParameterList(torch.empty(shape) for _ in range(2 if config.database_states else 0))
        self.encoder, self.decoder = Stack(config, resolved.encoder, False), Stack(config, resolved.decoder, True)
        self.dropout = Dropout(config.dropout)

    def embed(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embedding(ids)) + self.dropout(self.positions[: ids.shape[1]])
        return x / 2 if self.config.embedding_combine == "average" else x

    def logits(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[tokens, V] in the model's dtype."""
        hidden = ~attention_mask[:, None, None, :]
        encoder_kv: list[KeysValues] = []
        bank = (self.bank[0], self.bank[1]) if self.config.database_states else None
        self.encoder(self.embed(input_ids), hidden, encoder_kv, bank)
        h = self.decoder(self.embed(decoder_input_ids), hidden, encoder_kv, bank)
        return F.linear(h * self.config.dim_model**-0.5, self.embedding.weight).flatten(0, 1)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        # in float32, so that a loss in bfloat16 can be compared; the published runs' was of bfloat16 logits
        return F.cross_entropy(self.logits(input_ids, decoder_input_ids, attention_mask).float(), labels.flatten())

    @torch.no_grad()
    def load(self, model: Any) -> "Eager":
        """Copies the parameters of `model`, the march.model.Transformer of the same configuration."""
        self.embedding.weight.copy_(model.embedding)
        self.positions.copy_(model.positions)
        if self.config.database_states:
            self.bank[0].copy_(model.database.keys)
            self.bank[1].copy_(model.database.values)
        for ours, theirs in ((self.encoder, model.encoder), (self.decoder, model.decoder)):
            sources = [source for block in theirs.blocks for source in block.layers]
            for module, norm, source in zip(ours.blocks, ours.norms, sources, strict=True):
                norm.get_parameter("weight").copy_(source.norm.gain)
                for linear in source.children():
                    rows = getattr(linear, "rows", {})  # of a march Linear: its parts, named as the layers here
                    for name, part in zip(rows, linear.weight.split(list(rows.values())) if rows else (), strict=True):
                        getattr(module, name).weight.copy_(part)
            ours.final_norm.weight.copy_(theirs.final_norm.gain)
        return self
