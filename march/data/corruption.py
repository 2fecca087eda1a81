"""Span corruption (T5, Raffel et al. 2020, section 3.1.4), for a whole batch at once.

Legend: n rows, L raw length, S spans, Le encoder length, Ld decoder length.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from march.data import hashing
from march.data.errors import DataError

END_OF_TEXT = 0  # separator of documents, start token of the decoder, padding value
FIRST_SENTINEL = 100  # <extra_id_0>; they count downwards, <extra_id_99> is 1
NUM_SENTINELS = 100


@dataclass(frozen=True)
class Batch:
    """input_ids [n, Le], decoder_input_ids [n, Ld], labels [n, Ld], all int64; no padding, every position is real."""

    input_ids: np.ndarray
    decoder_input_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class SpanCorruption:
    """The shape of the task: how many of `sequence_length` tokens are noise, and in how many spans.

    noise_density is a share of the tokens in (0, 1), mean_span a number of tokens. Raises DataError when the
    arguments allow no draw, or need more than the vocabulary's 100 sentinels (one a span and one that closes).
    """

    sequence_length: int = 1024
    noise_density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self):
        if not 0.0 < self.noise_density < 1.0:
            raise DataError("noise_density between 0 and 1", str(self.noise_density), "use 0.15, the recipe's value")
        if not self.mean_span >= 1.0:
            raise DataError("mean_span of at least 1 token", str(self.mean_span), "use 3, the recipe's value")
        if self.num_noise < 1 or self.num_kept < 1 or self.num_spans > min(self.num_kept, self.num_noise):
            raise DataError(
                "a length with at least one kept and one noise token for every span",
                f"sequence_length {self.sequence_length}: {self.num_noise} noise tokens in {self.num_spans} spans, "
                f"{self.num_kept} kept",
                "use longer sequences, a noise_density nearer to 0.15, or longer spans",
            )
        if self.num_spans + 1 > NUM_SENTINELS:
            raise DataError(
                f"at most {NUM_SENTINELS} sentinels in a sequence",
                f"{self.num_spans + 1} (sequence_length {self.sequence_length}, noise_density {self.noise_density}, "
                f"mean_span {self.mean_span})",
                "use shorter sequences or a longer mean_span",
            )

    @cached_property
    def num_noise(self) -> int:
        return round(self.sequence_length * self.noise_density)

    @cached_property
    def num_kept(self) -> int:
        return self.sequence_length - self.num_noise

    @cached_property
    def num_spans(self) -> int:
        return max(1, round(self.num_noise / self.mean_span))

    @property
    def input_length(self) -> int:
        """Le: the kept tokens and a sentinel for every span."""
        return self.num_kept + self.num_spans

    @property
    def label_length(self) -> int:
        """Ld: the noise tokens, a sentinel before every span, and the closing one."""
        return self.num_noise + self.num_spans + 1

    def lengths(self, row_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Kept and noise span lengths, int64 [n, S] each, both uniform over the compositions of their totals.

        A composition of T into S positive parts is a choice of S - 1 of the T - 1 gaps between tokens.
        """
        gaps_kept, gaps_noise = self.num_kept - 1, self.num_noise - 1
        words = hashing.words(row_keys, gaps_kept + gaps_noise)
        kept = _composition(words[:, :gaps_kept], self.num_spans, self.num_kept)
        noise = _composition(words[:, gaps_kept:], self.num_spans, self.num_noise)
        return kept, noise

    def apply(self, tokens: np.ndarray, row_keys: np.ndarray) -> Batch:
        """Corrupt int64 tokens [n, L]; the draw of a row depends on its key (uint64 [n]) alone."""
        n, spans = len(tokens), self.num_spans
        kept, noise = self.lengths(row_keys)
        kept_ends, noise_ends = np.cumsum(kept, axis=1), np.cumsum(noise, axis=1)
        rows = np.arange(n)[:, None]

        # every change between kept and noise toggles; the running sum's parity then marks the noise
        toggles = np.zeros((n, self.sequence_length + 1), dtype=np.uint8)
        noise_starts = kept_ends + noise_ends - noise
        toggles[rows, noise_starts] = 1
        toggles[rows, noise_starts + noise] = 1
        is_noise = (np.cumsum(toggles[:, :-1], axis=1, dtype=np.uint8) & 1).astype(bool)

        sentinels = FIRST_SENTINEL - np.arange(spans + 1)
        spans_before = np.arange(spans)
        # sentinel s follows kept span s in the input, and precedes noise span s in the labels
        input_ids = _interleave(tokens[~is_noise], kept_ends + spans_before, sentinels[:-1], n, self.input_length)
        label_positions = np.concatenate(
            [noise_ends - noise + spans_before, np.full((n, 1), self.label_length - 1)], axis=1
        )
        labels = _interleave(tokens[is_noise], label_positions, sentinels, n, self.label_length)
        decoder_input_ids = np.empty_like(labels)
        decoder_input_ids[:, 0] = END_OF_TEXT
        decoder_input_ids[:, 1:] = labels[:, :-1]
        return Batch(input_ids, decoder_input_ids, labels)


