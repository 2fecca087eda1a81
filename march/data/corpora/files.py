"""A user's own text: plain files, JSON lines, parquet."""

import glob
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from march.data.corpora.base import Corpus
from march.data.errors import DataError

_KINDS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
LARGEST_DOCUMENT = 256 * 2**20  # bytes of a text file without a separator: it is one document, held in memory


@dataclass(frozen=True)
class Files(Corpus):
    """files: glob patterns. The kind follows from the ending: .txt .text .md, .jsonl .ndjson, .parquet.

    field: of JSON lines; column: of parquet; separator: splits a text file into documents (a file is one document
    without it); encoding: of text files and JSON lines. Up to 30,000 tokens, of pairs seen 40 times at least: by that
    rule the embedded excerpt, 2.8M characters, would get 4,326.
    """

    source = "files"
    note = "a user's own files"
    vocab_size = 30_000
    min_frequency = 40
    fill_vocabulary = False

    files: tuple[str, ...] = ()
    field: str = "text"
    column: str = "text"
    separator: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self):
        patterns = (self.files,) if isinstance(self.files, str) else tuple(map(str, self.files))
        object.__setattr__(self, "files", patterns)
        if not patterns:
            raise DataError("at least one file or pattern", "none", "name them, as in --files 'texts/*.txt'")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise DataError(
                "an encoding that Python knows", repr(self.encoding), "use --encoding utf-8, or latin-1"
            ) from None
        if self.separator == "":
            raise DataError("a separator of at least one character", "an empty one", "leave --separator out")

    @property
    def name(self) -> str:
        return "files-" + hashlib.sha256(json.dumps(self.options(), sort_keys=True).encode()).hexdigest()[:8]

    def paths(self) -> list[Path]:
        """The files, sorted; DataError when a pattern matches none or an ending is unknown."""
        found: set[Path] = set()
        for pattern in self.files:
            matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
            matches = [path for path in matches if path.is_file()]
            if not matches:
                raise DataError(f"a file at {pattern!r}", "no such file", "correct --files; patterns need quotes")
            found.update(matches)
        for path in found:
            if path.suffix.lower() not in _KINDS:
                raise DataError(
                    f"a file ending in {' '.join(_KINDS)}", str(path), "rename or convert it, or narrow --files"
                )
        return sorted(found)

    def fingerprint(self) -> dict[str, Any]:
        # times rather than contents: a touched file costs a new preparation, a missed edit would cost a wrong run
        stats = [(str(path), path.stat()) for path in self.paths()]
        return {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]}

    def documents(self) -> Iterator[str]:
        for path in self.paths():
            kind = _KINDS[path.suffix.lower()]
            if kind == "text":
                yield from self._text(path)
            elif kind == "json":
                yield from self._json_lines(path)
            else:
                yield from self._parquet(path)

    def attribution(self) -> str:
        return "The tokens beside this file were made from:\n" + "".join(f"{path}\n" for path in self.paths())

    def _text(self, path: Path) -> Iterator[str]:
        size = path.stat().st_size
        if self.separator is None and size > LARGEST_DOCUMENT:
            raise DataError(
                f"documents of at most {LARGEST_DOCUMENT >> 20} MiB",
                f"{path} of {size >> 20} MiB, which is one document",
                "say what separates documents, as in --separator '\\n\\n\\n'",
            )
        rest = ""
        for piece in self._pieces(path):
            rest += piece
            if self.separator is not None:
                *done, rest = rest.split(self.separator)
                yield from done
        yield rest

    def _pieces(self, path: Path) -> Iterator[str]:
        """The text of a file, 4 MiB at a time; a byte order mark is no text."""
        encoding = "utf-8-sig" if self.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else self.encoding
        try:
            with path.open(encoding=encoding, newline="") as stream:
                while piece := stream.read(4 * 2**20):
                    yield piece
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.encoding} text in {path}",
                f"byte 0x{error.object[error.start]:02x} that is none",
                "name the file's encoding, as in --encoding latin-1, or convert it",
            ) from None

    def _json_lines(self, path: Path) -> Iterator[str]:
        rest, number = "", 0
        for piece in itertools.chain(self._pieces(path), "\n"):
            *lines, rest = (rest + piece).split("\n")
            for line in lines:
                number += 1
                if line.strip():
                    yield self._record(path, number, line)

    def _record(self, path: Path, number: int, line: str) -> str:
        where = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"a JSON object in {where}", f"{error.msg} at column {error.colno}", "correct the line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"a JSON object in {where}", type(record).__name__, "write one object a line")
        if self.field not in record:
            got = f"the fields {', '.join(map(str, record)) or '(none)'}"
            raise DataError(f"a field {self.field!r} in {where}", got, "name the field that holds the text: --field")
        if not isinstance(record[self.field], str):
            got = type(record[self.field]).__name__
            raise DataError(f"text in the field {self.field!r} in {where}", got, "choose another --field")
        return record[self.field]

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"a parquet file at {path}", str(error).splitlines()[0], "write it again") from None
        with table:
            columns = table.schema_arrow.names
            if self.column not in columns:
                raise DataError(
                    f"a column {self.column!r} in {path}",
                    f"the columns {', '.join(columns)}",
                    "name the column that holds the text: --column",
                )
            kind = table.schema_arrow.field(self.column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"text in the column {self.column!r} of {path}", str(kind), "choose another --column")
            for batch in table.iter_batches(batch_size=256, columns=[self.column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
