"""What training steps are measured against beside `march.predecessor.eager.Eager`: models of two libraries at the same
widths and depths, and the settings of precision that they run in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from march.config import ModelConfig, resolve


class _Adapted(nn.Module):
    """Takes march's inputs; call(model, **inputs) returns the loss."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.call(self.model, **inputs)


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

    def call(model: nn.Module, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        return model(**inputs, attention_mask=attention_mask.long(), use_cache=False).loss

    return _Adapted(transformers.T5ForConditionalGeneration(t5), call)


def x_transformers(config: ModelConfig, flash: bool) -> nn.Module:
    """x-transformers' encoder-decoder at the configuration's widths and depths; ModuleNotFoundError without it."""
    from x_transformers import XTransformer

    resolved = resolve(config)
    sides: dict[str, Any] = {}
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

    def call(model: nn.Module, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor, attention_mask: Tensor):
        # its wrapper shifts one sequence itself: start token and labels, so that both sides have as many positions
        return model(input_ids, torch.cat([decoder_input_ids[:, :1], labels], 1), mask=attention_mask)

    return _Adapted(XTransformer(dim=config.dim_model, tie_token_emb=True, **sides), call)


def in_setting(model: nn.Module, setting: str) -> nn.Module:
    """A model in "float32", "autocast" (float32 parameters, bfloat16 products) or "bfloat16" (parameters too)."""

    def call(model: nn.Module, **inputs: Tensor) -> Tensor:
        with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16):
            return model(**inputs)

    if setting == "bfloat16":
        return model.to(torch.bfloat16)
    return _Adapted(model, call) if setting == "autocast" else model


# name in the tables -> function above, its argument, setting
LIBRARIES = {
    **{
        f"Hugging Face T5, {attention}, {setting}": ("hugging_face_t5", attention, setting)
        for attention in ("eager", "sdpa")
        for setting in ("float32", "autocast", "bfloat16")
    },
    **{
        f"x-transformers{', flash' if flash else ''}, {setting}": ("x_transformers", flash, setting)
        for flash in (False, True)
        # its bfloat16 parameters meet its own float32 tensors: it does not run
        for setting in ("float32", "autocast")
    },
}
