"""The parts of an idea (march.experiments.own), before a model is made of them."""

from typing import Any

from kernels import activations
from kernels.activations import Activation
from march.config import PARTS, ConfigError, nearest
from march.model.layers import Block, Sublayer
from march.model.modules import Norm

SUBLAYERS = ("self_attention", "cross_attention", "unified_attention", "database_attention", "feedforward")
PLACES: dict[str, type] = {"block": Block, "norm": Norm, **dict.fromkeys(SUBLAYERS, Sublayer)}


def use(idea: str) -> None:
    """Makes the kernels know the activation of `idea`; ConfigError where one of its parts cannot stand in its place."""
    for place, part in PARTS[idea].items():
        if place == "activation":
            _require(isinstance(part, Activation), place, "a kernels.activations.Activation", part)
            activations.register(idea, part)
        elif place in PLACES:
            right = isinstance(part, type) and issubclass(part, PLACES[place])
            _require(right, place, f"a subclass of march.model.{PLACES[place].__name__}", part)
        else:
            close = nearest(place, [*PLACES, "activation"], 1)
            hint = f"did you mean {close[0]}?" if close else f"the places are {', '.join(PLACES)} and activation"
            raise ConfigError(f"parts: expected a place in the model, got {str(place)[:60]!r}; {hint}")


def _require(right: bool, place: str, wanted: str, part: Any) -> None:
    if not right:
        got = f"the class {part.__name__}" if isinstance(part, type) else f"{type(part).__name__} {str(part)[:40]!r}"
        raise ConfigError(f"parts: expected {wanted} as {place}, got {got}; give what is in the file, not its name")
