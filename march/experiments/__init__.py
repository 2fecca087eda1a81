"""Experiments by name: `get`, `names`, `configuration`, `difference`."""

from typing import Any

from march import config as configuration_module
from march.config import ConfigError, ModelConfig, nearest, override
from march.experiments import own
from march.experiments.catalog import EXPERIMENTS
from march.experiments.experiment import Experiment

_BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
_BY_LOWER = {name.lower(): name for name in _BY_NAME}
_SUFFIX = "experiment"

__all__ = ["EXPERIMENTS", "Experiment", "configuration", "difference", "get", "names"]


def names() -> list[str]:
    """The names, in the order of the catalogue."""
    return list(_BY_NAME)


def get(name: str | Experiment) -> Experiment:
    """The experiment called `name`: any case, with or without the suffix Experiment, or FILE.py:NAME of a file of your
    own; ConfigError names the nearest. An experiment is itself."""
    if isinstance(name, Experiment):
        return name
    if own.is_spec(name):
        return own.load(name)
    lowered = name.strip().lower()
    for candidate in (lowered, lowered.removesuffix(_SUFFIX).rstrip("_- ")):
        if candidate in _BY_LOWER:
            return _BY_NAME[_BY_LOWER[candidate]]
    close = nearest(lowered.removesuffix(_SUFFIX), names())
    hint = f"did you mean {', '.join(close)}?" if close else "see --list"
    raise ConfigError(f"experiment: expected a name of the list, got {name[:60]!r}; {hint}")


def configuration(name: str | Experiment, **overrides: Any) -> ModelConfig:
    """The experiment's configuration, then `overrides` on it; an override changes the field named and no other."""
    chain: list[Experiment] = [get(name)]
    while chain[-1].base is not None:
        chain.append(get(chain[-1].base))
    config = ModelConfig()
    for experiment in reversed(chain):
        config = override(config, **experiment.changes, **own.fields(experiment))
    return override(config, **overrides) if overrides else config


def difference(name: str | Experiment) -> dict[str, tuple[Any, Any]]:
    """Fields in which the experiment differs from its base: field -> (base's value, its value)."""
    experiment = get(name)
    base = configuration(experiment.base) if experiment.base else ModelConfig()
    return configuration_module.difference(configuration(name), base)
