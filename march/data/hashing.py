"""Counter-based random words: a hash of what they are for, so that no generator has a state to lose.

A training example must be the same on one rank and on eight, and after a resume. The words are therefore a
function of (seed, index, epoch, k) and of nothing else. numpy's own generators would need one object a row (8 us
each before a single draw, and then a Python loop over rows), and their streams may change between numpy versions
(NEP 19). This is SplitMix64 (Steele, Lea, Flood 2014): a 64-bit Weyl sequence with Stafford's mix 13 behind it.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the Weyl increment of SplitMix64
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def as_words(values) -> np.ndarray:
    """An integer from 0 to 2^64 - 1, or an array of them, as uint64 [n]; ValueError for what would be cut to one."""
    words = np.atleast_1d(np.asarray(values))
    if words.dtype.kind not in "iu" or words.min(initial=0) < 0:
        raise ValueError(f"hashing: expected integers from 0 to 2^64 - 1, got {values!r}; a seed is such an integer")
    return words.astype(np.uint64)


def mix(words: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every input bit flips every output bit with probability near one half."""
    words = words ^ (words >> _S30)
    words *= _M1
    words ^= words >> _S27
    words *= _M2
    words ^= words >> _S31
    return words


def keys(*parts) -> np.ndarray:
    """One uint64 key for each row from integers or integer arrays [n], absorbed in order: (1, 2) is not (2, 1)."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix(mix(state + GOLDEN) ^ as_words(part))
    return state


def words(row_keys: np.ndarray, count: int) -> np.ndarray:
    """uint64 [n, count]: word k of row r is the k-th output of SplitMix64 started at row_keys[r]."""
    weyl = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return mix(row_keys[:, None] + weyl[None, :])
