"""Byte-level BPE with march's reserved ids.

Ids: `</s>` 0, `<extra_id_99>` ... `<extra_id_0>` 1 ... 100, the digits 0 ... 9 at 101 ... 110, then the 246 other
bytes, then the merges. Byte level because its round trip is exact: every text has a token sequence, decoding gives the
text back to the byte, and there is no unknown token. No normalisation and no added leading space, for the same reason.

An article that spells out "</s>" or "<extra_id_3>" means those characters. The control tokens are therefore entries of
the vocabulary and nothing else: not `added_tokens`, which `tokenizers` looks for in every text unless a flag says
otherwise that neither its file format nor pickle carries. No merge leads to them either, since a word of the
pre-tokenizer holds letters, digits or other characters, never two of the three.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from march.data.errors import DataError

CONTROL_TOKENS = ["</s>", *(f"<extra_id_{i}>" for i in reversed(range(100)))]
DIGITS = list("0123456789")
RESERVED = [*CONTROL_TOKENS, *DIGITS]
SMALLEST = len(RESERVED) + 256 - len(DIGITS)  # 357: every byte has a token


# Words longer than this are cut: one word of n letters costs the trainer n^2 (65,536 letters: 2 s). The longest word of
# the excerpt has 28.
LONGEST_WORD = 256
LARGEST = 2**20  # tokens; the trainer sets their room aside at once
# GPT-2's expression, with a bound to its repetitions
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+".replace(
    "+", f"{{1,{LONGEST_WORD}}}"
)
_CUT = rf"\p{{L}}{{{LONGEST_WORD},}}|[^\s\p{{L}}\p{{N}}]{{{LONGEST_WORD},}}|\s{{{LONGEST_WORD},}}"
# What a tokenizer is given at once, in characters: 0.15 s of one core, 10 MB with its token objects
PIECE = 2**20
_END_OF_WORD = re.compile(r"[!-~](?=[ \n])")


def train(texts: Iterable[str | Iterable[str]], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """A tokenizer of at most vocab_size tokens; fewer when no pair is left that occurs min_frequency times."""
    check_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    # every digit is a word of its own, so no merge crosses or joins digits
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=sys.stderr.isatty(),
        special_tokens=RESERVED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = tokenizer.pre_tokenizer
    # what was cut is no word: 50 MB of letters in a row would be 200,000 of them, and minutes of the trainer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_CUT), "removed"), words])
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer=trainer)
    tokenizer.pre_tokenizer = words
    found = [tokenizer.token_to_id(token) for token in RESERVED]
    assert found == list(range(len(RESERVED))), found
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))


def pieces(text: str | Iterable[str]) -> Iterator[str]:
    """`text`, or what its parts make, in pieces of at most PIECE characters, cut between words: the tokens of all are
    those of the whole.

    A word that goes on for longer is cut where the piece is full.
    """
    rest = ""
    for part in (text,) if isinstance(text, str) else text:
        whole, start = rest + part, 0
        while len(whole) - start > PIECE:
            end = start + PIECE
            for tail in (2**12, PIECE):  # the last end of a word is nearly always close
                if found := list(_END_OF_WORD.finditer(whole, max(start, end - tail), end)):
                    end = found[-1].end()
                    break
            yield whole[start:end]
            start = end
        rest = whole[start:]
    yield rest


def check_size(vocab_size: int) -> None:
    """DataError for a vocabulary that has no room for the reserved tokens and every byte, or that none can fill."""
    if not SMALLEST <= vocab_size <= LARGEST:
        raise DataError(
            f"a vocabulary of at least {SMALLEST} tokens ({len(RESERVED)} reserved, every byte) and at most {LARGEST}",
            str(vocab_size)[:40],
            f"choose --vocab-size {SMALLEST if vocab_size < SMALLEST else LARGEST}, or one between",
        )


def load(path: Path) -> Tokenizer:
    """The tokenizer of a store."""
    return Tokenizer.from_str(path.read_text("utf-8"))
