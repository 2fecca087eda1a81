"""Fused operators for transformer experiments, one seam over their implementations."""

import importlib.metadata
import warnings
from pathlib import Path

from kernels import api
from kernels.api import *  # noqa: F403 - an operator is named in api.__all__ and nowhere else
from kernels.dispatch import Impl, ImplementationError, describe, parse_impl, require, self_test, validate
from kernels.dropout import Dropout, dropout_state

# "0.0.x": with a larger version `transformers` believes that Hugging Face's package of this name is installed
__version__ = "0.0.1"

__all__ = [
    *api.__all__,
    "Dropout",
    "Impl",
    "ImplementationError",
    "describe",
    "dropout_state",
    "parse_impl",
    "require",
    "self_test",
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
