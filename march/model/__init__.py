"""The model, and `build_model`."""

from typing import Any

import kernels
from march import experiments
from march.config import resolve
from march.model.layers import Block
from march.model.transformer import Output, Transformer

__all__ = ["Block", "Output", "Transformer", "build_model"]


def build_model(
    name: str, *, impl: kernels.Impl = "auto", seed: int | None = None, block: type[Block] = Block, **overrides: Any
) -> Transformer:
    """The model of experiment `name`, float32 on torch's default device.

    impl: implementation of the operators, see `kernels.dispatch`. seed: of the initial values, each drawn by its
    parameter's name; by default the seed that torch.manual_seed was last given. block: a class of your own in place of
    `march.model.Block`. overrides: fields of `march.config.ModelConfig` (dim_model, num_layers, num_heads, dim_qkv,
    dim_feedforward, vocab_size, max_length, dropout, database_states, ...); an override changes the field named and no
    other. ConfigError (a ValueError) when a name or value is wrong.
    """
    return Transformer(resolve(experiments.configuration(name, **overrides)), impl, seed, block)
