"""Parameter counts, by part, of the module itself on the meta device: no second model has to be kept in step."""

import re
from functools import lru_cache

import torch

from march.config import ModelConfig, resolve
from march.model import Transformer
from march.model.layers import Sublayer


@lru_cache(maxsize=256)
def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's. A part is a stack and the class of the layer that has them."""
    with torch.device("meta"):
        model = Transformer(resolve(config), "torch")
    modules = dict(model.named_modules())
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        stack, *path = name.split(".")
        owners = [modules[".".join([stack, *path[:depth]])] for depth in range(1, len(path))]
        layer = next((owner for owner in owners if isinstance(owner, Sublayer)), None)
        part = stack.split("_")[0]  # what belongs to no stack
        if len(path) > 1:
            words = "Norms" if type(owners[-1]).__name__ == "Norm" else type(layer or owners[-1]).__name__
            part = f"{stack}{re.sub('(?=[A-Z])', ' ', words).lower()}"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def total_parameters(config: ModelConfig) -> int:
    """Parameters of the model, tied ones once, dead ones included."""
    return sum(parameters(config).values())
