"""What the preparation asks of a corpus."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from march.data.errors import DataError


@dataclass(frozen=True)
class Corpus(ABC):
    """Documents in a fixed order. The dataclass fields of a subclass are its options, as the manifest records them.

    source: its name. note: what it is, for people. vocab_size: the default number of tokens. min_frequency: how often
    a pair has to occur to be merged when nobody asked for a size, so that a corpus too small for vocab_size gets a
    vocabulary it can fill. fill_vocabulary: whether fewer tokens than the default vocab_size are an error.

    held_out: the share of the documents that go to test, and to validation, by a hash of their text; None for the rule
    of march.data.splits.
    """

    source: ClassVar[str]
    note: ClassVar[str]
    vocab_size: ClassVar[int]
    min_frequency: ClassVar[int] = 2
    fill_vocabulary: ClassVar[bool] = True

    held_out: float | None = None

    def __post_init__(self):
        if self.held_out is not None and not 0 < self.held_out < 0.5:
            got = str(self.held_out)
            raise DataError("a share above 0 and below 0.5 for test and validation each", got, "give --held-out 0.05")

    @classmethod
    def create(cls, **options) -> "Corpus":
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise DataError(
                f"options of the source {cls.source}: {', '.join(sorted(known)) or 'none'}",
                ", ".join(unknown),
                "leave them out, or choose another --source",
            )
        return cls(**options)

    def options(self) -> dict[str, Any]:
        """The options as JSON types."""
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.held_out is None:
            del given["held_out"]
        return given

    @staticmethod
    def digest(options: Any) -> str:
        """A short name of JSON types."""
        text = options if isinstance(options, str) else json.dumps(options, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    @abstractmethod
    def name(self) -> str:
        """The folder's name, without the vocabulary: readable, and different for different options."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the corpus's content; another one makes a prepared store stale. Cheap to compute."""

    @abstractmethod
    def documents(self) -> Iterator[str | Iterable[str]]:
        """All documents, in order, one in memory at a time; a long one in parts, of which one is."""

    def sample(self) -> Iterator[str | Iterable[str]]:
        """The documents that the vocabulary is trained on."""
        return self.documents()

    def count(self) -> int | None:
        """The number of documents, for progress bars, or None when only reading tells."""
        return None

    def sample_count(self) -> int | None:
        """The number of documents in the sample, like count()."""
        return self.count()

    @abstractmethod
    def attribution(self) -> str:
        """Text of the attribution file that goes with the store."""
