"""Fused operators for transformer experiments, one seam over their implementations."""

from kernels.api import (
    attention,
    autocast_dtype,
    cross_attention,
    embedding,
    glu,
    head_width,
    linear,
    linear_cross_entropy,
    packed_unified_attention,
    residual_norm,
    row_width,
    self_attention,
    tied_table,
    unified_attention,
)
from kernels.dispatch import Impl, ImplementationError, describe, parse_impl, require, self_test, validate
from kernels.dropout import Dropout, dropout_state

# "0.0.x": with a larger version `transformers` believes that Hugging Face's package of this name is installed
__version__ = "0.0.1"

__all__ = [
    "Dropout",
    "Impl",
    "ImplementationError",
    "attention",
    "autocast_dtype",
    "cross_attention",
    "describe",
    "dropout_state",
    "embedding",
    "glu",
    "head_width",
    "linear",
    "linear_cross_entropy",
    "packed_unified_attention",
    "parse_impl",
    "require",
    "residual_norm",
    "row_width",
    "self_attention",
    "self_test",
    "tied_table",
    "unified_attention",
    "validate",
]
