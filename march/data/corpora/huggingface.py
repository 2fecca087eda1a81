"""Any text dataset of the Hugging Face hub, or a folder laid out like one, streamed through `datasets`."""

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

# the vocabulary's sample: of Wikipedia 0.6 GB of text, of which the trainer holds the distinct words; all 6.4M articles
# would take a second download and tens of GB for their distinct words
SAMPLE_DOCUMENTS = 200_000


@dataclass(frozen=True)
class Streamed(Corpus):
    """dataset: its name on the hub, or a folder with a copy of it; limit: the number of documents, for a trial."""

    dataset: str = ""
    limit: int | None = None

    split = "train"
    column = "text"

    def __post_init__(self):
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise DataError("a limit of at least one document", str(self.limit), "leave --limit out for all of them")
        if not self.dataset:
            raise DataError("the name of a dataset on the hub, or a folder", "none", "name it, as in --dataset NAME")
        if Path(self.dataset).exists():
            object.__setattr__(self, "dataset", os.path.abspath(self.dataset))

    def place(self) -> dict[str, Any]:
        """What load_dataset takes beside the dataset and the split."""
        raise NotImplementedError

    @cached_property
    def _stream(self):
        # opened on first use: the import takes 2 s, and a prepared store needs neither it nor a network
        import datasets

        _resolve(self.dataset)
        try:
            return datasets.load_dataset(self.dataset, split=self.split, streaming=True, **self.place())
        except Exception as error:
            # of many kinds, by the layer that fails (hub, HTTP client, file system): named in the message, and chained
            text = str(error)
            if isinstance(error, ValueError) and ("BuilderConfig" in text or "Config name" in text):
                known = re.search(r"\[(.+?)\]", text)
                raise DataError(
                    f"a configuration of {self.dataset}{f' among {known[1][:160]}' if known else ''}",
                    f"{name!r}, which it does not have" if (name := self.place()["name"]) else "none of its several",
                    "choose one with --snapshot (Wikipedia) or --config",
                ) from None
            if isinstance(error, ValueError) and "split" in text.lower():
                raise DataError(f"a split of {self.dataset}", text.splitlines()[0][:160], "name it: --split") from None
            raise _unreachable(self.dataset, error) from error

    def documents(self) -> Iterator[str]:
        return self._texts(self._stream if self.limit is None else self._stream.take(self.limit))

    def sample(self) -> Iterator[str]:
        """The same number of documents from the start of every file, so that old and new articles count alike."""
        if self.limit is not None and self.limit <= SAMPLE_DOCUMENTS:
            yield from self.documents()
            return
        shards = self._stream.num_shards
        for index in range(shards):
            shard = self._stream.shard(num_shards=shards, index=index)
            yield from self._texts(shard.take(-(-SAMPLE_DOCUMENTS // shards)))

    def count(self) -> int | None:
        splits = self._stream.info.splits or {}
        known = splits[self.split].num_examples if self.split in splits else None
        return self.limit if known is None else min(known, self.limit or known)

    def sample_count(self) -> int | None:
        return None if (count := self.count()) is None else min(count, SAMPLE_DOCUMENTS)

    def _texts(self, stream) -> Iterator[str]:
        row = 0
        try:
            for batch in stream.iter(batch_size=256):
                if self.column not in batch:
                    raise DataError(
                        f"a column {self.column!r} in {self.dataset}",
                        f"the columns {', '.join(map(str, batch))[:160] or '(none)'}",
                        "name the one that holds the text: --source huggingface --column",
                    )
                for text in batch[self.column]:
                    row += 1
                    if not isinstance(text, str):
                        raise DataError(
                            f"text in row {row} of column {self.column!r} of {self.dataset}",
                            "null" if text is None else type(text).__name__,
                            "choose another --column, or a dataset without such rows",
                        )
                    yield text
        except DataError:
            raise
        except Exception as error:
            raise _unreachable(self.dataset, error) from error


@dataclass(frozen=True)
class HuggingFace(Streamed):
    """config: of the dataset, None for its only one; split: its name; revision: a commit, tag or branch of the hub's;
    column: the one that holds the text.

    Up to 30,000 tokens, of pairs seen 40 times at least, as of files.
    """

    source = "huggingface"
    note = "a dataset of the Hugging Face hub"
    vocab_size = 30_000
    min_frequency = 40
    fill_vocabulary = False

    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+", self.split):
            fix = "give a name; --limit takes the first documents, --held-out sets a share aside"
            raise DataError("the name of a split such as train", repr(self.split), fix)

    @property
    def name(self) -> str:
        last = re.sub(r"[^\w.-]", "", self.dataset.rstrip("/").rsplit("/", 1)[-1])[:40]
        return f"huggingface-{last}-{self.digest(self.options())}"

    def fingerprint(self) -> dict[str, Any]:
        """Of a folder its files, by size and time of change; of the hub what was asked for: pin it with --revision."""
        files = sorted(path for path in Path(self.dataset).rglob("*") if path.is_file()) if self._is_folder else []
        stats = [(str(path.relative_to(self.dataset)), path.stat()) for path in files]
        return {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]}

    @property
    def _is_folder(self) -> bool:
        return Path(self.dataset).is_dir()

    def place(self) -> dict[str, Any]:
        return {"name": self.config, "revision": self.revision}

    def attribution(self) -> str:
        where = f"https://huggingface.co/datasets/{self.dataset}" if not self._is_folder else self.dataset
        return (
            f"The tokens beside this file were made from the column {self.column} of the split {self.split} of\n"
            f"{where}, configuration {self.config or 'default'}, revision {self.revision or 'main'}.\n"
            "Its licence, on that page, is that of the tokens too. Changes: tokenised.\n"
        )


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
