"""Documents to test, validation and training files, in constant memory."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from march.data import hashing
from march.data.errors import DataError

HELD_OUT = 1000 * 1024  # tokens each of test and validation: 1000 sequences of 1024
SMALL_SHARE = 0.05  # of a small corpus, where HELD_OUT would be more than this
_BUFFER = round(HELD_OUT / SMALL_SHARE)  # 20.5M tokens: a corpus that ends before is small


class SplitWriter:
    """Takes encoded documents in order and writes test.bin, validation.bin and train.bin.

    A large corpus: the first 1000 sequences of 1024 tokens are test, the next 1000 validation, the rest training.
    A small one (under 20.48M tokens, of which 2000 sequences would be more than a tenth): whole documents, drawn by
    a fixed hash, up to 5% of the tokens each; it fits in memory (41 MB), so it is kept there until its end is known.
    """

    def __init__(self, folder: Path, dtype: np.dtype, vocab_size: int):
        self._folder, self._dtype = folder, dtype
        self._held: list[np.ndarray] = []
        self._held_tokens = 0
        self._lengths: list[np.ndarray] = []
        self._train: BinaryIO | None = None
        self.counts = np.zeros(vocab_size, dtype=np.int64)  # of the training tokens
        self.tokens = {"test": 0, "validation": 0, "train": 0}

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Documents of `lengths` tokens (int64 [n]), end of text included, one behind the other in `tokens`."""
        if self._train is not None:
            self._write_train(tokens)
            return
        self._held.append(tokens)
        self._lengths.append(lengths)
        self._held_tokens += tokens.size
        if self._held_tokens >= _BUFFER:
            stream = np.concatenate(self._held)
            self._held, self._lengths = [], []
            self._write("test", stream[:HELD_OUT])
            self._write("validation", stream[HELD_OUT : 2 * HELD_OUT])
            self._open_train()
            self._write_train(stream[2 * HELD_OUT :])

    def close(self) -> str:
        """Writes what is left; returns the rule by which the corpus was split."""
        if self._train is None:
            self._split_small()
            rule = "5% each of test and validation, by document"
        else:
            rule = "1000 sequences of 1024 tokens for test, the next 1000 for validation"
        assert self._train is not None
        self._train.close()
        return rule

    def abandon(self) -> None:
        """Closes the open file after an error; what was written is of no use."""
        if self._train is not None:
            self._train.close()

    def _split_small(self) -> None:
        lengths = np.concatenate([*self._lengths, np.zeros(0, dtype=np.int64)])
        if len(lengths) < 3:
            raise DataError(
                "at least 3 documents, to have some for training, validation and test",
                f"{len(lengths)} with text in them",
                "add documents, or say what separates them, as in --separator '\\n\\n'",
            )
        chosen = choose(lengths)
        stream = np.concatenate(self._held)
        owner = np.repeat(chosen, lengths)
        self._open_train()
        self._write("test", stream[owner == 0])
        self._write("validation", stream[owner == 1])
        self._write_train(stream[owner == 2])

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


def choose(lengths: np.ndarray) -> np.ndarray:
    """For every document 0 (test), 1 (validation) or 2 (training), from the documents' lengths (int64 [n], n >= 3).

    In an order drawn by a hash of the position, each document that still fits into 5% of the tokens is taken; where
    none fits, the shortest that is left.
    """
    order = np.argsort(hashing.words(hashing.keys(0x73706C6974), len(lengths))[0], kind="stable")
    chosen = np.full(len(lengths), 2)
    for split in (0, 1):
        room = int(lengths.sum() * SMALL_SHARE)
        for document in order:
            others = (chosen == 2).sum() - 1
            if chosen[document] == 2 and lengths[document] <= room and others >= 2 - split:  # something for the rest
                chosen[document] = split
                room -= int(lengths[document])
        if not (chosen == split).any():
            left = np.flatnonzero(chosen == 2)
            chosen[left[np.argmin(lengths[left])]] = split
    return chosen
