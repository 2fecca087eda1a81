"""First values by name: what two models both have begins the same in both, whatever else they have.

A module says in `init_rules` how each of its own parameters is drawn. The draw depends on the seed and the parameter's
full name alone: not on the order of construction, the device, or what else drew before. The ids of dropout places are
hashes of their names, so two models share their masks too.
"""

import hashlib
import operator
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Rule = Callable[[Tensor, torch.Generator], Any]
# of a packed weight: (name, rows, rule) of each part, drawn as if it were a parameter beside the weight's module
Parts = list[tuple[str, int, Rule]]


def _normal(std: float, x: Tensor, generator: torch.Generator) -> None:
    x.normal_(0.0, std, generator=generator)


def _uniform(bound: float, x: Tensor, generator: torch.Generator) -> None:
    x.uniform_(-bound, bound, generator=generator)


def normal(std: float) -> Rule:
    return partial(_normal, std)  # and not a lambda: a model can be pickled


def uniform(bound: float) -> Rule:
    return partial(_uniform, bound)


def ones(x: Tensor, _: torch.Generator) -> None:
    x.fill_(1.0)


def ids_by_name(names: Iterable[str], bits: int, salt: str = "") -> dict[str, int]:
    """Each name's hash in [0, 2^bits), the same in every process; RuntimeError where two names share one."""
    ids: dict[int, str] = {}
    for name in names:
        number = int.from_bytes(hashlib.blake2b(f"{salt}{name}".encode()).digest()[:8]) >> (64 - bits)
        if ids.setdefault(number, name) != name:
            raise RuntimeError(
                f"expected an id for each name, got one for {ids[number]} and {name}; rename one, or take another seed"
            )
    return {name: number for number, name in ids.items()}


def _draws(model: nn.Module) -> dict[str, tuple[Tensor, Rule]]:
    """(tensor, its rule) by the name that it is drawn by."""
    draws: list[tuple[str, tuple[Tensor, Rule]]] = []
    for prefix, module in model.named_modules():
        rules: dict[str, Rule | Parts] = getattr(module, "init_rules", {})
        own = dict(module.named_parameters(recurse=False))
        for name in sorted(own.keys() ^ rules.keys()):
            raise RuntimeError(
                f"{f'{prefix}.{name}'.lstrip('.')}: expected a parameter with one initialisation rule, got "
                f"{'no rule' if name in own else 'a rule alone'}; in {type(module).__name__} set "
                f"self.init_rules = {{{name!r}: march.model.init.ones}} or the like"
            )
        for name, x in own.items():
            rule = rules[name]
            if isinstance(rule, list):
                pieces = zip(rule, x.split([rows for _, rows, _ in rule]), strict=True)
                draws += [(f"{prefix.rpartition('.')[0]}.{part}", (piece, r)) for (part, _, r), piece in pieces]
            else:
                draws.append((f"{prefix}.{name}".lstrip("."), (x, rule)))
    names = [name for name, _ in draws]
    for name in {name for name in names if names.count(name) > 1}:
        raise RuntimeError(f"{name}: expected one parameter of this name, got several parts; rename one in its Linear")
    return dict(draws)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draws every parameter and gives every `Dropout` its id, by name; RuntimeError where a parameter has no rule.

    Values are drawn on the CPU in float32, whatever the parameters' device and type; on the meta device not at all.
    """
    places: dict[str, Any] = {name: x for name, x in model.named_modules() if hasattr(x, "dropout_id")}
    for name, number in ids_by_name(places, bits=30).items():
        places[name].dropout_id = number
    draws = _draws(model)
    for name, stream in ids_by_name(draws, bits=32, salt=f"{operator.index(seed)}:").items():
        x, rule = draws[name]
        if not x.is_meta:
            drawn = x.to("cpu", torch.float32)  # itself where it is that
            rule(drawn, torch.Generator("cpu").manual_seed(stream))
            x.copy_(drawn)
