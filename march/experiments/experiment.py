"""What an experiment is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from march.experiments.claims import Claim


@dataclass(frozen=True)
class Experiment:
    """A change, and what to make of its result.

    base: the experiment it starts from (None: the defaults of ModelConfig). changes: the fields that differ from the
    base, no others. control: the experiment that differs in what is tested alone, to compare the loss with.
    hypothesis: what the change tests. claim: what the published text says. source: where the claim is from. parts: code
    of a file's own, by the place where it stands in the model (march.experiments.own). file, sha256: of an experiment
    of such a file.
    """

    name: str
    base: str | None
    changes: Mapping[str, Any] = field(hash=False)
    control: str | None
    hypothesis: str
    claim: Claim | None = None
    source: str | None = None
    parts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    file: Path | None = None
    sha256: str | None = None

    @property
    def spec(self) -> str:
        """What `march.experiments.get` finds it by."""
        return self.name if self.file is None else f"{self.file}:{self.name}"
