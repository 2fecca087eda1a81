"""PTX arithmetic on numpy arrays, exact but for the payload of NaN and the last bits of `approx` functions.

Every function takes arrays that broadcast, [programs or 1, threads or 1], in the dtype its rule names, and returns the
dtype of its result. Sources: "PTX ISA 8.8", sections 9.7.1 to 9.7.5.
"""

from typing import Any

import numpy as np

U1, U2, U4, U8 = np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)
S1, S2, S4, S8 = np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.int64)
F2, F4, F8 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
Array = np.ndarray
_TINY = np.float32(2.0**-126)
_SIGNED = {2: S2, 4: S4, 8: S8}
_FLOAT_NAN: dict[np.dtype, Any] = {F2: np.uint16(0x7FFF), F4: np.uint32(0x7FFFFFFF)}


def constant(value: int, dtype: np.dtype) -> Array:
    """An immediate as [1, 1]: broadcasts with everything."""
    return np.full((1, 1), value & ((1 << 8 * dtype.itemsize) - 1), dtype)


# ---------------------------------------------------------------- integers


def shift_left(x: Array, n: Array) -> Array:
    width = 8 * x.dtype.itemsize
    return np.where(n < width, x << (n & (width - 1)).astype(x.dtype), x.dtype.type(0))


def shift_right(x: Array, n: Array) -> Array:
    """Fills with the sign if x is signed; counts beyond the width shift everything out."""
    width = 8 * x.dtype.itemsize
    if x.dtype.kind == "i":
        return x >> np.minimum(n, width - 1).astype(x.dtype)
    return np.where(n < width, x >> (n & (width - 1)).astype(x.dtype), x.dtype.type(0))


def high(a: Array, b: Array) -> Array:
    """Upper 32 bits of the 64-bit product of two 32-bit integers of either kind."""
    wide = U8 if a.dtype == U4 else S8
    return (np.multiply(a, b, dtype=wide) >> wide.type(32)).astype(a.dtype)


def divide(a: Array, b: Array) -> Array:
    """Rounds to zero; by zero gives all ones, as the GPU's code does."""
    quotient = a // b
    if a.dtype.kind == "i":
        rest = a - quotient * b
        quotient = quotient + ((rest != 0) & ((a ^ b) < 0)).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


def field(x: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits from `start`, extended by its own sign (bit 31 where it ends beyond) if x is signed."""
    start, length = np.minimum(start & 255, 32).astype(S8), np.minimum(length & 255, 32).astype(S8)
    moved = x.astype(S8) >> start
    mask = (S8.type(1) << length) - 1
    bits = moved & mask
    if x.dtype.kind == "i":
        sign = (length > 0) & ((moved >> np.maximum(length - 1, 0)) & 1 != 0)
        bits = np.where(sign, bits | ~mask, bits)
    return bits.astype(x.dtype) if x.dtype.kind == "i" else (bits & 0xFFFFFFFF).astype(x.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each nibble of `selector` picks a byte of b:a; its top bit spreads the byte's sign."""
    if selector.size == 1:
        chosen = int(selector.flat[0]) & 0xFFFF
        if chosen == 0x5410:
            return (a & U4.type(0xFFFF)) | (b << U4.type(16))
        if chosen == 0x7632:
            return (a >> U4.type(16)) | (b & U4.type(0xFFFF0000))
    both = a.astype(U8) | (b.astype(U8) << U8.type(32))
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), U4)
    for place in range(4):
        nibble = (selector >> U4.type(4 * place)) & U4.type(15)
        byte = (both >> ((nibble & U4.type(7)).astype(U8) << U8.type(3))) & U8.type(0xFF)
        spread = np.where(byte >= 128, U8.type(0xFF), U8.type(0))
        out |= (np.where(nibble >= 8, spread, byte) << U8.type(8 * place)).astype(U4)
    return out


# ---------------------------------------------------------------- floats


