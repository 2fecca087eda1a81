"""Byte-level BPE with march's reserved ids.

Ids: `</s>` 0, `<extra_id_99>` ... `<extra_id_0>` 1 ... 100, the digits 0 ... 9 at 101 ... 110, then the 246 other
bytes, then the merges. Byte level because its round trip is exact: every text has a token sequence, decoding gives the
text back to the byte, and there is no unknown token. No normalisation and no added leading space, for the same reason.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from march.data.errors import DataError

CONTROL_TOKENS = ["</s>", *(f"<extra_id_{i}>" for i in reversed(range(100)))]
DIGITS = list("0123456789")
RESERVED = [*CONTROL_TOKENS, *DIGITS]
SMALLEST = len(RESERVED) + 256 - len(DIGITS)  # 357: every byte has a token


def train(texts: Iterable[str], vocab_size: int, min_frequency: int = 2, length: int | None = None) -> Tokenizer:
    """A tokenizer of at most vocab_size tokens; fewer when no pair is left that occurs min_frequency times.

    `length`, the number of texts, is only for the progress bar, which a terminal on stderr gets.
    """
    check_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    # every digit is a word of its own, so no merge crosses or joins digits
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=sys.stderr.isatty(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in RESERVED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=length)
    found = [tokenizer.token_to_id(token) for token in RESERVED]
    assert found == list(range(len(RESERVED))), found
    # Reserved ids for digits, but not hidden ones: `special` would make decode() drop every number by default.
    tokenizer.add_tokens([AddedToken(digit, normalized=False, special=False) for digit in DIGITS])
    return _guard(Tokenizer.from_str(tokenizer.to_str()))  # without the detour the digits stay special until saved


def check_size(vocab_size: int) -> None:
    """DataError for a vocabulary that has no room for the reserved tokens and every byte."""
    if vocab_size < SMALLEST:
        raise DataError(
            f"a vocabulary of at least {SMALLEST} tokens ({len(RESERVED)} reserved, and every byte)",
            str(vocab_size),
            f"choose --vocab-size {SMALLEST} or more",
        )


def load(path: Path) -> Tokenizer:
    """The tokenizer of a store, with the guard that the file format cannot carry."""
    return _guard(Tokenizer.from_file(str(path)))


def _guard(tokenizer: Tokenizer) -> Tokenizer:
    # an article that spells out "</s>" or "<extra_id_3>" means those characters, not the control token
    tokenizer.encode_special_tokens = True
    return tokenizer
