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

Streams [B, L, D] use head 0, position i, column d. Attention probabilities use query i and key j; the second segment
of `unified_attention` counts its columns from SEGMENT_COLUMNS.
"""

from dataclasses import dataclass

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
        if not 0.0 <= self.p < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.p}")
        if self.rng.shape != (3,) or self.rng.dtype != torch.int64:
            raise ValueError(
                "dropout: expected rng as an int64 tensor of 3 elements (seed, step, first sequence), got "
                f"{self.rng.dtype} {list(self.rng.shape)}; build it with kernels.dropout_state()"
            )
        if not 0 <= self.site < 1 << 30:
            raise ValueError(f"dropout: expected a site in [0, 2^30), got {self.site}")


def dropout_state(seed: int, step: int, first_sequence: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The int64 tensor [3] that every `Dropout` of a forward pass shares."""
    for name, value in (("seed", seed), ("step", step), ("first_sequence", first_sequence)):
        if not 0 <= value <= MASK32:
            raise ValueError(f"dropout_state: expected {name} in [0, 2^32), got {value}")
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
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64, device=k0.device) for c in counter)
    if k0.device.type == "meta":
        # shapes alone: the rounds are 200 small operators a call, 7 of the 8 s that counting a step took
        shape = torch.broadcast_shapes(k0.shape, c0.shape, c1.shape, c2.shape, c3.shape)
        return k0.new_empty(shape), k0.new_empty(shape)
    for round_ in range(PHILOX_ROUNDS):
        # int64 products wrap, their bit pattern is the unsigned product's
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        bump0, bump1 = (PHILOX_W0 * round_) & MASK32, (PHILOX_W1 * round_) & MASK32
        c0, c2 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ ((k0 + bump0) & MASK32),
            ((p0 >> 32) & MASK32) ^ c3 ^ ((k1 + bump1) & MASK32),
        )
        c1, c3 = p1 & MASK32, p0 & MASK32
    return c0, c1


def _int32(words: Tensor) -> Tensor:
    """32-bit values held in int64 as int32 of the same bits."""
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


def row_keys(dropout: Dropout, batch: int, heads: int, rows: int) -> tuple[Tensor, Tensor]:
    """(A, B) of every row: two int32 tensors [batch, heads, rows]."""
    rng = dropout.rng
    key = (rng[0] & MASK32, rng[1] & MASK32)
    g = (rng[2] + torch.arange(batch, device=rng.device))[:, None, None]
    h = torch.arange(heads, device=rng.device)[None, :, None]
    i = torch.arange(rows, device=rng.device)[None, None, :]
    i, h, g = torch.broadcast_tensors(i, h, g & MASK32)
    w0, w1 = philox(key, (i, h, g, 2 * dropout.site))
    return _int32(w0 | 1), _int32(w1)


def column_keys(dropout: Dropout, columns: int, offset: int = 0) -> Tensor:
    """C of columns offset, offset + 1, ...: int32 [columns]."""
    rng = dropout.rng
    key = (rng[0] & MASK32, rng[1] & MASK32)
    w0, _ = philox(key, (torch.arange(offset, offset + columns, device=rng.device), 0, 0, 2 * dropout.site + 1))
    return _int32(w0 | 1)


def keep_from_keys(a: Tensor, b: Tensor, c: Tensor, p: float) -> Tensor:
    """bool [..., rows, columns], True where kept, of row keys a, b [..., rows] and column keys c [columns]."""
    word = torch.addcmul(b[..., None], a[..., None], c)  # int32, wraps
    # unsigned word >= T as a signed comparison: the sign bit of both is flipped, word + 2^31 wraps to that
    word += -(1 << 31)
    return word >= threshold(p) - (1 << 31)


def keep_mask(dropout: Dropout, batch: int, heads: int, rows: int, columns: int, offset: int = 0) -> Tensor:
    """bool [batch, heads, rows, columns], True where kept."""
    a, b = row_keys(dropout, batch, heads, rows)
    return keep_from_keys(a, b, column_keys(dropout, columns, offset), dropout.p)


def stream_keep_mask(dropout: Dropout, x: Tensor) -> Tensor:
    """bool mask of a stream [B, L, D], True where kept."""
    batch, length, width = x.shape
    return keep_mask(dropout, batch, 1, length, width)[:, 0]
