"""The activations: one entry a name, which every implementation reads."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """formula: act(x). backward: (d_out, x) to d_out act'(x). fused: device code exists (kernels.fused.glu_kernels)."""

    formula: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    fused: bool = False


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, lambda d, x: _aten.threshold_backward(d, x, 0), fused=True),
    "gelu": Activation(F.gelu, lambda d, x: _aten.gelu_backward(d, x), fused=True),  # the exact erf form
    "silu": Activation(F.silu, lambda d, x: _aten.silu_backward(d, x), fused=True),
    "sigmoid": Activation(torch.sigmoid, lambda d, x: _aten.sigmoid_backward(d, torch.sigmoid(x)), fused=True),
    "identity": Activation(lambda x: x, lambda d, x: d, fused=True),
}


def activation_of(name: str, *, fused: bool = False) -> Activation:
    """The entry of `name`; ValueError with the names there are, `fused` those with device code."""
    names = [key for key, entry in ACTIVATIONS.items() if entry.fused or not fused]
    if name not in names:
        where = " with device code" if fused else ""
        raise ValueError(f"glu: expected an activation{where} among {', '.join(names)}, got {name!r}; name one of them")
    return ACTIVATIONS[name]
