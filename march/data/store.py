"""The prepared corpus: a folder of token files, a tokenizer and a manifest that vouches for them."""

import hashlib
import json
import shlex
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from march.data import vocabulary
from march.data.errors import DataError
from march.data.progress import bar

# counted upwards whenever the layout or the meaning of a file changes; other numbers are refused as stale
FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CHECKED = "checked.json"
SPLITS = ("train", "validation", "test")
# up to here a file is hashed at every opening (0.05 s); above, once for every (size, time of change)
ALWAYS_HASHED = 64 * 2**20


class TokenDataset:
    """A prepared corpus, opened read-only. Raises DataError, with what to do, when it is damaged or stale.

    Attributes: path; manifest (dict, see docs/data.md).
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self._check(always=False)

    @property
    def vocab_size(self) -> int:
        """The number of token ids, reserved ones included."""
        return self.manifest["vocabulary"]["size"]

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the unigram distribution of the training tokens, separators included, in nats a token.

        Of raw tokens; the line for a span corruption loss is Examples.label_unigram_entropy, sentinels included.
        """
        return self.manifest["unigram_entropy"]

    def split(self, name: str) -> np.memmap:
        """All tokens of "train", "validation" or "test": flat, read-only, uint16 (uint32 above 65,535 tokens)."""
        if name not in SPLITS:
            raise DataError(f"a split of {', '.join(SPLITS)}", repr(name), "choose one of them")
        return np.memmap(self.path / f"{name}.bin", dtype=np.dtype(self.manifest["dtype"]), mode="r")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of these tokens. Text that spells out a control token is encoded as characters."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return vocabulary.load(self.path / TOKENIZER)

    def verify(self) -> None:
        """Reads every file in full and compares its hash; DataError when one differs."""
        self._check(always=True)

    def _check(self, always: bool) -> None:
        checked = _read_checked(self.path)
        fresh: dict[str, list[int]] = {}
        for name, expected in self.manifest["files"].items():
            path = self.path / name
            if not path.is_file():
                raise _damaged(self.path, f"the file {name}", "none", self.manifest)
            stat = path.stat()
            if stat.st_size != expected["bytes"]:
                got = f"{stat.st_size:,} bytes"
                raise _damaged(self.path, f"{name} of {expected['bytes']:,} bytes", got, self.manifest)
            seen = [stat.st_size, stat.st_mtime_ns]
            needed = always or stat.st_size <= ALWAYS_HASHED or checked.get(name) != seen
            if needed and (found := sha256(path)) != expected["sha256"]:
                wanted = f"{name} with sha256 {expected['sha256'][:12]}..."
                raise _damaged(self.path, wanted, f"{found[:12]}..., so its bytes changed", self.manifest)
            fresh[name] = seen
        if fresh != checked:
            remember_checked(self.path, fresh)

    def __repr__(self) -> str:
        return f"TokenDataset({str(self.path)!r}, vocab_size={self.vocab_size})"


def sha256(path: Path) -> str:
    """Hexadecimal hash of a file, with a progress bar for a long one."""
    digest = hashlib.sha256()
    with (
        path.open("rb") as stream,
        bar(f"checking {path.name}", path.stat().st_size, unit="B", least=2**30) as progress,
    ):
        while piece := stream.read(2**22):
            digest.update(piece)
            progress.update(len(piece))
    return digest.hexdigest()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with a digest of itself, so that a flipped bit in it is noticed too."""
    text = json.dumps({**manifest, "digest": digest(manifest)}, indent=1, sort_keys=True)
    (path / MANIFEST).write_text(text + "\n", encoding="utf-8")


def remember_checked(path: Path, seen: dict[str, list[int]]) -> None:
    """Notes the size and time of change at which hashes were right; a store that cannot be written to goes without."""
    try:
        (path / CHECKED).write_text(json.dumps(seen), encoding="utf-8")
    except OSError:
        return


def _read_checked(path: Path) -> dict[str, list[int]]:
    try:
        return json.loads((path / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # only a saving of time: without it the files are hashed
        return {}


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        got = "no manifest in it" if path.is_dir() else "no such folder"
        raise DataError(
            f"a prepared store at {path}", got, "run python -m march.data prepare, or info for those there are"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        written = manifest.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _damaged(path, f"a readable {MANIFEST}", "one that is not", {}) from None
    if written != digest(manifest):
        raise _damaged(path, f"{MANIFEST} as it was written", "changed text", {})
    if manifest["format"] != FORMAT:
        got = f"format {manifest['format']}: it is stale"
        raise DataError(f"store format {FORMAT} in the store {path}", got, _again(path, manifest))
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, expected: str, got: str, manifest: dict[str, Any]) -> DataError:
    return DataError(f"{expected} in the store {path}", f"{got}: the store is damaged", _again(path, manifest))


def _again(path: Path, manifest: dict[str, Any]) -> str:
    """What mends the store at `path`, which may be a copy of another one or renamed."""
    if "folder" not in manifest:
        return f"delete {path} and run python -m march.data prepare with its options again"
    original, command = Path(manifest["folder"]), manifest["command"]
    again = f"{command} --data-dir {shlex.quote(str(path.parent))}"
    if path.absolute() == original:
        return f"prepare it again with {again} --force"
    copy = f"copy it again from {original}, or " if (original / MANIFEST).exists() else ""
    if path.name == original.name:
        return f"{copy}prepare it again with {again} --force"
    return f"{copy}prepare {path.parent / original.name} with {again}, and delete this one"


def stores_in(directory: Path) -> Iterator[Path]:
    """The finished stores in a folder, by name."""
    yield from sorted(path.parent for path in directory.glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))
