"""What the portable path is measured against: eager PyTorch in the predecessor's manner, and two libraries.

`Eager` computes the same function as `march.Transformer` without anything clever: one product a projection, masks and
probabilities materialised, dropout by torch.nn, every encoder block run to its end, logits in full. Written from the
model's description; `load` copies a march model's parameters, so that a benchmark can check the loss first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from march.config import BlockConfig, ModelConfig, resolve

KeysValues = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Any of the four kinds; returns its output, and its keys and values [B, H, L, K]."""

    def __init__(self, config: ModelConfig, block: BlockConfig, kind: str, causal: bool):
        super().__init__()
        inner = block.num_heads * block.dim_qkv
        self.heads, self.kind, self.causal = block.num_heads, kind, causal
        self.swapped = config.unified_mask == "as_published"
        self.q, self.o = _linear(config.dim_model, inner), _linear(inner, config.dim_model)
        if kind in ("self_attention", "unified_attention"):
            self.k, self.v = _linear(config.dim_model, inner), _linear(config.dim_model, inner)
        self.dropout = nn.Dropout(config.dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, hidden: Tensor, memory: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """x [B, L, D]; hidden: bool, broadcast to [B, H, L, keys of the memory or own], True where masked."""
        batch, length, _ = x.shape
        q = self.split(self.q(x))
        if self.kind in ("self_attention", "unified_attention"):
            k, v = self.split(self.k(x)), self.split(self.v(x))
            if self.causal:
                later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)[None, None]
                if self.kind == "self_attention":
                    hidden = later
                else:
                    parts = [later.expand(batch, -1, -1, -1), hidden.expand(-1, -1, length, -1)]
                    hidden = torch.cat(parts[::-1] if self.swapped else parts, -1)
            if self.kind == "unified_attention":
                assert memory is not None
                k, v = (torch.cat(pair, 2) for pair in zip((k, v), memory, strict=True))
        else:
            assert memory is not None
            k, v = memory
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores.masked_fill(hidden, float("-inf"))
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
        self.dropout, self.slow_dropout = nn.Dropout(config.dropout), nn.Dropout(config.slow_dropout)

    def forward(self, x: Tensor) -> Tensor:
        act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid, "identity": lambda y: y}[
            self.config.activation
        ]
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
        self.blocks = nn.ModuleList()
        self.norms = nn.ModuleList()
        self.kinds = [sublayer for block in blocks for sublayer in block.sublayers]
        self.index = [i for i, block in enumerate(blocks) for _ in block.sublayers]
        for block in blocks:
            for sublayer in block.sublayers:
                causal = decoder and sublayer.kind in ("self_attention", "unified_attention")
                is_feedforward = sublayer.kind == "feedforward"
                module = FeedForward(config) if is_feedforward else Attention(config, block, sublayer.kind, causal)
                self.blocks.append(module)
                self.norms.append(RMSNorm(config.dim_model))
        self.final_norm = RMSNorm(config.dim_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, hidden: Tensor, memory: list[KeysValues], bank: KeysValues | None, decoder: bool):
        nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=x.device)
        for module, norm, sublayer, i in zip(self.blocks, self.norms, self.kinds, self.index, strict=True):
            z = norm(x)
            if sublayer.kind == "feedforward":
                out = module(z)
            elif sublayer.kind == "database_attention":
                out, _ = module(z, nothing, bank)
            else:
                out, keys_values = module(z, hidden, memory[i] if decoder and i < len(memory) else None)
                if not decoder:
                    memory.append(keys_values)
            out = self.dropout(out)
            x = x + out if sublayer.residual else out
        return self.final_norm(x)


