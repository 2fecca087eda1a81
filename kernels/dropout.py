"""The dropout contract: a mask that is a function of what is dropped, never of how it is computed.

A dropout site is a matrix of rows and columns: one row for each (sequence, head, position), one column for each key
or feature. Philox-4x32-10 (Salmon et al., 2011) gives every row two words and every column one; an element is one
multiply-add of them, the strongly universal multiply-shift hash of Dietzfelbinger (1996):

    row (sequence g, head h, position i):  w = philox(key, counter=(i, h, g, 2 site));      A = w0 | 1,  B = w1
    column j:                              w = philox(key, counter=(j, 0, 0, 2 site + 1));  C = w0 | 1
    key = (seed, step) modulo 2^32 each
    element (row, j) is dropped  iff  (A C + B) mod 2^32 < T,   T = round(p 2^32)

Kept elements are scaled by 1 / (1 - T / 2^32), the keep probability that the threshold really gives. One Philox call
serves a whole row or column; an element costs one integer multiply-add and a comparison, on a GPU and on a CPU.
Elements of a row are pairwise independent over A and B; tests/kernels/test_dropout.py checks frequency and the
correlation between neighbours, rows, heads, sites, steps, sequences and 2 x 2 blocks.

Streams [B, L, D] use head 0, position i, column d. Attention probabilities use query i and key j; a second segment of
keys counts its columns from SEGMENT_COLUMNS.
"""

from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10
SEGMENT_COLUMNS = 1 << 24


@dataclass(frozen=True)
class Dropout:
    """One dropout site of one forward pass.

    p: probability of dropping, in [0, 1). rng: int64 tensor [3] on the operator's device, (seed, step, index in the
    global step of the micro-batch's first sequence); read on the device only. site: number of the site, one for each
    place in the model that drops, in [0, 2^30).
    """

    p: float
    rng: Tensor
    site: int

    def __post_init__(self):
        if not isinstance(self.p, Real) or not 0.0 <= self.p < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.p!r}; give a float")
        if self.rng.shape != (3,) or self.rng.dtype != torch.int64:
            raise ValueError(
                "dropout: expected rng as an int64 tensor of 3 elements (seed, step, first sequence), got "
                f"{self.rng.dtype} {list(self.rng.shape)}; build it with kernels.dropout_state()"
            )
        if not isinstance(self.site, Integral) or not 0 <= self.site < 1 << 30:
            raise ValueError(f"dropout: expected a site in [0, 2^30), got {self.site!r}; give an int")