def _composition(words: np.ndarray, parts: int, total: int) -> np.ndarray:
    """int64 [n, parts], positive, summing to total: cuts at the parts - 1 gaps whose random word is smallest."""
    n, gaps = words.shape
    ends = np.full((n, parts + 1), total, dtype=np.int64)
    ends[:, 0] = 0
    if parts > 1:
        # the gap's own number in the low bits makes ties impossible, at the price of 10 of 64 random bits
        bits = np.uint64(max(1, (gaps - 1).bit_length()))
        ordered = (words >> bits << bits) | np.arange(gaps, dtype=np.uint64)
        threshold = np.partition(ordered, parts - 2, axis=1)[:, parts - 2, None]
        ends[:, 1:-1] = np.nonzero(ordered <= threshold)[1].reshape(n, parts - 1) + 1
    return np.diff(ends, axis=1)


def _interleave(tokens: np.ndarray, positions: np.ndarray, sentinels: np.ndarray, n: int, length: int) -> np.ndarray:
    """int64 [n, length]: sentinels at their positions [n, s], the tokens (flat, row by row) everywhere else."""
    out = np.empty((n, length), dtype=np.int64)
    free = np.ones((n, length), dtype=bool)
    rows = np.arange(n)[:, None]
    out[rows, positions] = sentinels
    free[rows, positions] = False
    out[free] = tokens
    return out


class Examples:
    """A split seen as sequences of `corruption.sequence_length` tokens, corrupted when asked for.

    tokens: flat unsigned integers, usually `store.split(name)`; a rest shorter than a sequence is left out.
    The draw is a pure function of (seed, index, epoch), whatever else is in the batch.
    """

    def __init__(self, tokens: np.ndarray, corruption: SpanCorruption, seed: int = 42):
        count = tokens.size // corruption.sequence_length
        if count < 1:
            raise DataError(
                f"a split of at least one sequence ({corruption.sequence_length} tokens)",
                f"{tokens.size} tokens",
                "use shorter sequences or a larger corpus",
            )
        self.corruption, self.seed = corruption, seed
        self._rows = tokens[: count * corruption.sequence_length].reshape(count, corruption.sequence_length)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices, epochs=0) -> Batch:
        """Examples `indices` (int [n]) as drawn in `epochs` (int [n], or one number for all)."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        epochs = np.broadcast_to(np.asarray(epochs, dtype=np.int64), indices.shape)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise DataError(
                f"sequence indices from 0 to {len(self) - 1}",
                f"{indices.min()} to {indices.max()}",
                "take them from step_indices(..., size=len(examples), ...)",
            )
        tokens = self._rows[indices].astype(np.int64)
        return self.corruption.apply(tokens, hashing.keys(self.seed, indices, epochs))

    def label_unigram_entropy(self, n: int = 4096) -> float:
        """Entropy in nats of the unigram distribution of the real labels, sentinels included, of epoch 0.

        It is the loss of the best predictor that ignores every input: the line to beat in a plot of the loss.
        Taken over the first n sequences at most, so it is that of the sample, slightly below the truth.
        """
        counts = np.zeros(FIRST_SENTINEL + 1, dtype=np.int64)
        n = min(n, len(self))
        for start in range(0, n, 1024):
            labels = self.batch(np.arange(start, min(start + 1024, n))).labels
            counts = np.bincount(labels.reshape(-1), minlength=len(counts)) + np.pad(
                counts, (0, max(0, int(labels.max()) + 1 - len(counts)))
            )
        return entropy(counts)


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts (>= 0) are proportional to."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