class Eager(nn.Module):
    """The model of a configuration in eager PyTorch; forward returns the mean cross entropy."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, resolved = config, resolve(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim_model)
        self.positions = nn.Parameter(torch.empty(config.max_length, config.dim_model))
        self.bank: nn.ParameterList | None = None
        if config.database_states:
            shape = (1, 1, config.database_states, resolved.encoder[0].dim_qkv)
            self.bank = nn.ParameterList([torch.empty(shape), torch.empty(shape)])
        self.encoder = Stack(config, resolved.encoder, False)
        self.decoder = Stack(config, resolved.decoder, True)
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embedding(ids)) + self.dropout(self.positions[: ids.shape[1]].expand(*ids.shape, -1))
        return x / 2 if self.config.embedding_combine == "average" else x

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = ~attention_mask[:, None, None, :]
        memory: list[KeysValues] = []
        bank = None if self.bank is None else (self.bank[0], self.bank[1])
        self.encoder(self.embed(input_ids), hidden, memory, bank, False)
        h = self.decoder(self.embed(decoder_input_ids), hidden, memory, bank, True)
        logits = F.linear(h * self.config.dim_model**-0.5, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    @torch.no_grad()
    def load(self, model: nn.Module) -> "Eager":
        """Copies the parameters of the march model of the same configuration."""
        self.embedding.weight.copy_(model.embedding)
        self.positions.copy_(model.positions)
        if self.bank is not None:
            self.bank[0].copy_(model.database_keys)
            self.bank[1].copy_(model.database_values)
        for ours, theirs in ((self.encoder, model.encoder), (self.decoder, model.decoder)):
            for module, norm, source in zip(ours.blocks, ours.norms, theirs.sublayers(), strict=True):
                norm.weight.copy_(source.norm.gain)
                names = ("gate", "up") if isinstance(module, FeedForward) else ("q", "k", "v")
                layers = [getattr(module, name) for name in names if hasattr(module, name)]
                packed = next(getattr(source, name) for name in ("w_in", "w_qkv", "w_q") if hasattr(source, name))
                for layer, part in zip(layers, packed.chunk(len(layers)), strict=True):
                    layer.weight.copy_(part)
                last = module.down if isinstance(module, FeedForward) else module.o
                last.weight.copy_(source.w_down if isinstance(module, FeedForward) else source.w_o)
            ours.final_norm.weight.copy_(theirs.final_norm.gain)
        return self


def hugging_face_t5(config: ModelConfig, attention: str) -> nn.Module:
    """transformers' T5 at the configuration's widths and depths; ModuleNotFoundError without the library."""
    import transformers

    resolved = resolve(config)
    t5 = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim_model,
        d_kv=resolved.encoder[0].dim_qkv,
        d_ff=config.dim_feedforward,
        num_layers=len(resolved.encoder),
        num_decoder_layers=len(resolved.decoder),
        num_heads=resolved.encoder[0].num_heads,
        dropout_rate=config.dropout,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        use_cache=False,
        decoder_start_token_id=0,
    )
    t5._attn_implementation = attention
    return _HuggingFace(transformers.T5ForConditionalGeneration(t5))


class _HuggingFace(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids,
            decoder_input_ids=decoder_input_ids,
            labels=labels,
            attention_mask=attention_mask.long(),
            use_cache=False,
        ).loss


def x_transformers(config: ModelConfig, flash: bool) -> nn.Module:
    """x-transformers' encoder-decoder at the configuration's widths and depths; ModuleNotFoundError without it."""
    from x_transformers import XTransformer

    resolved = resolve(config)
    sides = {}
    for side, blocks in (("enc", resolved.encoder), ("dec", resolved.decoder)):
        sides |= {
            f"{side}_num_tokens": config.vocab_size,
            f"{side}_depth": len(blocks),
            f"{side}_heads": blocks[0].num_heads,
            f"{side}_attn_dim_head": blocks[0].dim_qkv,
            f"{side}_max_seq_len": config.max_length,
            f"{side}_attn_dropout": config.dropout,
            f"{side}_ff_dropout": config.dropout,
            f"{side}_emb_dropout": config.dropout,
            f"{side}_attn_flash": flash,
            f"{side}_ff_mult": config.dim_feedforward / config.dim_model,
            f"{side}_use_rmsnorm": True,
            f"{side}_ff_no_bias": True,
        }
    return _XTransformers(XTransformer(dim=config.dim_model, tie_token_emb=True, **sides))


class _XTransformers(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        # its wrapper shifts one sequence itself: start token and labels, so that both sides have as many positions
        target = torch.cat([decoder_input_ids[:, :1], labels], 1)
        return self.model(input_ids, target, mask=attention_mask)


def in_setting(model: nn.Module, setting: str) -> nn.Module:
    """A rival in "float32", "autocast" (float32 parameters, bfloat16 products) or "bfloat16" (parameters too)."""
    if setting == "bfloat16":
        return model.to(torch.bfloat16)
    return _Autocast(model) if setting == "autocast" else model


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16):
            return self.model(**inputs)