def flush(x: Array) -> Array:
    """.ftz: subnormal float32 become zeros of their sign."""
    small = np.abs(x) < _TINY
    return np.where(small, np.copysign(F4.type(0), x), x) if small.any() else x


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c of float32 (float16), rounded once. float64 holds the product exactly and rounds the sum; a second
    rounding errs only where that sum lies halfway between two results: there, and where results are subnormal and
    halfway is elsewhere, the sum is rounded to odd instead."""
    product, addend = np.multiply(a, b, dtype=F8), c.astype(F8)
    total = product + addend
    dropped = 29 if a.dtype == F4 else 42
    unsure = (total.view(U8) & U8.type((1 << dropped) - 1)) == U8.type(1 << (dropped - 1))
    unsure |= (np.abs(total) < np.finfo(a.dtype).tiny) & (total != 0)
    return (_sum_to_odd(product, addend) if unsure.any() else total).astype(a.dtype)


def extreme(a: Array, b: Array, greatest: bool, nan: bool = False) -> Array:
    """max, or min: of a number and NaN the number (nan: NaN); +0 is greater than -0; a NaN is the canonical one."""
    function = (np.maximum if nan else np.fmax) if greatest else (np.minimum if nan else np.fmin)
    out = function(a, b)
    zeros = (out == 0) & (a == b)
    if zeros.any():
        bits = U4 if a.dtype == F4 else U2
        x, y = a.view(bits), b.view(bits)
        out = np.where(zeros, x & y if greatest else x | y, out.view(bits)).view(a.dtype)
    return canonical(out).view(a.dtype)


def divide_approx(a: Array, b: Array) -> Array:
    """a times the reciprocal of b, which is flushed to zero where |b| is beyond 2^126."""
    beyond = (np.abs(b) > F4.type(2.0**126)) & np.isfinite(b)
    return np.where(beyond, a * np.copysign(F4.type(0), b), a / b) if beyond.any() else a / b


def rsqrt(x: Array) -> Array:
    return (1.0 / np.sqrt(x.astype(F8))).astype(F4)


# ---------------------------------------------------------------- conversions


def canonical(x: Array) -> Array:
    """Bits of a float array with PTX's one NaN."""
    bits = x.view(U2 if x.dtype == F2 else U4)
    nan = np.isnan(x)
    return np.where(nan, _FLOAT_NAN[x.dtype], bits) if nan.any() else bits


def bf16_from_f32(x: Array) -> Array:
    """Rounded to the nearest, ties to even; uint16."""
    bits = x.view(U4)
    out = ((bits + (((bits >> U4.type(16)) & U4.type(1)) + U4.type(0x7FFF))) >> U4.type(16)).astype(U2)
    nan = x != x
    return np.where(nan, U2.type(0x7FFF), out) if nan.any() else out


def bf16_from_f64(x: Array) -> Array:
    """Rounded once: a float32 between is moved off a false tie."""
    near = x.astype(F4)
    false_tie = ((near.view(U4) & U4.type(0xFFFF)) == 0x8000) & (near.astype(F8) != x)
    if false_tie.any():
        toward = np.where(near.astype(F8) < x, F4.type(np.inf), F4.type(-np.inf))
        near = np.where(false_tie, np.nextafter(near, toward), near)
    return bf16_from_f32(near)


def f32_from_bf16(x: Array) -> Array:
    return (x.astype(U4) << U4.type(16)).view(F4)


def f16_from_f32(x: Array) -> Array:
    return canonical(x.astype(F2))


def tf32_from_f32(x: Array) -> Array:
    """cvt.rna: nearest, ties away from zero; NaN and infinities stay."""
    bits = x.view(U4)
    out = (bits + U4.type(0x1000)) & U4.type(0xFFFFE000)
    special = (bits & U4.type(0x7F800000)) == 0x7F800000
    return np.where(special, bits, out) if special.any() else out


