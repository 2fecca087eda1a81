"""Fused operators for transformer experiments, one seam over their implementations."""

import importlib.metadata
import warnings
from pathlib import Path

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


def _check_namesake() -> None:
    """Hugging Face publishes a package of this name: ImportError where it lies in this directory too, a warning where
    Python finds it second."""
    try:
        other = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    here, there = (Path(str(x)).resolve().parent for x in (__file__, other.locate_file("kernels/__init__.py")))
    got = f"Hugging Face's package of that name, version {other.version},"
    if here == there:
        raise ImportError(
            f"kernels: expected march's package alone in {here}, got {got} in the same directory; "
            "pip uninstall kernels, then install march again"
        )
    warnings.warn(
        f"kernels: expected no other package of this name, got {got} in {there}; Python takes march's in {here}, so "
        "run what needs Hugging Face's in another environment, or pip uninstall kernels",
        stacklevel=2,
    )


_check_namesake()
