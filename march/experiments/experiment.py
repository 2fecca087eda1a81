"""What an experiment is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Experiment:
    """A change, and what to make of its result.

    base: the experiment it starts from (None: the defaults of ModelConfig). changes: the fields that differ from the
    base, no others. control: the experiment that differs in what is tested alone, to compare the loss with.
    hypothesis: what the change tests. claim: what the published text says and its own curves show, as differences in
    evaluation loss to Baseline. source: where the claim is from.
    """

    name: str
    base: str | None
    changes: Mapping[str, Any] = field(hash=False)
    control: str | None
    hypothesis: str
    claim: str | None = None
    source: str | None = None
