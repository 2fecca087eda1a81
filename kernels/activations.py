"""The activations: one entry a name, which every implementation, the configuration and the bench read.

A new one is a new entry of ACTIVATIONS and nothing else, or, of an idea in a file of its own, an `Activation` there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
# triton.language within device code: kernels.fused compiles those functions with it, nothing here imports triton
tl: Any = None


@dataclass(frozen=True)
class Activation:
    """formula: act(x) of a tensor. backward: (d_out, x) to d_out act'(x).

    value, slope: act(a) and act'(a) of a float32 block, as Triton code, in which `tl` is triton.language; functions
    by `def`, whose source Triton reads.
    """

    formula: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Any], Any]
    slope: Callable[[Any], Any]


def _relu(a):
    return tl.maximum(a, 0.0)


def _relu_slope(a):  # 0 at 0, as torch has it
    return tl.where(a > 0.0, 1.0, 0.0)


def _gelu(a):
    return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))


def _gelu_slope(a):
    density = tl.exp(-0.5 * a * a) * 0.3989422804014327
    return 0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * density


def _silu(a):
    return a * tl.sigmoid(a)


def _silu_slope(a):
    s = tl.sigmoid(a)
    return s * (1.0 + a * (1.0 - s))


def _sigmoid(a):
    return tl.sigmoid(a)


def _sigmoid_slope(a):
    s = tl.sigmoid(a)
    return s * (1.0 - s)


def _identity(a):
    return a


def _identity_slope(a):
    return tl.full(a.shape, 1.0, tl.float32)


def _relu2(a):
    kept = tl.maximum(a, 0.0)
    return kept * kept


def _relu2_slope(a):
    return 2.0 * tl.maximum(a, 0.0)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, lambda d, x: _aten.threshold_backward(d, x, 0), _relu, _relu_slope),
    # the exact erf form
    "gelu": Activation(F.gelu, lambda d, x: _aten.gelu_backward(d, x), _gelu, _gelu_slope),
    "silu": Activation(F.silu, lambda d, x: _aten.silu_backward(d, x), _silu, _silu_slope),
    "sigmoid": Activation(
        torch.sigmoid, lambda d, x: _aten.sigmoid_backward(d, torch.sigmoid(x)), _sigmoid, _sigmoid_slope
    ),
    "identity": Activation(lambda x: x, lambda d, x: d, _identity, _identity_slope),
    # So et al., 2021
    "relu2": Activation(
        lambda x: torch.relu(x).square(), lambda d, x: d * torch.relu(x).mul_(2.0), _relu2, _relu2_slope
    ),
}


_OWN: dict[str, Activation] = {}


def register(name: str, activation: Activation) -> None:
    """Makes `activation` the one of `name`, for the experiment that brings it; it is in no list."""
    _OWN[name] = activation


def activation_of(name: str) -> Activation:
    """The entry of `name`; ValueError with the names there are."""
    if name in _OWN:
        return _OWN[name]
    if name not in ACTIVATIONS:
        expected = f"an activation among {', '.join(ACTIVATIONS)}"
        raise ValueError(f"glu: expected {expected}, got {name!r}; name one of them")
    return ACTIVATIONS[name]