def to_integer(x: Array, dtype: np.dtype) -> Array:
    """A float that is already whole, saturated; NaN gives 0, of 64 bits the highest bit."""
    limits = np.iinfo(dtype)
    low, top = float(limits.min), float(limits.max)
    inside = np.clip(np.nan_to_num(x.astype(F8), nan=0.0, posinf=top, neginf=low), low, top)
    out = inside.astype(dtype)
    if dtype.itemsize < 8:
        return out
    return np.where(x != x, U8.type(1 << 63).astype(dtype), np.where(inside >= top, dtype.type(limits.max), out))


# ---------------------------------------------------------------- pairs of 16-bit floats in 32 bits


def pack(low: Array, upper: Array) -> Array:
    return low.astype(U4) | (upper.astype(U4) << U4.type(16))


def halves(x: Array) -> tuple[Array, Array]:
    """(lower, upper) 16 bits."""
    return x.astype(U2), (x >> U4.type(16)).astype(U2)


def _wide_bf16(x: Array) -> tuple[Array, Array]:
    return (x << U4.type(16)).view(F4), (x & U4.type(0xFFFF0000)).view(F4)


def _bf16x2(function, *x: Array) -> Array:
    """`function` on float64 of each half, rounded once."""
    lower, upper = zip(*(_wide_bf16(one) for one in x), strict=True)
    low, up = (bf16_from_f64(function(*(one.astype(F8) for one in half))) for half in (lower, upper))
    return pack(low, up)


def _f16x2(function, *x: Array) -> Array:
    lower, upper = zip(*(halves(one) for one in x), strict=True)
    low, up = (canonical(function(*(one.view(F2) for one in half))) for half in (lower, upper))
    return pack(low, up)


def fma_bf16(a: Array, b: Array, c: Array) -> Array:
    """uint16 bits; the sum of an exact product and an addend is rounded to odd first."""
    product, addend = (f32_from_bf16(a) * f32_from_bf16(b).astype(F8)), f32_from_bf16(c).astype(F8)
    return bf16_from_f64(_sum_to_odd(product, addend))


def _sum_to_odd(a: Array, b: Array) -> Array:
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    even = (total.view(U8) & U8.type(1)) == 0
    fix = even & np.isfinite(error) & (error != 0)
    return np.where(fix, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total) if fix.any() else total


def fma_bf16x2(a: Array, b: Array, c: Array) -> Array:
    (a0, a1), (b0, b1), (c0, c1) = halves(a), halves(b), halves(c)
    return pack(fma_bf16(a0, b0, c0), fma_bf16(a1, b1, c1))


def fma_f16x2(a: Array, b: Array, c: Array) -> Array:
    return _f16x2(fma, a, b, c)


def add_bf16x2(a: Array, b: Array) -> Array:
    return _bf16x2(_sum_to_odd, a, b)


def sub_bf16x2(a: Array, b: Array) -> Array:
    return _bf16x2(lambda x, y: _sum_to_odd(x, -y), a, b)


def mul_bf16x2(a: Array, b: Array) -> Array:
    return _bf16x2(np.multiply, a, b)


def add_f16x2(a: Array, b: Array) -> Array:
    return _f16x2(np.add, a, b)


def sub_f16x2(a: Array, b: Array) -> Array:
    return _f16x2(np.subtract, a, b)


def mul_f16x2(a: Array, b: Array) -> Array:
    return _f16x2(np.multiply, a, b)


def extreme_bf16x2(a: Array, b: Array, greatest: bool, nan: bool = False) -> Array:
    (a0, a1), (b0, b1) = _wide_bf16(a), _wide_bf16(b)
    return pack(*(bf16_from_f32(extreme(x, y, greatest, nan)) for x, y in ((a0, b0), (a1, b1))))


def extreme_f16x2(a: Array, b: Array, greatest: bool, nan: bool = False) -> Array:
    return _f16x2(lambda x, y: extreme(x, y, greatest, nan), a, b)
