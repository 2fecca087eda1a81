"""A user's own text: plain files, JSON lines, parquet."""

import codecs
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from march.data.corpora.base import Corpus
from march.data.errors import DataError

_KINDS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
LARGEST_DOCUMENT = 256 * 2**20  # characters between separators, or of a line of JSON: they are held in memory
LARGEST_TEXT = 16 * 2**20  # bytes of a file that is one document; a larger one is read in parts
_PARQUET_BYTES = 64 * 2**20  # of a column, read at once


@dataclass(frozen=True)
class Files(Corpus):
    """files: glob patterns, absolute ones from here on. The kind follows from the ending: .txt .text .md, .jsonl
    .ndjson, .parquet.

    field: of JSON lines; column: of parquet; separator: splits a text file into documents (a file is one document
    without it), a line break in it is one of the file's kind; encoding: of text files and JSON lines.

    Up to 30,000 tokens, of pairs seen 40 times at least: by that rule the embedded excerpt, 2.8M characters, would get
    4,326.
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
        super().__post_init__()
        patterns = (self.files,) if isinstance(self.files, str) else tuple(map(str, self.files))
        if not all(patterns) or not patterns:
            raise DataError("at least one file or pattern", "none", "name them, as in --files 'texts/*.txt'")
        # the same files from another folder are the same source, and the command that a store records works anywhere
        object.__setattr__(self, "files", tuple(map(os.path.abspath, patterns)))
        try:
            if not isinstance("".encode(self.encoding), bytes):
                raise LookupError
            codecs.getincrementaldecoder(self.encoding)
        except (LookupError, ValueError):
            raise DataError(
                "an encoding that Python knows", repr(self.encoding), "use --encoding utf-8, or latin-1"
            ) from None
        if self.separator == "":
            raise DataError("a separator of at least one character", "an empty one", "leave --separator out")

    @property
    def name(self) -> str:
        return f"files-{self.digest(self.options())}"

    def paths(self) -> list[Path]:
        """The files, sorted, each once; DataError when a pattern matches none or an ending is unknown."""
        found: dict[tuple[int, int], Path] = {}
        for pattern in self.files:
            matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
            files = [path for path in matches if path.is_file()]
            if not files:
                here = matches[0] if matches else Path(pattern)
                got = "a folder" if here.is_dir() else "no such file" if not here.exists() else "a pipe or device"
                fix = f"name its files, as in --files '{pattern}/*.txt'" if "folder" in got else "correct --files"
                raise DataError(f"a file at {pattern!r}", got, f"{fix}; patterns need quotes")
            for path in sorted(files):
                if path.suffix.lower() not in _KINDS:
                    raise DataError(
                        f"a file ending in {' '.join(_KINDS)}", str(path), "rename or convert it, or narrow --files"
                    )
                stat = path.stat()
                found.setdefault((stat.st_dev, stat.st_ino), path)  # a link to a file is that file
        return sorted(found.values())

    def fingerprint(self) -> dict[str, Any]:
        # times rather than contents: a touched file costs a new preparation, a missed edit would cost a wrong run
        stats = [(str(path), path.stat()) for path in self.paths()]
        return {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]}

    def documents(self) -> Iterator[str | Iterable[str]]:
        for path in self.paths():
            kind = _KINDS[path.suffix.lower()]
            if kind == "text" and self.separator is not None:
                yield from (text for _, text in self._parts(path, self.separator))
            elif kind == "text":
                yield self._pieces(path) if path.stat().st_size > LARGEST_TEXT else "".join(self._pieces(path))
            elif kind == "json":
                yield from self._json_lines(path)
            else:
                yield from self._parquet(path)

    def attribution(self) -> str:
        return "The tokens beside this file were made from:\n" + "".join(f"{path}\n" for path in self.paths())

    def _parts(self, path: Path, separator: str) -> Iterator[tuple[int, str]]:
        """What stands between separators, counted from 1."""
        # where the separator has LF, a file's CR LF is one too
        pattern = re.compile(re.escape(separator).replace("\\\n", "\r?\n"))
        rest, number = "", 0
        for piece in self._pieces(path):
            *done, rest = pattern.split(rest + piece)
            for part in done:
                number += 1
                yield number, part
            if len(rest) > LARGEST_DOCUMENT:
                where = f"{path} from document {number + 1} on" if number else str(path)
                fix = f"it has no {separator!r} there: correct the separator or divide the file"
                raise DataError(f"documents of at most {LARGEST_DOCUMENT >> 20} MiB", f"a longer one in {where}", fix)
        yield number + 1, rest

    def _pieces(self, path: Path) -> Iterator[str]:
        """The text of a file, 4 MiB at a time; a byte order mark is no text."""
        encoding = "utf-8-sig" if codecs.lookup(self.encoding).name == "utf-8" else self.encoding
        decoder = codecs.getincrementaldecoder(encoding)()
        lines = 1
        try:
            with path.open("rb") as stream:
                while read := stream.read(4 * 2**20):
                    piece = decoder.decode(read)
                    if (nul := piece.find("\0")) >= 0:
                        where = f"line {lines + piece.count(chr(10), 0, nul)} of {path}"
                        fix = "remove it, or name the file's encoding, as in --encoding utf-16"
                        raise DataError(f"text in {where}", "a NUL character", fix)
                    yield piece
                    lines += piece.count("\n")
                yield decoder.decode(b"", final=True)
        except UnicodeError as error:
            got = str(error)
            if isinstance(error, UnicodeDecodeError):
                lines += error.object[: error.start].decode(self.encoding, "replace").count("\n")
                got = f"byte 0x{error.object[error.start]:02x} that is none"
            raise DataError(
                f"{self.encoding} text in line {lines} of {path}",
                got,
                "name the file's encoding, as in --encoding latin-1, or convert it",
            ) from None

    def _json_lines(self, path: Path) -> Iterator[str]:
        for number, line in self._parts(path, "\n"):
            if line.strip():
                yield self._record(f"line {number} of {path}", line)

    def _record(self, where: str, line: str) -> str:
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            got = f"{error.msg} at column {error.colno}"
            raise DataError(f"a JSON object in {where}", got, "correct the line") from None
        except RecursionError:
            raise DataError(f"a JSON object in {where}", "one too deeply nested", "correct the line") from None
        except ValueError as error:  # of an integer with thousands of digits, or a constant
            raise DataError(f"a JSON object in {where}", str(error).split(";")[0], "correct the line") from None
        if not isinstance(record, dict):
            raise DataError(f"a JSON object in {where}", type(record).__name__, "write one object a line")
        if self.field not in record:
            got = f"the fields {_listed(record)}"
            raise DataError(f"a field {self.field!r} in {where}", got, "name the field that holds the text: --field")
        text = record[self.field]
        if not isinstance(text, str):
            raise DataError(
                f"text in the field {self.field!r} in {where}", type(text).__name__, "choose another --field"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text in the field {self.field!r} in {where}",
                f"half of a surrogate pair, \\u{ord(text[error.start]):04x}",
                "correct the line",
            ) from None
        return text

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                columns = table.schema_arrow.names
                if self.column not in columns:
                    raise DataError(
                        f"a column {self.column!r} in {path}",
                        f"the columns {_listed(columns)}",
                        "name the column that holds the text: --column",
                    )
                kind = table.schema_arrow.field(self.column).type
                if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                    got = str(kind)[:100]
                    raise DataError(f"text in the column {self.column!r} of {path}", got, "choose another --column")
                sizes = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
                largest = max((group.total_byte_size // max(1, group.num_rows) for group in sizes), default=0)
                rows = max(1, min(256, _PARQUET_BYTES // max(1, largest)))
                for batch in table.iter_batches(batch_size=rows, columns=[self.column]):
                    for text in batch.column(0):
                        row += 1
                        if not text.is_valid:
                            raise DataError(f"text in row {row} of {path}", "null", "leave out the rows without text")
                        yield text.as_py()
        except DataError:
            raise
        except UnicodeDecodeError:
            raise DataError(f"utf-8 text in row {row} of {path}", "bytes that are none", "write it again") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"a parquet file at {path}", (str(error).splitlines() or [type(error).__name__])[0], "write it again"
            ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")


def _listed(names: Iterable[str]) -> str:
    text = ", ".join(names) or "(none)"
    return text if len(text) <= 160 else text[:157] + "..."
