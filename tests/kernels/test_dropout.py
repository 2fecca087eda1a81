"""The dropout contract: the generator against known answers, the mask's statistics, and what it may not depend on."""

import math

import harness
import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels.dropout import (
    MASK32,
    SEGMENT_COLUMNS,
    Dropout,
    dropout_state,
    keep_mask,
    keep_scale,
    keep_words,
    philox,
    site_keys,
    stream_keep_mask,
    threshold,
)
from kernels.fused import primitives


@triton.jit
def _words_kernel(counter_ptr, out_ptr, seed, N: tl.constexpr):
    offs = tl.arange(0, N)
    c0, c1 = tl.load(counter_ptr + offs), tl.load(counter_ptr + N + offs)
    c2, c3 = tl.load(counter_ptr + 2 * N + offs), tl.load(counter_ptr + 3 * N + offs)
    w0, w1, _, _ = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out_ptr + offs, w0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + N + offs, w1.to(tl.int32, bitcast=True))


@triton.jit
def _mask_kernel(out_ptr, rng_ptr, site, head, threshold, M: tl.constexpr, N: tl.constexpr):
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    sequence = tl.program_id(0)
    a, b = primitives.row_keys(rng_ptr, site, sequence, head, offs_m)
    c = primitives.column_keys(rng_ptr, site, offs_n)
    kept = primitives.keep(a[:, None], b[:, None], c[None, :], threshold)
    tl.store(out_ptr + sequence * M * N + offs_m[:, None] * N + offs_n[None, :], kept.to(tl.int8))


# Random123, kat_vectors, philox4x32 10: (counter word, key word) repeated, first two words of the result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB)),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = philox(tuple(torch.tensor(k) for k in key), tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == answer


def test_philox_is_tritons():
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(-(1 << 31), 1 << 31, (4, 64), generator=generator).to(torch.int32).to(harness.DEVICE)
    out = torch.zeros(2, 64, dtype=torch.int32, device=harness.DEVICE)
    _words_kernel[(1,)](counter, out, (0x1234567 << 32) | 0x89ABCDEF, N=64)
    key = torch.tensor(0x89ABCDEF), torch.tensor(0x1234567)
    w0, w1 = philox(key, tuple(counter.cpu().long() & MASK32))
    assert torch.equal(out.cpu().long() & MASK32, torch.stack([w0, w1]))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_an_element_at_the_threshold_is_kept(impl):
    """T = round(p 2^32) drops the words below it: the element whose word it is stays, one above it does not."""
    rng = dropout_state(42, 2, 9)
    keys = site_keys(Dropout(0.5, rng, 7), 1, 1, 1, (16,))
    word = (int(keys.a) * int(keys.c[3]) + int(keys.b) + (1 << 31)) & MASK32
    s = torch.ones(1, 1, 16, device=harness.DEVICE)
    for above in (0, 1):
        dropout = Dropout((word + above) / 2**32, rng.to(harness.DEVICE), 7)
        assert threshold(dropout.p) == word + above
        y, _ = kernels.residual_norm(None, s, s[0, 0], dropout=dropout, impl=impl)
        assert bool(y[0, 0, 3]) != bool(above)


@pytest.mark.parametrize("seed", [0, 42, (1 << 31) + 5, MASK32])
def test_the_device_helpers_give_the_same_mask(seed):
    dropout = Dropout(0.3, dropout_state(seed, 2, (1 << 32) - 2 if seed == MASK32 else 9), (1 << 30) - 1)
    out = torch.empty(2, 16, 32, dtype=torch.int8, device=harness.DEVICE)
    arguments = dropout.rng.to(harness.DEVICE), dropout.site, 3, primitives.signed_threshold(0.3)
    _mask_kernel[(2,)](out, *arguments, M=16, N=32)
    assert torch.equal(out.bool().cpu(), keep_mask(dropout, 2, 4, 16, 32)[:, 3])


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3, 1e-9, 0.999])
def test_the_threshold_is_exact(p):
    """Words below T are dropped, T itself is kept; the scale is 1 over the keep probability of that T."""
    t = threshold(p)
    assert abs(t / 2**32 - p) <= 2**-33
    assert keep_scale(p) == 1 / (1 - t / 2**32)
    words = torch.tensor([0, t - 1, t, t + 1, MASK32]) & MASK32
    # A = 1 and C = word, B = 0: the hash is the word itself
    c = torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)
    flipped = torch.full((1,), -(1 << 31), dtype=torch.int32)
    kept = keep_words(torch.ones(1, dtype=torch.int32), flipped, c, p)[0].bool()
    expected = [int(w) >= t for w in words.tolist()]
    assert kept.tolist() == expected


