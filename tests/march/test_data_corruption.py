"""Span corruption: lengths, shares, restoration, and that a draw depends on (seed, index, epoch) alone."""

import hashlib
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from march.data import DataError, Examples, SpanCorruption, hashing
from march.data.corruption import _composition, entropy

PAPER = SpanCorruption()


def tokens_for(count: int, sequence_length: int = 1024, seed: int = 0, low: int = 0) -> np.ndarray:
    """Random text tokens: 0 (end of text) now and then, no sentinels."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(101, 4096, size=count * sequence_length)
    tokens[generator.random(tokens.size) < 0.02] = low
    return tokens.astype(np.uint16)


def restore(input_ids: np.ndarray, labels: np.ndarray) -> list[int]:
    """The raw sequence from one row, written as a reader would: replace each sentinel by what its label says."""
    spans: dict[int, list[int]] = {}
    current = None
    for token in labels.tolist():
        if 1 <= token <= 100:
            assert token not in spans
            current = spans.setdefault(token, [])
        else:
            assert current is not None, "labels start with a sentinel"
            current.append(token)
    out: list[int] = []
    for token in input_ids.tolist():
        out.extend(spans[token] if 1 <= token <= 100 else [token])
    return out


@st.composite
def tasks(draw) -> SpanCorruption:
    try:
        return SpanCorruption(
            draw(st.integers(4, 400)),
            draw(st.sampled_from([0.05, 0.15, 0.3, 0.5])),
            draw(st.sampled_from([1.0, 2.5, 3.0])),
        )
    except ValueError:
        assume(False)
        raise


def test_the_recipe_has_921_inputs_and_206_labels():
    assert (PAPER.num_noise, PAPER.num_spans, PAPER.input_length, PAPER.label_length) == (154, 51, 921, 206)
    batch = Examples(tokens_for(3), PAPER).batch([0, 2, 1], [0, 1, 2])
    assert batch.input_ids.shape == (3, 921)
    assert batch.labels.shape == batch.decoder_input_ids.shape == (3, 206)
    assert {array.dtype for array in (batch.input_ids, batch.labels, batch.decoder_input_ids)} == {np.dtype(np.int64)}
    # the closing sentinel is <extra_id_51>, id 100 - 51
    assert (batch.labels[:, 0] == 100).all()
    assert (batch.labels[:, -1] == 49).all()
    # kept text comes first
    assert (batch.input_ids[:, 0] == tokens_for(3).reshape(3, 1024)[[0, 2, 1], 0]).all()


@settings(max_examples=60, deadline=None)
@given(tasks(), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_any_task_restores_and_keeps_its_shares(task, seed, epoch):
    tokens = tokens_for(4, task.sequence_length, seed=task.sequence_length)
    batch = Examples(tokens, task, seed).batch(np.arange(4), epoch)
    rows = tokens.reshape(4, -1).astype(int)
    noise = task.num_noise
    assert abs(noise - task.sequence_length * task.noise_density) <= 0.5
    assert task.num_spans == max(1, round(noise / task.mean_span))
    for row in range(4):
        inputs, labels = batch.input_ids[row], batch.labels[row]
        assert len(inputs) == task.input_length
        assert len(labels) == task.label_length
        assert restore(inputs, labels) == rows[row].tolist()
        in_inputs = inputs[(inputs >= 1) & (inputs <= 100)]
        in_labels = labels[(labels >= 1) & (labels <= 100)]
        assert in_inputs.tolist() == [100 - s for s in range(task.num_spans)]
        assert in_labels.tolist() == [100 - s for s in range(task.num_spans + 1)]
        assert ((labels == 0) | (labels > 100)).sum() == noise
        # no two sentinels meet: every span, kept or noise, has at least one token
        for sequence in (inputs, labels):
            sentinel = (sequence >= 1) & (sequence <= 100)
            assert not (sentinel[1:] & sentinel[:-1]).any()
    assert (batch.decoder_input_ids[:, 0] == 0).all()
    assert (batch.decoder_input_ids[:, 1:] == batch.labels[:, :-1]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(12)), st.integers(1, 11))
def test_a_row_does_not_depend_on_the_rest_of_the_batch(seed, order, cut):
    task = SpanCorruption(64)
    examples = Examples(tokens_for(12, 64), task, seed)
    indices = np.array(order)
    epochs = indices % 3
    whole = examples.batch(indices, epochs)
    parts = [examples.batch(indices[:cut], epochs[:cut]), examples.batch(indices[cut:], epochs[cut:])]
    for name in ("input_ids", "labels", "decoder_input_ids"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert (getattr(whole, name) == joined).all()


def test_seed_index_and_epoch_each_change_the_draw():
    same = np.tile(np.arange(101, 1125, dtype=np.uint16), 2)  # two equal sequences
    examples = Examples(same, PAPER, seed=1)
    base = examples.batch([0], [0]).input_ids
    assert (examples.batch([0], [0]).input_ids == base).all()
    assert (examples.batch([1], [0]).input_ids != base).any()
    assert (examples.batch([0], [1]).input_ids != base).any()
    assert (Examples(same, PAPER, seed=2).batch([0], [0]).input_ids != base).any()


def test_index_and_epoch_are_not_exchangeable():
    keys = hashing.keys(42, np.repeat(np.arange(300), 300), np.tile(np.arange(300), 300))
    assert len(np.unique(keys)) == 300 * 300


def test_the_draw_is_pinned():
    """A resumed run must see the same examples under a later version of march, or of numpy."""
    batch = Examples(np.arange(101, 101 + 4 * 1024).astype(np.uint16), PAPER, seed=42).batch([0, 3, 1], [0, 7, 2**33])
    content = batch.input_ids.astype("<i8").tobytes() + batch.labels.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "d757eab0b615709e"


def test_compositions_are_uniform():
    """6 tokens in 3 spans: each of the 10 compositions as often as the others, within 5 standard deviations."""
    n = 40_000
    words = hashing.words(hashing.keys(7, np.arange(n)), 5)
    found = _composition(words, 3, 6)
    assert (found.sum(axis=1) == 6).all()
    every = [(a, b - a, 6 - b) for a, b in combinations(range(1, 6), 2)]
    counts = {lengths: int((found == lengths).all(axis=1).sum()) for lengths in every}
    assert sum(counts.values()) == n
    bound = 5 * math.sqrt(n * 0.1 * 0.9)
    assert all(abs(count - n / 10) < bound for count in counts.values()), counts


def test_kept_and_noise_lengths_are_independent_and_have_their_means():
    kept, noise = PAPER.lengths(hashing.keys(3, np.arange(4000)))
    assert kept.shape == noise.shape == (4000, 51)
    assert (kept.sum(axis=1) == 870).all()
    assert (noise.sum(axis=1) == 154).all()
    # first and last span have the same distribution: the standard error of a mean is about 0.27 and 0.04
    for lengths, tolerance in ((kept, 1.4), (noise, 0.2)):
        assert abs(lengths[:, 0].mean() - lengths[:, -1].mean()) < tolerance
    assert abs(np.corrcoef(kept[:, 0], noise[:, 0])[0, 1]) < 0.08  # 5 / sqrt(4000)


def test_words_are_unbiased_bit_by_bit():
    words = hashing.words(hashing.keys(0, np.arange(2000)), 50)
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / math.sqrt(words.size)


def test_end_of_text_inside_a_sequence_survives():
    tokens = np.zeros(1024, dtype=np.uint16)
    batch = Examples(tokens, PAPER).batch([0], [0])
    assert (batch.input_ids == 0).sum() + (batch.labels == 0).sum() == 1024


def test_numpys_global_state_is_neither_read_nor_moved():
    examples = Examples(tokens_for(2), PAPER)
    np.random.seed(1)  # noqa: NPY002
    first = examples.batch([0, 1], [0, 0]).labels
    np.random.seed(2)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert (examples.batch([0, 1], [0, 0]).labels == first).all()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize("sequence_length", [2048, 1993])
def test_more_spans_than_sentinels_are_refused(sequence_length):
    with pytest.raises(DataError, match=r"at most 100 sentinels.*fix"):
        SpanCorruption(sequence_length)
    assert SpanCorruption(1990).num_spans + 1 == 100  # the longest that the vocabulary allows


@pytest.mark.parametrize(
    "arguments",
    [(1,), (3,), (0,), (-5,), (1024, 0.0), (1024, 1.0), (1024, 0.15, 0.5), (10, 0.9, 1.0), (1024, math.nan)],
)
def test_impossible_tasks_are_refused(arguments):
    with pytest.raises(ValueError, match=r"expected .*, got .*; fix: "):
        SpanCorruption(*arguments)


def test_an_index_outside_the_split_is_refused():
    examples = Examples(tokens_for(2), PAPER)
    for index in (-1, 2):
        with pytest.raises(DataError, match="sequence indices from 0 to 1"):
            examples.batch([0, index], [0, 0])


def test_a_split_shorter_than_one_sequence_is_refused():
    with pytest.raises(DataError, match=r"at least one sequence \(1024 tokens\), got 1023 tokens"):
        Examples(tokens_for(1)[:-1], PAPER)
    assert len(Examples(tokens_for(3)[:-1], PAPER)) == 2


def test_label_entropy_counts_what_the_labels_hold():
    examples = Examples(tokens_for(40), PAPER)
    labels = np.concatenate([examples.batch([i], [0]).labels[0] for i in range(30)])
    assert examples.label_unigram_entropy(30) == pytest.approx(entropy(np.bincount(labels)))
    uniform = Examples(np.full(4096, 500, dtype=np.uint16), PAPER)
    # 154 equal tokens and 52 sentinels of one each
    share = 154 / 206
    assert uniform.label_unigram_entropy() == pytest.approx(-share * math.log(share) + 52 / 206 * math.log(206))


def test_entropy_of_known_distributions():
    assert entropy(np.array([1, 1, 0, 1, 1])) == pytest.approx(math.log(4))
    assert entropy(np.array([0, 9])) == 0.0
