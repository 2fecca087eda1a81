"""The one seam between an operator and its implementations.

`impl` is a name for every operator ("auto", "triton", "torch", "reference") or a mapping from operator to name, where
an operator that is not named takes "auto": {"attention": "flash_attn", "residual_norm": "apex"}. Nothing falls back
in silence: a choice that cannot run raises `ImplementationError` and says what to do.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import cache

import torch

Impl = str | Mapping[str, str]

OPERATORS = ("attention", "unified_attention", "glu", "residual_norm", "linear_cross_entropy", "embedding")
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
LIBRARIES = {"attention": ("flash_attn",), "residual_norm": ("apex",)}
FUSED = {name: f"kernels.fused.{name}" for name in OPERATORS}


class ImplementationError(RuntimeError):
    """The chosen implementation of an operator cannot run here."""


def validate(impl: Impl) -> Impl:
    """Checks the names in `impl`; ValueError names the choices."""
    chosen = dict.fromkeys(OPERATORS, impl) if isinstance(impl, str) else dict(impl)
    for operator, name in chosen.items():
        if operator not in OPERATORS:
            raise ValueError(f"impl: expected an operator among {', '.join(OPERATORS)}, got {operator!r}")
        choices = IMPLEMENTATIONS if isinstance(impl, str) else IMPLEMENTATIONS + LIBRARIES.get(operator, ())
        if name not in choices:
            hint = ""
            for library_operator, libraries in LIBRARIES.items():
                if name in libraries:
                    hint = f"; {name} applies to one operator: use {library_operator}={name}"
            raise ValueError(f"impl: expected one of {', '.join(choices)} for {operator}, got {name!r}{hint}")
    return impl


def parse_impl(text: str) -> Impl:
    """`impl` from a command line: "torch", or "attention=flash_attn,residual_norm=apex"."""
    if "=" not in text:
        return validate(text)
    pairs = [part.split("=", 1) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"impl: expected a name or operator=name,operator=name, got {text!r}")
    return validate({operator.strip(): name.strip() for operator, name in pairs})


def triton_interpreted() -> bool:
    """True where Triton programs run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choice(operator: str, impl: Impl, device: torch.device) -> str:
    """Name of the implementation that `operator` takes on `device`."""
    name = impl if isinstance(impl, str) else impl.get(operator, "auto")
    if name == "auto":
        return "triton" if device.type == "cuda" and operator in FUSED and fused_available(operator) else "torch"
    return name


def fused_available(operator: str) -> bool:
    """True where the fused kernel of `operator` is part of this installation."""
    return importlib.util.find_spec("triton") is not None and importlib.util.find_spec(FUSED[operator]) is not None


@cache
def _module(name: str):
    return importlib.import_module(name)


def implementation(operator: str, impl: Impl, device: torch.device) -> Callable:
    """The function that computes `operator` on `device`; its keyword arguments are those of kernels.reference."""
    name = choice(operator, impl, device)
    if name in ("torch", "reference"):
        module = _module("kernels.portable" if name == "torch" else "kernels.reference")
        return getattr(module, operator)
    if name == "triton":
        if not fused_available(operator):
            raise ImplementationError(
                f"{operator}: impl='triton' has no fused kernel here (triton installed: "
                f"{importlib.util.find_spec('triton') is not None}); use impl='torch'"
            )
        if device.type != "cuda" and device.type != "meta" and not triton_interpreted():
            raise ImplementationError(
                f"{operator}: impl='triton' needs a CUDA device, got tensors on {device}; use impl='torch' or 'auto', "
                "or set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
            )
        return getattr(_module(FUSED[operator]), operator)
    return getattr(_module(f"kernels.libraries.{name}"), operator)


def describe(impl: Impl, device: torch.device) -> str:
    """What each operator takes on `device`, for a run's first line."""
    names = {operator: choice(operator, impl, device) for operator in OPERATORS}
    if len(set(names.values())) == 1:
        return f"every operator: {names['attention']}"
    return ", ".join(f"{operator}: {name}" for operator, name in names.items())
