"""From a corpus to a store: vocabulary, tokens, splits, manifest; all of it or nothing."""

import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from march.console import escaped
from march.data import store as stores
from march.data import vocabulary
from march.data.corpora import Corpus, open_corpus
from march.data.corruption import END_OF_TEXT, entropy
from march.data.errors import DataError
from march.data.progress import bar
from march.data.splits import SplitWriter
from march.data.store import TokenDataset


def load_or_prepare(
    source: str = "excerpt",
    directory: Path | str = Path("data"),
    vocab_size: int | None = None,
    *,
    force: bool = False,
    **source_options: Any,
) -> TokenDataset:
    """Opens the store of that source below `directory`, after preparing it if it is not there.

    vocab_size: None for the source's own. force: prepare again and replace what is there. The options are those of
    march.data.corpora: held_out of all; files: files, field, column, separator, encoding; wikipedia: snapshot, dataset,
    limit; huggingface: dataset, config, split, revision, column, limit.
    Only the caller's process prepares; another one that wants the same store waits for it, with a message. A store
    that is damaged or stale is refused with DataError, never replaced unasked.
    """
    corpus = open_corpus(source, **source_options)
    if vocab_size is not None:
        vocabulary.check_size(vocab_size)
    directory = Path(directory)
    path = location(corpus, directory, vocab_size)
    if not force and (path / stores.MANIFEST).exists():
        return _open(path, corpus, vocab_size)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f".{path.name}.lock", path):
            if force or not (path / stores.MANIFEST).exists():
                _prepare(corpus, path, vocab_size)
            return _open(path, corpus, vocab_size)
    except OSError as error:
        got = f"{type(error).__name__}: {error}"
        raise DataError(
            f"to be able to read the corpus and to write to {directory}", got, "check space and rights, or --data-dir"
        ) from error


def location(corpus: Corpus, directory: Path, vocab_size: int | None) -> Path:
    """The folder of that store."""
    held_out = "" if corpus.held_out is None else f"-held-out-{corpus.held_out:g}"
    return directory / f"{corpus.name}{held_out}-v{requested(corpus, vocab_size)}"


def requested(corpus: Corpus, vocab_size: int | None) -> str:
    """The vocabulary's size, or "auto" where the text decides it."""
    if vocab_size is None:
        return str(corpus.vocab_size) if corpus.fill_vocabulary else "auto"
    return str(vocab_size)


def _open(path: Path, corpus: Corpus, vocab_size: int | None) -> TokenDataset:
    """The store, if it was made from this corpus as it is now."""
    found = TokenDataset(path)
    wanted = {**_identity(corpus), "vocabulary": requested(corpus, vocab_size)}
    have = {**found.manifest["source"], "vocabulary": found.manifest["vocabulary"]["requested"]}
    for key in wanted:
        # through JSON, which is how the manifest has it: tuples are lists there
        if have.get(key) != (value := json.loads(json.dumps(wanted[key]))):
            raise DataError(
                f"the source's {key} {_short(value)} in the store {path}",
                f"{_short(have.get(key))}: it is stale",
                f"prepare it again with {command(corpus, vocab_size, path.parent)} --force",
            )
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _identity(corpus: Corpus) -> dict[str, Any]:
    return {"name": corpus.source, "options": corpus.options(), "fingerprint": corpus.fingerprint()}


@contextmanager
def _lock(file: Path, path: Path) -> Iterator[None]:
    """Holds the lock for its body; the operating system frees it when its owner dies."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process prepares {path}: waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(corpus: Corpus, path: Path, vocab_size: int | None) -> None:
    """Builds in a folder beside `path` and renames it at the end: a killed run leaves nothing that looks finished."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run: the lock is ours, so nobody works in it
    partial.mkdir()
    try:
        _build(corpus, partial, path, vocab_size)
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build(corpus: Corpus, folder: Path, final: Path, vocab_size: int | None) -> None:
    started = time.perf_counter()
    identity = _identity(corpus)
    tokenizer = _train(corpus, vocab_size)
    size = tokenizer.get_vocab_size()
    (folder / stores.TOKENIZER).write_text(tokenizer.to_str(pretty=True), "utf-8")
    dtype = np.dtype("<u2" if size <= 65_535 else "<u4")
    writer = SplitWriter(folder, dtype, size, corpus.held_out)
    documents = characters = 0
    try:
        with bar("tokenising", corpus.count(), unit="doc") as progress:
            for tokens, count, digests in _encoded(tokenizer, corpus.documents(), dtype):
                writer.add(tokens, digests)
                documents, characters = documents + len(digests), characters + count
                progress.set_postfix_str(f"{characters / 1e6:,.0f}M characters")
                progress.update(len(digests))
        rule = writer.close()
    finally:
        writer.abandon()
    (folder / "ATTRIBUTION.txt").write_text(corpus.attribution(), "utf-8", errors="backslashreplace")
    if corpus.fingerprint() != identity["fingerprint"]:
        raise DataError("files that stay as they are", "a change while they were read", "prepare again when it is done")
    names = [stores.TOKENIZER, "ATTRIBUTION.txt", *(f"{split}.bin" for split in stores.SPLITS)]
    manifest = {
        "format": stores.FORMAT,
        "source": identity,
        "note": corpus.note,
        "folder": str(final.absolute()),
        "command": command(corpus, vocab_size),
        "vocabulary": {"size": size, "requested": requested(corpus, vocab_size)},
        "dtype": dtype.str,
        "documents": documents,
        "characters": characters,
        "tokens": writer.tokens,
        "splits": rule,
        "unigram_entropy": entropy(writer.counts),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": stores.sha256(folder / name)} for name in names
        },
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "numpy")},
        "seconds": round(time.perf_counter() - started, 1),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    stats = {name: (folder / name).stat() for name in names}
    stores.remember_checked(folder, {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()})
    stores.write_manifest(folder, manifest)


