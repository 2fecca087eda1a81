"""Documents to test, validation and training files, in constant memory."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from march.data import hashing
from march.data.corruption import END_OF_TEXT
from march.data.errors import DataError

HELD_OUT = 1000 * 1024  # tokens each of test and validation: 1000 sequences of 1024
SMALL_SHARE = 0.05  # of a small corpus, where HELD_OUT would be more than this
_BUFFER = round(HELD_OUT / SMALL_SHARE)  # 20.5M tokens: a corpus that ends before is small
SMALLEST_SPLIT = 8  # tokens


class SplitWriter:
    """Takes the tokens of documents in order, each ended by END_OF_TEXT; writes test, validation and train.bin.

    A large corpus: the first 1000 sequences of 1024 tokens are test, the next 1000 validation, the rest training.
    A small one (under 20.48M tokens, of which 2000 sequences would be more than a tenth): whole documents, drawn by
    a fixed hash, up to 5% of the tokens each, and a part of the longest where no document is that short; it fits in
    memory (41 MB), so it is kept there until its end is known. What happened is what close() says.

    held_out: the share of the documents for test, and for validation. Then a hash of a document's text alone decides,
    so that it stays where it is when others come or go, and its copies with it.
    """

    def __init__(self, folder: Path, dtype: np.dtype, vocab_size: int, held_out: float | None = None):
        self._folder, self._dtype = folder, dtype
        self._held: list[np.ndarray] = []
        self._train: BinaryIO | None = None
        self._share = held_out
        self._open_document = hashlib.blake2b(digest_size=16)
        self._held_out: set[bytes] = set()  # documents of test and validation of a large corpus
        self._repeated = 0  # training documents among them
        self.counts = np.zeros(vocab_size, dtype=np.int64)  # of the training tokens
        self.tokens = {"test": 0, "validation": 0, "train": 0}

    def add(self, tokens: np.ndarray, digests: Sequence[bytes] = ()) -> None:
        """The next tokens; a document may go on in the next call. digests: hashes of the documents that end in them,
        which held_out wants."""
        if self._share is not None:
            self._held.append(tokens)
            if digests:
                self._write_by_hash(self._share, digests)
            elif sum(piece.size for piece in self._held) > _BUFFER:
                got, fix = "a longer one", "say what separates documents, or leave --held-out out"
                raise DataError(f"documents of at most {_BUFFER:,} tokens with --held-out", got, fix)
            return
        if self._train is not None:
            self._write_train(tokens)
            return
        self._held.append(tokens)
        if sum(piece.size for piece in self._held) >= _BUFFER:
            stream = np.concatenate(self._held)
            self._held = []
            self._write("test", stream[:HELD_OUT])
            self._write("validation", stream[HELD_OUT : 2 * HELD_OUT])
            self._held_out = set(self._digests(stream[: 2 * HELD_OUT]))
            self._open_train()
            self._write_train(stream[2 * HELD_OUT :])

    def close(self) -> str:
        """Writes what is left; returns how the corpus was split."""
        if self._share is not None:
            if empty := [name for name, count in self.tokens.items() if not count]:
                got = f"none in {' and '.join(empty)} of a share of {self._share:g}"
                raise DataError("documents in each split", got, "add text, or choose another --held-out")
            said = (
                f"{self._share:g} of the documents each are test and validation, by a hash of their text: "
                "{test:,} and {validation:,} tokens".format(**self.tokens)
            )
        elif self._train is None:
            said = self._split_small()
        else:
            said = "the first 1000 sequences of 1024 tokens are test, the next 1000 validation"
            if self._repeated:
                said += f"; {self._repeated:,} training documents are equal to one of these"
        assert self._train is not None
        self._train.close()
        return said

    def abandon(self) -> None:
        """Closes the open file after an error; what was written is of no use."""
        if self._train is not None:
            self._train.close()

    def _write_by_hash(self, share: float, digests: Sequence[bytes]) -> None:
        """The documents that are whole; the beginning of the next one is kept."""
        stream = np.concatenate(self._held)
        ends = np.flatnonzero(stream == END_OF_TEXT) + 1
        drawn = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])
        owner = np.repeat(np.minimum(drawn / share, 2).astype(int), np.diff(ends, prepend=0))
        whole, self._held = stream[: ends[-1]], [stream[ends[-1] :]]
        if self._train is None:
            self._write("test", stream[:0])
            self._write("validation", stream[:0])
            self._open_train()
        for number, split in enumerate(("test", "validation")):
            part = whole[owner == number]
            with (self._folder / f"{split}.bin").open("ab") as file:
                file.write(part.astype(self._dtype, copy=False).tobytes())
            self.tokens[split] += int(part.size)
        self._write_train(whole[owner == 2])

    def _split_small(self) -> str:
        stream = np.concatenate([*self._held, np.zeros(0, dtype=self._dtype)])
        lengths = np.diff(np.flatnonzero(stream == END_OF_TEXT), prepend=-1)
        if stream.size * SMALL_SHARE < SMALLEST_SPLIT:
            raise DataError(
                f"at least {round(SMALLEST_SPLIT / SMALL_SHARE)} tokens, for training, validation and test",
                f"{stream.size} in {len(lengths)} document(s)",
                "add text",
            )
        numbers: dict[bytes, int] = {}
        group = np.array([numbers.setdefault(digest, len(numbers)) for digest in self._digests(stream)])
        stream, lengths, chosen, cut = split_documents(stream, lengths, group)
        owner = np.repeat(chosen, lengths)
        self._open_train()
        self._write("test", stream[owner == 0])
        self._write("validation", stream[owner == 1])
        self._write_train(stream[owner == 2])
        parts = [f"{self.tokens[name] / stream.size:.1%} {name}" for name in ("test", "validation")]
        said = f"{' and '.join(parts)}, by document" + (
            f", the longest one divided for {' and '.join(cut)}" if cut else ""
        )
        repeated = len(group) - len(numbers)
        return said + (f"; {repeated:,} documents occur before, the copies of one are in one split" if repeated else "")

    def _digests(self, tokens: np.ndarray) -> Iterator[bytes]:
        """One for each document that ends in `tokens`."""
        for piece in np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT) + 1):
            self._open_document.update(piece.tobytes())
            if piece.size and piece[-1] == END_OF_TEXT:
                yield self._open_document.digest()
                self._open_document = hashlib.blake2b(digest_size=16)

    def _write(self, split: str, tokens: np.ndarray) -> None:
        tokens.astype(self._dtype, copy=False).tofile(self._folder / f"{split}.bin")
        self.tokens[split] = int(tokens.size)

    def _open_train(self) -> None:
        self._train = (self._folder / "train.bin").open("wb")

    def _write_train(self, tokens: np.ndarray) -> None:
        assert self._train is not None
        self._train.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.tokens["train"] += int(tokens.size)
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        if self._held_out:
            self._repeated += sum(digest in self._held_out for digest in self._digests(tokens))


def split_documents(
    stream: np.ndarray, lengths: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Divides documents of `lengths` (int64 [n]) in `stream`, equal ones having equal `group` numbers (int64 [n]).

    Returns the stream and the lengths, and for every document 0 (test), 1 (validation) or 2 (training); then the
    splits for which a document was divided, because those that fit were less than half of 5%: each copy of the longest
    gives its end, and gets an END_OF_TEXT before it.
    """
    room = int(stream.size * SMALL_SHARE)
    chosen = choose(np.bincount(group, weights=lengths).astype(np.int64), room)[group]
    cut = []
    for split, name in enumerate(("test", "validation")):
        missing = room - int(lengths[chosen == split].sum())
        if missing <= room // 2:
            continue
        left = chosen == 2
        longest = np.argmax(np.bincount(group[left], weights=lengths[left]))
        copies = np.flatnonzero(left & (group == longest))
        part = max(1, missing // len(copies))
        stream = np.insert(stream, np.cumsum(lengths)[copies] - part, END_OF_TEXT)
        lengths[copies] += 1 - part
        lengths, chosen = np.insert(lengths, copies + 1, part), np.insert(chosen, copies + 1, split)
        group = np.insert(group, copies + 1, longest)
        cut.append(name)
    return stream, lengths, chosen, cut


def choose(lengths: np.ndarray, room: int) -> np.ndarray:
    """For every document 0 (test), 1 (validation) or 2 (training), from the documents' lengths (int64 [n]).

    In an order drawn by a hash of the position, each document that still fits into `room` tokens is taken.
    """
    order = np.argsort(hashing.words(hashing.keys(0x73706C6974), len(lengths))[0], kind="stable")
    chosen = np.full(len(lengths), 2)
    for split in (0, 1):
        left = room
        for document in order:
            if chosen[document] == 2 and lengths[document] <= left:
                chosen[document] = split
                left -= int(lengths[document])
    return chosen
