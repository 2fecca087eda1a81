"""Initialisation: every parameter matches exactly one rule, or construction fails.

linear_init "torch" is PyTorch's default for linear layers, U(+-1/sqrt(fan_in)), which the published runs had; "t5"
is Raffel et al., 2020: the variances that make attention without 1/sqrt(K) start flat.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from march.model.layers import Sublayer
from march.model.transformer import Transformer

Draw = Callable[[Transformer, Sublayer | None, Tensor], Any]
Rule = tuple[str, Draw]


def _normal(std: float) -> Draw:
    return lambda _model, _owner, weight: nn.init.normal_(weight, std=std)


def _positions(model: Transformer, _owner: Sublayer | None, weight: Tensor) -> None:
    std = 1.0 if model.config.position_init == "unit" else model.config.dim_model**-0.5
    nn.init.normal_(weight, std=std)


def _uniform_fan_in(_model: Transformer, _owner: Sublayer | None, weight: Tensor) -> None:
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)


def _t5_queries(model: Transformer, owner: Sublayer | None, weight: Tensor) -> None:
    """Wq; Wk and Wv behind it in a packed parameter."""
    assert owner is not None
    rows = owner.heads * owner.width
    nn.init.normal_(weight[:rows], std=(model.config.dim_model * owner.width) ** -0.5)
    if weight.shape[0] > rows:
        nn.init.normal_(weight[rows:], std=model.config.dim_model**-0.5)


def _t5_fan_in(_model: Transformer, _owner: Sublayer | None, weight: Tensor) -> None:
    """Wo (H K)^-1/2, Wup and Wgate D^-1/2, Wdown F^-1/2: each its number of inputs."""
    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)


_COMMON: tuple[Rule, ...] = (
    (r"embedding", _normal(1.0)),
    (r"positions", _positions),
    (r"database_(keys|values)", _normal(1.0)),
    (r".*norm\.gain", lambda _model, _owner, gain: nn.init.ones_(gain)),
)
_LINEAR: dict[str, tuple[Rule, ...]] = {
    "torch": ((r".*\.w_(q|qkv|o|in|down)", _uniform_fan_in),),
    "t5": ((r".*\.w_(q|qkv)", _t5_queries), (r".*\.w_(o|in|down)", _t5_fan_in)),
}


@torch.no_grad()
def initialise(model: Transformer) -> None:
    """Draws every parameter from torch's global generator; RuntimeError when one has no rule or several."""
    rules = _COMMON + _LINEAR[model.config.linear_init]
    for name, parameter in model.named_parameters():
        matching = [apply for pattern, apply in rules if re.fullmatch(pattern, name)]
        if len(matching) != 1:
            raise RuntimeError(f"initialisation: expected one rule for {name}, got {len(matching)}; add it to init.py")
        owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else None
        matching[0](model, owner if isinstance(owner, Sublayer) else None, parameter)
