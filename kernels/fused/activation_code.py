"""Device code of the activations (kernels.activations), found by a key at compile time.

The key is a kernel's constant. It holds a hash of the code, since Triton's cache knows the kernels' own source only.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from kernels.activations import ACTIVATIONS, activation_of


@functools.cache
def _compiled(function: Callable) -> Any:
    scope = function.__globals__ | {"tl": tl}
    bound = types.FunctionType(function.__code__, scope, function.__name__, closure=function.__closure__)
    bound.__module__, bound.__qualname__ = function.__module__, function.__qualname__
    return triton.jit(bound)


class _Code:
    """An attribute of a class, whose growth Triton does not take for a changed global."""

    of: dict[str, tuple[Any, Any]] = {}  # noqa: RUF012


def activation_key(name: str) -> str:
    """What kernels take as ACTIVATION; ValueError for an unknown name."""
    entry = activation_of(name)
    code = _compiled(entry.value), _compiled(entry.slope)
    # interpreted functions have no hash, and nothing caches them
    key = ":".join((name, *(getattr(f, "cache_key", "")[:6] for f in code)))
    _Code.of[key] = code
    return key


@triton.constexpr_function
def _value_of(key):
    return _Code.of[key][0]


@triton.constexpr_function
def _slope_of(key):
    return _Code.of[key][1]


@triton.jit
def activate(a, ACTIVATION: tl.constexpr):
    """act(a) in float32."""
    return _value_of(ACTIVATION)(a)


@triton.jit
def slope(a, ACTIVATION: tl.constexpr):
    """act'(a) in float32."""
    return _slope_of(ACTIVATION)(a)


relu, relu_slope = _compiled(ACTIVATIONS["relu"].value), _compiled(ACTIVATIONS["relu"].slope)
sigmoid, sigmoid_slope = _compiled(ACTIVATIONS["sigmoid"].value), _compiled(ACTIVATIONS["sigmoid"].slope)