def _train(corpus: Corpus, vocab_size: int | None) -> Tokenizer:
    size = corpus.vocab_size if vocab_size is None else vocab_size
    own_rule = vocab_size is None and not corpus.fill_vocabulary
    with bar("reading for the vocabulary", corpus.sample_count(), unit="doc") as progress:
        texts = _Watched(corpus.sample(), progress)
        tokenizer = vocabulary.train(texts, size, corpus.min_frequency if vocab_size is None else 2)
    if not texts.found:
        raise DataError("a corpus with text in it", "none", "check the source and its options")
    if tokenizer.get_vocab_size() < size and not own_rule:
        raise DataError(
            f"a corpus that fills a vocabulary of {size:,}",
            f"text for {tokenizer.get_vocab_size():,} tokens (no other pair occurs twice)",
            f"choose --vocab-size {tokenizer.get_vocab_size()} or a larger corpus",
        )
    return tokenizer


class _Watched:
    """Texts on their way to the trainer: moves a progress bar, and knows whether there was any text."""

    def __init__(self, texts: Iterable[str | Iterable[str]], progress: Any):
        self._texts, self._progress, self.found = texts, progress, False

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            for piece in vocabulary.pieces(text):
                self.found = self.found or bool(piece.strip())
                yield piece
            self._progress.update(1)


_Piece = tuple[str, bytes | None]  # of a document, and with its last one the hash of the whole
_Encoded = tuple[np.ndarray, int, list[bytes]]


def _encoded(tokenizer: Tokenizer, texts: Iterable[str | Iterable[str]], dtype: np.dtype) -> Iterator[_Encoded]:
    """Tokens, the number of characters, and the hashes of the documents that end, of one batch after another, in order;
    documents end with END_OF_TEXT.

    The tokenizer uses all cores inside a batch (RAYON_NUM_THREADS sets how many); three batches at a time keep
    them busy while Python turns a finished one into an array. Memory stays that of three batches and a document.
    """
    with ThreadPoolExecutor(max_workers=3) as pool:
        running: deque[Future] = deque()
        for batch in _batches(texts):
            running.append(pool.submit(_encode, tokenizer, batch, dtype))
            if len(running) == 3:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _encode(tokenizer: Tokenizer, batch: list[_Piece], dtype: np.dtype) -> _Encoded:
    encodings = tokenizer.encode_batch_fast([text for text, _ in batch])
    tokens = [
        np.array(encoding.ids + [END_OF_TEXT] * (digest is not None), dtype=dtype)
        for encoding, (_, digest) in zip(encodings, batch, strict=True)
    ]
    ended = [digest for _, digest in batch if digest is not None]
    return np.concatenate(tokens), sum(len(text) for text, _ in batch), ended


def _batches(texts: Iterable[str | Iterable[str]]) -> Iterator[list[_Piece]]:
    """Pieces of about vocabulary.PIECE characters together; texts without a visible character are left out."""
    batch: list[_Piece] = []
    size = 0
    for text in texts:
        digest = hashlib.blake2b(digest_size=16)
        waiting: deque[str] = deque()  # for a visible character
        visible = False
        for piece, after in pairwise(chain(vocabulary.pieces(text), [None])):
            assert piece is not None
            digest.update(piece.encode("utf-8", "surrogatepass"))
            waiting.append(piece)
            visible = visible or bool(piece.strip())
            while visible and waiting:
                part = waiting.popleft()
                batch.append((part, digest.digest() if after is None and not waiting else None))
                size += len(part)
                if size >= vocabulary.PIECE:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


def command(corpus: Corpus, vocab_size: int | None, directory: Path | None = None) -> str:
    """The command line that prepares this store, in `directory` where it is given."""
    words = ["python", "-m", "march.data", "prepare", "--source", corpus.source]
    if vocab_size is not None:
        words += ["--vocab-size", str(vocab_size)]
    defaults = {key: field.default for key, field in type(corpus).__dataclass_fields__.items()}
    for key, value in corpus.options().items():
        if value is None or value == defaults.get(key):
            continue
        # escapes as the command line takes them, so that it stays one line
        values = value if isinstance(value, list) else [escaped(value) if key == "separator" else str(value)]
        words += [f"--{key.replace('_', '-')}", *values]
    return shlex.join([*words, *(["--data-dir", str(directory)] if directory else [])])