def test_keys_are_odd():
    """Multiply-shift needs odd multipliers: an even one would repeat words within a row."""
    dropout = Dropout(0.1, dropout_state(1, 2, 3), 4)
    keys = site_keys(dropout, 3, 2, 50, (500,))
    assert (keys.a & 1).all()
    assert (keys.c & 1).all()


def _signs(mask):
    """Kept and dropped as numbers of mean 0 and variance 1."""
    p = 1 - mask.double().mean()
    return (mask.double() - (1 - p)) / (p * (1 - p)).sqrt()


def _uncorrelated(first, second, what):
    """The correlation of two masks is below 4.5 standard errors of independent ones (1 in 150,000 by chance)."""
    n = first.numel()
    z = (_signs(first) * _signs(second)).sum().item() / math.sqrt(n)
    assert abs(z) < 4.5, f"{what}: correlation {z / math.sqrt(n):.2e} of {n} pairs, {z:.1f} standard errors"


MASKS = [(0.1, 42), (0.5, 42), (0.1, 7), (0.1, (1 << 32) - 1)]


@pytest.fixture(scope="module", params=MASKS, ids=[f"p {p} seed {seed}" for p, seed in MASKS])
def sampled(request):
    """(dropout, its mask [4 sequences, 4 heads, 256 rows, 256 columns]): a million elements."""
    p, seed = request.param
    dropout = Dropout(p, dropout_state(seed, 17, 1000), 5)
    return dropout, keep_mask(dropout, 4, 4, 256, 256)


def test_frequency(sampled):
    dropout, mask = sampled
    p = threshold(dropout.p) / 2**32
    deviation = math.sqrt(p * (1 - p))
    for dims, what in (((), "all"), ((0, 1, 2), "columns"), ((1, 2, 3), "sequences"), ((0, 2, 3), "heads")):
        count = mask.double().mean(dims) if dims else mask.double().mean()
        n = mask.numel() / count.numel()
        worst = ((count - (1 - p)).abs().max() * math.sqrt(n) / deviation).item()
        assert worst < 4.5, f"{what}: {worst:.1f} standard errors from the keep probability"


def test_frequency_of_rows(sampled):
    """Rows vary as 256 independent draws do: their counts' variance is the binomial's within 10%."""
    dropout, mask = sampled
    p = threshold(dropout.p) / 2**32
    counts = (~mask).sum(-1).double().flatten()
    ratio = counts.var().item() / (256 * p * (1 - p))
    assert 0.9 < ratio < 1.1
    assert (counts - 256 * p).abs().max() < 6 * math.sqrt(256 * p * (1 - p))


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 7, 8, 16, 32, 64, 128])
def test_neighbours_are_uncorrelated(sampled, distance):
    _, mask = sampled
    _uncorrelated(mask[..., distance:], mask[..., :-distance], f"columns {distance} apart")
    _uncorrelated(mask[:, :, distance:], mask[:, :, :-distance], f"rows {distance} apart")


def test_sequences_heads_sites_steps_and_seeds_are_uncorrelated(sampled):
    dropout, mask = sampled
    seed, step, first = dropout.rng.tolist()
    for i in range(1, 4):
        _uncorrelated(mask[i:], mask[:-i], f"sequences {i} apart")
        _uncorrelated(mask[:, i:], mask[:, :-i], f"heads {i} apart")

    def other(site=dropout.site, seed=seed, step=step, first=first):
        return keep_mask(Dropout(dropout.p, dropout_state(seed & MASK32, step, first), site), 4, 4, 256, 256)

    for delta in (1, 2, 3, 64):
        _uncorrelated(mask, other(site=dropout.site + delta), f"sites {delta} apart")
        _uncorrelated(mask, other(step=step + delta), f"steps {delta} apart")
        _uncorrelated(mask, other(seed=seed + delta), f"seeds {delta} apart")
        _uncorrelated(mask, other(first=first + 1000 * delta), f"micro-batches {delta} apart")
    segment = keep_mask(dropout, 4, 4, 256, 256, offset=SEGMENT_COLUMNS)
    _uncorrelated(mask, segment, "the two segments")


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (2, 1), (8, 8), (16, 1), (1, 16), (64, 64)])
def test_two_by_two_blocks(sampled, rows, columns):
    """The product of four corners: multiply-add words have a linear relation there, A C + A' C' - A C' - A' C, which
    pairs do not show. The dropped corners of a block are as often 0 ... 4 as independent ones."""
    dropout, mask = sampled
    p = threshold(dropout.p) / 2**32
    corners = [
        mask[:, :, :-rows, :-columns],
        mask[:, :, rows:, :-columns],
        mask[:, :, :-rows, columns:],
        mask[:, :, rows:, columns:],
    ]
    product = math.prod(_signs(c) for c in corners)
    # blocks overlap, but for independent elements the products of different blocks are uncorrelated
    z = product.sum().item() / math.sqrt(product.numel())
    assert abs(z) < 4.5, f"four corners: {z:.1f} standard errors"
    dropped = sum((~c).long() for c in corners)
    for count in range(5):
        expected = math.comb(4, count) * p**count * (1 - p) ** (4 - count)
        seen = (dropped == count).double().mean().item()
        # neighbouring blocks share corners: their number counts a quarter
        error = math.sqrt(expected * (1 - expected) / (dropped.numel() / 4))
        assert abs(seen - expected) < 4.5 * error, f"{count} of 4 dropped: {seen:.6f}, expected {expected:.6f}"


