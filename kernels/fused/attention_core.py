"""What the attention kernels share: tiles of rows, score masks, the running softmax over one key segment, dQ over one.

A head width is up to three parts, powers of two (`tiles_attention.head_dim_class`): D0, D1, D2 of Q and K, E0, E1, E2
of V and O, 0 where absent; a product over the width is a sum over parts. Only the last part can reach beyond the
width, where loads give 0. Scores are in units of log2(e): exp2 is one instruction, exp is two.

Strides come in units of ALIGN elements (a compile-time power of two), so that a stride of 190 is known to be even and
one of 40 to be a multiple of 8, without a compiled kernel for each stride. The innermost stride is 1.
"""

import triton
import triton.language as tl

from kernels.fused.primitives import keep

# The running maximum before any key. Finite, so that exp2(NO_KEY - NO_KEY) is 1 and not NaN; masked scores are -inf.
NO_KEY = tl.constexpr(-1.0e30)


@triton.jit
def load_part(
    ptr, offs, stride, end, START: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS_MASKED: tl.constexpr
):
    """[rows, D]: columns START ... START + D of rows `offs`; 0 from row `end` (ROWS_MASKED) and column WIDTH on."""
    d = START + tl.arange(0, D)
    ptrs = ptr + offs[:, None] * stride + d[None, :]
    if START + D > WIDTH:
        if ROWS_MASKED:
            return tl.load(ptrs, mask=(offs[:, None] < end) & (d[None, :] < WIDTH), other=0.0)
        else:
            return tl.load(ptrs, mask=d[None, :] < WIDTH, other=0.0)
    else:
        if ROWS_MASKED:
            return tl.load(ptrs, mask=offs[:, None] < end, other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit
def store_part(ptr, x, offs, stride, end, START: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Columns START ... START + D of rows `offs` below `end`, converted to the pointer's type."""
    d = START + tl.arange(0, D)
    ptrs = ptr + offs[:, None] * stride + d[None, :]
    x = x.to(ptr.dtype.element_ty)
    if START + D > WIDTH:
        tl.store(ptrs, x, mask=(offs[:, None] < end) & (d[None, :] < WIDTH))
    else:
        tl.store(ptrs, x, mask=offs[:, None] < end)


@triton.jit
def key_end_of(lengths_ptr, b, Lk, HAS_LENGTHS: tl.constexpr):
    """Number of leading keys of sequence b that can be real."""
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), Lk)
    else:
        return Lk


