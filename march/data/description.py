"""Which text a command means: one set of options for `march.data prepare` and for training."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from march.console import unescaped, whole
from march.data import prepare, vocabulary
from march.data.corpora import SOURCES, Corpus, open_corpus
from march.data.errors import DataError
from march.data.store import MANIFEST, TokenDataset

# The options of the sources, as the command line and march.data.corpora call them.
SOURCE_OPTIONS = (
    *("files", "field", "column", "separator", "encoding"),
    *("snapshot", "dataset", "config", "split", "revision", "limit", "held_out"),
)
DIRECTORY = Path("data")


def add_arguments(parser: argparse.ArgumentParser, default_source: str) -> None:
    """Adds the options of a text; each is None where it is not given."""
    what = parser.add_argument_group("the text")
    what.add_argument("--source", metavar="NAME", help=f"{', '.join(SOURCES)}; default {default_source}")
    what.add_argument("--data-dir", "--directory", dest="directory", metavar="DIR", help="of prepared stores (data)")
    what.add_argument(
        "--vocab-size",
        type=whole(vocabulary.SMALLEST, vocabulary.LARGEST, "30000 is the recipe's"),
        metavar="N",
        help="tokens (excerpt 4096, wikipedia 30000, others up to 30000)",
    )
    what.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="of the documents, for test and for validation each, drawn by a hash of their text",
    )
    files = parser.add_argument_group("--source files")
    files.add_argument("--files", nargs="+", metavar="GLOB", help=".txt .text .md, .jsonl .ndjson, .parquet")
    files.add_argument("--field", help="field of JSON lines that holds the text (text)")
    files.add_argument("--column", help="column of parquet, or of a dataset, that holds the text (text)")
    files.add_argument(
        "--separator", type=unescaped, help=r"between documents of a text file, such as '\n\n' (a file is one)"
    )
    files.add_argument("--encoding", help="of text files and JSON lines (utf-8)")
    hub = parser.add_argument_group("--source huggingface, and wikipedia, a dataset of its own")
    hub.add_argument("--dataset", help="name on the hub, or a folder (wikimedia/wikipedia)")
    hub.add_argument("--config", help="configuration of the dataset, where it has several; --column holds the text")
    hub.add_argument("--split", help="of the dataset, to train on and to hold out from (train)")
    hub.add_argument("--revision", help="commit, tag or branch of the dataset (its newest)")
    hub.add_argument("--snapshot", help="configuration of Wikipedia (20231101.en)")
    limit = whole(1, 10**12, "leave it out for all")
    hub.add_argument("--limit", type=limit, metavar="N", help="only so many documents, for a trial")


@dataclass(frozen=True)
class Description:
    """A prepared folder, or a source with its options and the vocabulary's size (None: the source's own)."""

    source: str
    options: Mapping[str, Any]
    directory: Path
    vocab_size: int | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, data: Any, default_source: str = "excerpt") -> "Description":
        """Of the recipe's group `data`, or of what `march.data prepare` parsed: the same names.

        Raises:
            DataError: a source, an option or a prepared folder that cannot be.
        """
        given = {name: value for name in SOURCE_OPTIONS if (value := getattr(data, name, None)) is not None}
        directory = Path(data.directory or DIRECTORY)
        if store := getattr(data, "store", None):
            return cls(TokenDataset(store).manifest["source"]["name"], {}, directory, folder=Path(store))
        source = data.source or ("files" if "files" in given else default_source)
        open_corpus(source, **given)
        return cls(source, given, directory, data.vocab_size)

    @property
    def name(self) -> str:
        """For people."""
        return str(self.folder) if self.folder else self.corpus().name

    def corpus(self) -> Corpus:
        return open_corpus(self.source, **self.options)

    def is_plain(self, published: Any) -> bool:
        """Is it the text of the recipe's group `published`, a source with no option?"""
        source, vocab_size = published.source, published.vocab_size
        if self.folder is None:
            return (self.source, self.vocab_size, bool(self.options)) == (source, vocab_size, False)
        plain, manifest = SOURCES[source], TokenDataset(self.folder).manifest
        return manifest["source"]["name"] == source and (
            prepare.requested(plain.create(), vocab_size) == manifest["vocabulary"]["requested"]
            and manifest["source"]["options"] == plain.create().options()
        )

    def open(self, *, force: bool = False) -> TokenDataset:
        """The store, prepared if it is not there; `force` prepares it anew."""
        if self.folder is not None:
            return TokenDataset(self.folder)
        return prepare.load_or_prepare(self.source, self.directory, self.vocab_size, force=force, **self.options)

    def require_prepared(self) -> None:
        """DataError where opening would start hours of work: a dataset of the hub that was not prepared."""
        if self.folder is not None or self.source not in ("wikipedia", "huggingface"):
            return
        if self.source == "huggingface" and Path(self.options["dataset"]).is_dir():
            return
        corpus = self.corpus()
        path = prepare.location(corpus, self.directory, self.vocab_size)
        if not (path / MANIFEST).exists():
            command = prepare.command(corpus, self.vocab_size, self.directory)
            raise DataError(
                f"prepared {'Wikipedia' if self.source == 'wikipedia' else self.options['dataset']} at {path}",
                "none",
                f"run {command} once (hours, network), or train on other text: --recipe demo",
            )