def test_longest_runs_in_rows_are_those_of_independent_draws(sampled):
    """A row is an arithmetic hash of its columns' keys: a lattice would show as runs."""
    dropout, mask = sampled
    p = max(threshold(dropout.p) / 2**32, 0.1)
    run = torch.zeros_like(mask[..., 0], dtype=torch.long)
    longest = run.clone()
    for j in range(mask.shape[-1]):
        run = torch.where(mask[..., j], 0, run + 1)
        longest = torch.maximum(longest, run)
    # the longest of n draws is log_{1/p} n, and exceeds it by k with probability about p^k
    limit = math.log(mask.numel()) / math.log(1 / p) + math.log(1e5) / math.log(1 / p)
    assert longest.max().item() <= limit


def test_the_mask_does_not_depend_on_the_micro_batch():
    whole = keep_mask(Dropout(0.3, dropout_state(42, 3, 10), 2), 4, 3, 9, 11)
    parts = [keep_mask(Dropout(0.3, dropout_state(42, 3, 10 + i), 2), 1, 3, 9, 11) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))


def test_the_mask_does_not_depend_on_the_extent():
    dropout = Dropout(0.3, dropout_state(42, 3, 10), 2)
    large, small = keep_mask(dropout, 4, 3, 9, 11), keep_mask(dropout, 2, 2, 5, 7)
    assert torch.equal(large[:2, :2, :5, :7], small)
    assert torch.equal(keep_mask(dropout, 1, 1, 5, 4, offset=3), large[:1, :1, :5, 3:7])


def test_streams_use_head_0():
    dropout = Dropout(0.3, dropout_state(42, 3, 10), 2)
    x = torch.zeros(2, 5, 7)
    assert torch.equal(stream_keep_mask(dropout, x), keep_mask(dropout, 2, 1, 5, 7)[:, 0])


def test_the_state_is_32_bits_a_word():
    rng = torch.tensor([42 + (1 << 32), 3 + (1 << 33), 10])
    plain = keep_mask(Dropout(0.3, dropout_state(42, 3, 10), 2), 2, 1, 5, 7)
    assert torch.equal(keep_mask(Dropout(0.3, rng, 2), 2, 1, 5, 7), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, dropout_state(1, 1), 0), "probability"),
        ((-0.1, dropout_state(1, 1), 0), "probability"),
        ((torch.tensor(0.1), dropout_state(1, 1), 0), "probability"),
        (("0.1", dropout_state(1, 1), 0), "probability"),
        ((0.1, torch.zeros(2, dtype=torch.int64), 0), "3 elements"),
        ((0.1, torch.zeros(3, dtype=torch.int32), 0), "int64"),
        ((0.1, dropout_state(1, 1), 1 << 30), "site"),
        ((0.1, dropout_state(1, 1), -1), "site"),
        ((0.1, dropout_state(1, 1), 1.5), "site"),
    ],
)
def test_a_wrong_dropout_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Dropout(*arguments)


@pytest.mark.parametrize("words", [(-1, 0, 0), (0, 1 << 32, 0), (0, 0, -3), (1.5, 0, 0), (0, "1", 0)])
def test_a_wrong_state_is_refused(words):
    with pytest.raises(ValueError, match=r"\[0, 2\^32\)"):
        dropout_state(*words)