def dropout_state(seed: int, step: int, first_sequence: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The int64 tensor [3] that every `Dropout` of a forward pass shares."""
    for name, value in (("seed", seed), ("step", step), ("first_sequence", first_sequence)):
        if not isinstance(value, Integral) or not 0 <= value <= MASK32:
            raise ValueError(f"dropout_state: expected {name} as an int in [0, 2^32), got {value!r}")
    return torch.tensor([seed, step, first_sequence], dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """T: elements whose 32-bit word is below it are dropped."""
    return min(round(p * 2**32), MASK32)


def keep_scale(p: float) -> float:
    """1 / (the keep probability that `threshold(p)` really gives)."""
    return 1.0 / (1.0 - threshold(p) / 2**32)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor | int, ...]) -> tuple[Tensor, Tensor]:
    """First two words of Philox-4x32-10, in int64 tensors holding 32-bit values; counters broadcast."""
    k0, k1 = key
    counters = [torch.as_tensor(c, dtype=torch.int64, device=k0.device) for c in counter]
    # torch.broadcast_shapes imports sympy, 0.5 s
    shape = torch.broadcast_tensors(k0, k1, *counters)[0].shape
    if k0.device.type == "meta":
        # shapes alone: the rounds are 70 small operators a call, most of the time that counting a step took
        return k0.new_empty(shape), k0.new_empty(shape)
    # The two halves of a round are one operation on words [2, ...], (c0, c2) in `even` and (c1, c3) in `odd`: for the
    # few thousand counters of a site the calls are what costs, and this is 60 of them instead of 160.
    c0, c1, c2, c3 = (c.broadcast_to(shape) for c in counters)
    even, odd = torch.stack([c0, c2]), torch.stack([c1, c3])
    ones = (1,) * len(shape)
    multipliers = torch.tensor([PHILOX_M0, PHILOX_M1], device=k0.device).view(2, *ones)
    bumps = torch.tensor([[PHILOX_W0 * r, PHILOX_W1 * r] for r in range(PHILOX_ROUNDS)], device=k0.device)
    words = torch.stack([k0, k1]).view(2, *ones[k0.dim() :], *k0.shape)
    round_keys = (words + bumps.view(PHILOX_ROUNDS, 2, *ones)) & MASK32
    for round_key in round_keys.unbind():
        # int64 products wrap, their bit pattern is the unsigned product's; bits above 32 are cut where they would count
        product = (even * multipliers).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(MASK32)
        odd = product
    return even[0], odd[0] & MASK32


def _int32(words: Tensor) -> Tensor:
    """32-bit values held in int64 as int32 of the same bits."""
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


@dataclass(frozen=True)
class SiteKeys:
    """The keys of one site, from one Philox call: A, and B with its sign bit flipped, int32 [batch * heads, rows]; C,
    int32 [columns]. A hundredth of the mask in size or less, so they are kept for backward, not drawn again.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    p: float

    @property
    def scale(self) -> float:
        return keep_scale(self.p)


def pack_keys(*all_keys: SiteKeys | None) -> list[Tensor]:
    """The tensors of some sites' keys, to save for backward."""
    return [x for keys in all_keys if keys is not None for x in (keys.a, keys.b, keys.c)]


def unpack_keys(tensors: list[Tensor], *probabilities: float | None) -> list[SiteKeys | None]:
    """The sites of `pack_keys`; None where the probability is None."""
    rest = iter(tensors)
    return [None if p is None else SiteKeys(next(rest), next(rest), next(rest), p) for p in probabilities]


def site_keys(
    dropout: Dropout, batch: int, heads: int, rows: int, segments: tuple[int, ...], offset: int = 0
) -> SiteKeys:
    """Keys of a site's rows and columns: one segment, or two, of which the second counts from SEGMENT_COLUMNS.
    offset: of the first column."""
    rng = dropout.rng
    g, h, i = (torch.arange(n, device=rng.device) for n in (batch, heads, rows))
    rows_ = torch.cartesian_prod((rng[2] + g) & MASK32, h, i).T
    starts = zip(segments, (offset, SEGMENT_COLUMNS), strict=False)
    columns = torch.cat([torch.arange(start, start + n, device=rng.device) for n, start in starts])
    zeros, count = torch.zeros_like(columns), batch * heads * rows
    c0, c1, c2 = (torch.cat([x, y]) for x, y in zip(rows_.flip(0), (columns, zeros, zeros), strict=True))
    c3 = torch.cat([torch.zeros_like(rows_[0]), zeros + 1]) + 2 * dropout.site
    w0, w1 = philox((rng[0] & MASK32, rng[1] & MASK32), (c0, c1, c2, c3))
    w0 = _int32(w0 | 1)
    shape = (batch * heads, rows)
    b = _int32(w1[:count]) ^ -(1 << 31)
    return SiteKeys(w0[:count].view(shape), b.view(shape), w0[count:], dropout.p)


def keep_words(a: Tensor, b: Tensor, c: Tensor, p: float) -> Tensor:
    """int32 [..., rows, columns], 1 where kept and 0 where dropped, of a `SiteKeys`' rows.

    Three vectorised passes in place. A bool mask is what costs on a CPU: comparing into bool runs at 3, multiplying
    by it at 1 to 2, masked_fill and where at 0.4 billion elements a second and core; these passes at 20 (bfloat16 and
    float32, one core of an EPYC with AVX-512).
    """
    word = a[..., None] * c  # wraps
    word += b[..., None]
    # unsigned word >= T as a signed comparison, both sides' sign bits flipped
    return word.ge_(threshold(p) - (1 << 31))


_BITS = {2: torch.int16, 4: torch.int32}


def mask_(x: Tensor, words: Tensor) -> Tensor:
    """x with the elements whose word is 0 set to 0, in place; the word times the bits is the element or +0."""
    bits = _BITS.get(x.element_size())
    if bits is None or x.device.type == "meta":
        return x.mul_(words)
    x.view(bits).mul_(words if words.dtype == bits else words.to(bits))
    return x


def keep_mask(dropout: Dropout, batch: int, heads: int, rows: int, columns: int, offset: int = 0) -> Tensor:
    """bool [batch, heads, rows, columns], True where kept; columns count from `offset`."""
    keys = site_keys(dropout, batch, heads, rows, (columns,), offset)
    return keep_words(keys.a, keys.b, keys.c, keys.p).view(batch, heads, rows, columns).bool()


def stream_keep_mask(dropout: Dropout, x: Tensor) -> Tensor:
    """bool mask of a stream [B, L, D], True where kept."""
    batch, length, width = x.shape
    return keep_mask(dropout, batch, 1, length, width)[:, 0]