@triton.jit
def masked_scores(
    s, start, offs_m, offs_n, key_end, mask_ptr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Scores [M, N] with -inf where query offs_m must not see key start + offs_n. EDGE: the block may leave the
    valid region; one comparison an element serves the causal limit and the end of the keys. mask_ptr: 0 or -inf a key;
    one addition an element, where bytes would cost a comparison, a select and their conversion."""
    if EDGE:
        if CAUSAL:
            last = tl.minimum(offs_m, key_end - 1) - start
            s = tl.where(offs_n[None, :] <= last[:, None], s, float("-inf"))
        else:
            s = tl.where((offs_n < key_end - start)[None, :], s, float("-inf"))
    if HAS_MASK:
        s += tl.load(mask_ptr + start + offs_n)[None, :]
    return s


@triton.jit
def softmax_segment(
    acc0, acc1, acc2, m, l, q0, q1, q2,
    k_ptr, v_ptr, stride_kl, stride_vl, mask_ptr, ckeys_ptr, row_a, row_b, threshold, scale_log2, offs_m,
    lo, hi, key_end,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys lo ... hi - 1 of one segment into the running softmax (acc, m, l) of a block of queries.

    m: row maximum, in units of log2; l: row sum of exp2(scores - m), before dropout. EDGE: some of these keys are
    beyond `key_end` or, CAUSAL, after their query.
    """
    offs_n = tl.arange(0, BLOCK_N)
    for start in tl.range(lo, hi, BLOCK_N):
        k_base = k_ptr + tl.cast(start, tl.int64) * stride_kl
        v_base = v_ptr + tl.cast(start, tl.int64) * stride_vl
        left = key_end - start
        k = load_part(k_base, offs_n, stride_kl, left, 0, D0, K, EDGE)
        s = tl.dot(q0, tl.trans(k), input_precision=PRECISION)
        if D1 > 0:
            k = load_part(k_base, offs_n, stride_kl, left, D0, D1, K, EDGE)
            s = tl.dot(q1, tl.trans(k), s, input_precision=PRECISION)
        if D2 > 0:
            k = load_part(k_base, offs_n, stride_kl, left, D0 + D1, D2, K, EDGE)
            s = tl.dot(q2, tl.trans(k), s, input_precision=PRECISION)
        if NEGATIVE:
            s = -s
        s = masked_scores(s, start, offs_m, offs_n, key_end, mask_ptr, EDGE, CAUSAL, HAS_MASK)
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        if DROPOUT:
            c = tl.load(ckeys_ptr + start + offs_n)
            p = tl.where(keep(row_a[:, None], row_b[:, None], c[None, :], threshold), p, 0.0)
        p = p.to(v_ptr.dtype.element_ty)
        v = load_part(v_base, offs_n, stride_vl, left, 0, E0, KV, EDGE)
        acc0 = tl.dot(p, v, acc0 * alpha[:, None], input_precision=PRECISION)
        if E1 > 0:
            v = load_part(v_base, offs_n, stride_vl, left, E0, E1, KV, EDGE)
            acc1 = tl.dot(p, v, acc1 * alpha[:, None], input_precision=PRECISION)
        if E2 > 0:
            v = load_part(v_base, offs_n, stride_vl, left, E0 + E1, E2, KV, EDGE)
            acc2 = tl.dot(p, v, acc2 * alpha[:, None], input_precision=PRECISION)
    return acc0, acc1, acc2, m, l


@triton.jit
def dq_segment(
    dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, lse, delta,
    k_ptr, v_ptr, stride_kl, stride_vl, mask_ptr, ckeys_ptr, row_a, row_b, threshold, scale_log2, offs_m,
    lo, hi, key_end,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what keys lo ... hi - 1 of one segment contribute to dQ / (scale * keep_scale) of a block of queries."""
    offs_n = tl.arange(0, BLOCK_N)
    for start in tl.range(lo, hi, BLOCK_N):
        k_base = k_ptr + tl.cast(start, tl.int64) * stride_kl
        v_base = v_ptr + tl.cast(start, tl.int64) * stride_vl
        left = key_end - start
        k0 = load_part(k_base, offs_n, stride_kl, left, 0, D0, K, EDGE)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_part(k_base, offs_n, stride_kl, left, D0, D1, K, EDGE)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        if D2 > 0:
            k2 = load_part(k_base, offs_n, stride_kl, left, D0 + D1, D2, K, EDGE)
            s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
        if NEGATIVE:
            s = -s
        s = masked_scores(s, start, offs_m, offs_n, key_end, mask_ptr, EDGE, CAUSAL, HAS_MASK)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        v = load_part(v_base, offs_n, stride_vl, left, 0, E0, KV, EDGE)
        dp = tl.dot(do0, tl.trans(v), input_precision=PRECISION)
        if E1 > 0:
            v = load_part(v_base, offs_n, stride_vl, left, E0, E1, KV, EDGE)
            dp = tl.dot(do1, tl.trans(v), dp, input_precision=PRECISION)
        if E2 > 0:
            v = load_part(v_base, offs_n, stride_vl, left, E0 + E1, E2, KV, EDGE)
            dp = tl.dot(do2, tl.trans(v), dp, input_precision=PRECISION)
        if DROPOUT:
            c = tl.load(ckeys_ptr + start + offs_n)
            dp = tl.where(keep(row_a[:, None], row_b[:, None], c[None, :], threshold), dp, 0.0)
        ds = (p * (dp - delta[:, None])).to(k_ptr.dtype.element_ty)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    return dq0, dq1, dq2


@triton.jit
def load_row_block(
    ptr, offs, stride, end, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The parts of a block of rows; an absent part repeats the first and is never used."""
    x0 = load_part(ptr, offs, stride, end, 0, D0, WIDTH, True)
    x1 = x0
    x2 = x0
    if D1 > 0:
        x1 = load_part(ptr, offs, stride, end, D0, D1, WIDTH, True)
    if D2 > 0:
        x2 = load_part(ptr, offs, stride, end, D0 + D1, D2, WIDTH, True)
    return x0, x1, x2


@triton.jit
def store_row_block(
    ptr, x0, x1, x2, factor, offs, stride, end,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The parts of a block of rows, multiplied by `factor` (a scalar or [rows, 1])."""
    store_part(ptr, x0 * factor, offs, stride, end, 0, D0, WIDTH)
    if D1 > 0:
        store_part(ptr, x1 * factor, offs, stride, end, D0, D1, WIDTH)
    if D2 > 0:
        store_part(ptr, x2 * factor, offs, stride, end, D0 + D1, D2, WIDTH)


@triton.jit
def zero_row_block(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """float32 accumulators of a block of rows."""
    x0 = tl.zeros([ROWS, D0], tl.float32)
    x1 = x0
    x2 = x0
    if D1 > 0:
        x1 = tl.zeros([ROWS, D1], tl.float32)
    if D2 > 0:
        x2 = tl.zeros([ROWS, D2], tl.float32)
    return x0, x1, x2


@triton.jit
def key_ranges(start_m, key_end, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(full, hi): keys below `full` are seen by every query of the block, those from `hi` on by none."""
    if CAUSAL:
        hi = tl.minimum(key_end, start_m + BLOCK_M)
        full = tl.minimum(key_end, start_m + 1) // BLOCK_N * BLOCK_N
    else:
        hi = key_end
        full = key_end // BLOCK_N * BLOCK_N
    return full, hi
