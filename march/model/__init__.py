"""The model, and `build_model`."""

from collections.abc import Mapping
from typing import Any

import kernels
from march import experiments
from march.config import resolve
from march.experiments import own
from march.model.layers import Attention, Block, CrossAttention, FeedForward, SelfAttention, Sublayer
from march.model.modules import Dropout, ForwardContext, Linear, Norm, ResidualStream
from march.model.transformer import Output, Transformer

__all__ = [
    "Attention",
    "Block",
    "CrossAttention",
    "Dropout",
    "FeedForward",
    "ForwardContext",
    "Linear",
    "Norm",
    "Output",
    "ResidualStream",
    "SelfAttention",
    "Sublayer",
    "Transformer",
    "build_model",
]


def build_model(
    name: str | experiments.Experiment,
    *,
    impl: kernels.Impl = "auto",
    seed: int | None = None,
    parts: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Transformer:
    """The model of experiment `name`, FILE.py:NAME of a file of your own too, float32 on torch's default device.

    impl: implementation of the operators, see `kernels.dispatch`. seed: of the initial values, each drawn by its
    parameter's name; by default the seed that torch.manual_seed was last given. parts: code of your own by place, as
    in `Experiment.parts` (docs/own_ideas.md). overrides: fields of `march.config.ModelConfig` (dim_model, num_layers,
    num_heads, dim_qkv, dim_feedforward, vocab_size, max_length, dropout, database_states, ...); an override changes the
    field named and no other. ConfigError (a ValueError) when a name or value is wrong.
    """
    if parts:
        overrides = {**own.register("parts", parts), **overrides}
    return Transformer(resolve(experiments.configuration(name, **overrides)), impl, seed)
