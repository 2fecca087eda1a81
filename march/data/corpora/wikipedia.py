"""English Wikipedia (or another language) as cleaned by Wikimedia, through Hugging Face datasets."""

import hashlib
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from march.data.corpora.base import Corpus
from march.data.errors import DataError

# the vocabulary's sample: 0.6 GB of text, of which the trainer holds the distinct words; all 6.4M articles would
# take a second download and tens of GB for their distinct words
SAMPLE_DOCUMENTS = 200_000


@dataclass(frozen=True)
class Wikipedia(Corpus):
    """snapshot: a configuration of the dataset; dataset: its name on the hub, or a folder with a copy of it;
    limit: the number of articles, all of them when None (for a trial)."""

    source = "wikipedia"
    note = "Wikipedia, as cleaned by the Wikimedia Foundation (CC BY-SA)"
    vocab_size = 30_000

    snapshot: str = "20231101.en"
    dataset: str = "wikimedia/wikipedia"
    limit: int | None = None

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise DataError("a limit of at least one article", str(self.limit), "leave --limit out for all of them")
        if not re.fullmatch(r"[\w.-]+", self.snapshot):  # it is part of a folder's name
            raise DataError("a snapshot such as 20231101.en", repr(self.snapshot), "choose one of the dataset's")
        if Path(self.dataset).exists():
            object.__setattr__(self, "dataset", os.path.abspath(self.dataset))

    @property
    def name(self) -> str:
        copy = "" if self.dataset == Wikipedia.dataset else f"-{hashlib.sha256(self.dataset.encode()).hexdigest()[:8]}"
        return f"wikipedia-{self.snapshot}{copy}" + (f"-first{self.limit}" if self.limit else "")

    def fingerprint(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "snapshot": self.snapshot}

    @cached_property
    def _stream(self):
        # opened on first use: the import takes 2 s, and a prepared store needs neither it nor a network
        import datasets

        _resolve(self.dataset)
        try:
            return datasets.load_dataset(self.dataset, self.snapshot, split="train", streaming=True)
        except Exception as error:
            # of many kinds, by the layer that fails (hub, HTTP client, file system): named in the message, and chained
            if isinstance(error, ValueError) and "BuilderConfig" in str(error):
                raise DataError(
                    f"a snapshot of {self.dataset}",
                    f"{self.snapshot!r}, which it does not have",
                    "choose one of the dataset's configurations with --snapshot, such as 20231101.en",
                ) from None
            raise _unreachable(self.dataset, error) from error

    def documents(self) -> Iterator[str]:
        return self._texts(self._stream if self.limit is None else self._stream.take(self.limit))

    def sample(self) -> Iterator[str]:
        """The same number of articles from the start of every file, so that old and new articles count alike."""
        if self.limit is not None and self.limit <= SAMPLE_DOCUMENTS:
            yield from self.documents()
            return
        shards = self._stream.num_shards
        for index in range(shards):
            shard = self._stream.shard(num_shards=shards, index=index)
            yield from self._texts(shard.take(-(-SAMPLE_DOCUMENTS // shards)))

    def count(self) -> int | None:
        splits = self._stream.info.splits or {}
        known = splits["train"].num_examples if "train" in splits else None
        return self.limit if known is None else min(known, self.limit or known)

    def sample_count(self) -> int | None:
        return None if (count := self.count()) is None else min(count, SAMPLE_DOCUMENTS)

    def attribution(self) -> str:
        return (
            f"The tokens beside this file were made from the articles of Wikipedia, snapshot {self.snapshot}, by\n"
            "their contributors, licensed CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/) and GFDL,\n"
            f"as cleaned and published by the Wikimedia Foundation (dataset {self.dataset}). Changes: tokenised.\n"
            "The result is under the same licence.\n"
        )

    def _texts(self, stream) -> Iterator[str]:
        try:
            for batch in stream.iter(batch_size=256):
                yield from batch["text"]
        except KeyError:
            raise DataError(
                f"a column 'text' in {self.dataset}", "none", "use --source files for other formats"
            ) from None
        except Exception as error:
            raise _unreachable(self.dataset, error) from error


def _resolve(dataset: str) -> None:
    """Fails at once where the hub's name does not resolve; its client would try for 24 s."""
    from huggingface_hub import constants

    if Path(dataset).exists() or constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError as error:
        raise _unreachable(dataset, error) from error


def _unreachable(dataset: str, error: Exception) -> DataError:
    detail = (str(error).splitlines() or [""])[0][:160]
    return DataError(
        f"access to the dataset {dataset}",
        f"{type(error).__name__}: {detail}",
        "check the network (with HF_HUB_OFFLINE=1 there is none); without one use --source excerpt, --dataset "
        "FOLDER with a copy, or --source files --files 'FOLDER/*.parquet'",
    )
