"""What the attention kernels share: tiles of rows, their products, score masks, the running softmax over one segment of
keys, dQ over one, what backward needs of a block of queries.

A head width is up to three parts, powers of two (`tiles_attention.head_dim_class`): D0, D1, D2 of Q and K, E0, E1, E2
of V and O, 0 where absent; a product over the width is a sum over parts. Only the last part can reach beyond the
width, where loads give 0. Scores are in units of log2(e): exp2 is one instruction, exp is two.

Strides come in units of ALIGN elements (a compile-time power of two), so that a stride of 190 is known to be even and
one of 40 to be a multiple of 8, without a compiled kernel for each stride. The innermost stride is 1.
"""

import triton
import triton.language as tl

from kernels.fused.primitives import keep, row_keys

# The running maximum before any key. Finite, so that exp2(NO_KEY - NO_KEY) is 1 and not NaN; masked scores are -inf.
NO_KEY = tl.constexpr(-1.0e30)


@triton.jit
def load_part(
    ptr, offs, stride, end, START: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS_MASKED: tl.constexpr,
    real=None,
):  # fmt: skip
    """[rows, D]: columns START ... START + D of rows `offs`; 0 from row `end` (ROWS_MASKED) and column WIDTH on, and in
    rows that are not `real`, if given."""
    d = START + tl.arange(0, D)
    ptrs = ptr + offs[:, None] * stride + d[None, :]
    if real is not None:
        return tl.load(ptrs, mask=real[:, None] & (d[None, :] < WIDTH), other=0.0)
    elif START + D > WIDTH:
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
def load_row_block(
    ptr, offs, stride, end,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WIDTH: tl.constexpr, ROWS_MASKED: tl.constexpr = True,
    real=None,
):  # fmt: skip
    """The parts of a block of rows (`load_part`); an absent part repeats the first and is never used."""
    x0 = load_part(ptr, offs, stride, end, 0, D0, WIDTH, ROWS_MASKED, real)
    x1 = x0
    x2 = x0
    if D1 > 0:
        x1 = load_part(ptr, offs, stride, end, D0, D1, WIDTH, ROWS_MASKED, real)
    if D2 > 0:
        x2 = load_part(ptr, offs, stride, end, D0 + D1, D2, WIDTH, ROWS_MASKED, real)
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
def product_over_width(x0, x1, x2, y0, y1, y2, PRECISION: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """X Y^T [rows of X, rows of Y] of two blocks of rows."""
    s = tl.dot(x0, tl.trans(y0), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(x1, tl.trans(y1), s, input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(x2, tl.trans(y2), s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(acc0, acc1, acc2, x, y0, y1, y2, PRECISION: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """acc + x Y: x [M, N], Y a block of N rows."""
    acc0 = tl.dot(x, y0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(x, y1, acc1, input_precision=PRECISION)
    if D2 > 0:
        acc2 = tl.dot(x, y2, acc2, input_precision=PRECISION)
    return acc0, acc1, acc2


@triton.jit
def query_block(blocks, H, REVERSED: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first query, sequence, head) of this program, one of `blocks` a head. REVERSED: the last, longest ones first."""
    pid = tl.program_id(0)
    block, bh = pid % blocks, pid // blocks
    if REVERSED:
        block = blocks - 1 - block
    return block * BLOCK_M, bh // H, bh % H


@triton.jit
def key_end_of(lengths_ptr, b, Lk, HAS_LENGTHS: tl.constexpr):
    """Number of leading keys of sequence b that can be real."""
    if HAS_LENGTHS:
        # bounded before it is narrowed: a length may be any int64
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), Lk).to(tl.int32)
    else:
        return Lk


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
def scores_of(
    q0, q1, q2, k_ptr, stride_kl, mask_ptr, start, offs_m, offs_n, key_end,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """(Q K^T [M, N], masked, the parts of the keys start + offs_n, and, with a mask, which of these are real).

    Keys and values of padding are not loaded, since NaN in them would outlast a probability of 0."""
    real = offs_n
    if HAS_MASK:
        real = tl.load(mask_ptr + start + offs_n) == 0.0
    k_base = k_ptr + tl.cast(start, tl.int64) * stride_kl
    k0, k1, k2 = load_row_block(
        k_base, offs_n, stride_kl, key_end - start, D0, D1, D2, K, EDGE, real if HAS_MASK else None
    )
    s = product_over_width(q0, q1, q2, k0, k1, k2, PRECISION, D1, D2)
    if NEGATIVE:
        s = -s
    return masked_scores(s, start, offs_m, offs_n, key_end, mask_ptr, EDGE, CAUSAL, HAS_MASK), k0, k1, k2, real


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr):
    """The running softmax (acc, m, l) before any key. l has 8 partial sums: the columns of a product's tile lie in four
    threads, whose sums are then added once, at the end. Wide heads and those of several parts lack the registers."""
    PARTIAL: tl.constexpr = 8 if E1 == 0 and E0 <= 128 else 1
    acc0, acc1, acc2 = zero_row_block(BLOCK_M, E0, E1, E2)
    m = tl.full([BLOCK_M], NO_KEY, tl.float32)
    l = tl.zeros([BLOCK_M, PARTIAL], tl.float32)
    return acc0, acc1, acc2, m, l


@triton.jit
def softmax_segment(
    acc0, acc1, acc2, m, l, q0, q1, q2,
    k_ptr, v_ptr, stride_kl, stride_vl, mask_ptr, ckeys_ptr, row_a, row_b, threshold, scale_log2, start_m, key_end,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One segment of keys into the running softmax (acc, m, l) of the queries from start_m on.

    m [M]: row maximum, in units of log2; l [M, 8 or 1]: partial sums of exp2(scores - m), before dropout.
    Two loops: over the blocks that every query sees in full, then over those at the diagonal and at the end
    of the keys (EDGE), which are masked.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    full, hi = key_ranges(start_m, key_end, CAUSAL, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        for start in tl.range(full if EDGE else 0, hi if EDGE else full, BLOCK_N):
            s, _, _, _, real = scores_of(
                q0, q1, q2, k_ptr, stride_kl, mask_ptr, start, offs_m, offs_n, key_end,
                EDGE, CAUSAL, HAS_MASK, NEGATIVE, PRECISION, K, D0, D1, D2,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            alpha = tl.exp2(m - m_new)
            p = tl.exp2(s * scale_log2 - m_new[:, None])
            l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BLOCK_M, BLOCK_N // l.shape[1], l.shape[1]]), 1)
            m = m_new
            if DROPOUT:
                c = tl.load(ckeys_ptr + start + offs_n)
                p = tl.where(keep(row_a[:, None], row_b[:, None], c[None, :], threshold), p, 0.0)
            v_base = v_ptr + tl.cast(start, tl.int64) * stride_vl
            v0, v1, v2 = load_row_block(
                v_base, offs_n, stride_vl, key_end - start, E0, E1, E2, KV, EDGE, real if HAS_MASK else None
            )
            acc0 *= alpha[:, None]
            if E1 > 0:
                acc1 *= alpha[:, None]
            if E2 > 0:
                acc2 *= alpha[:, None]
            p = p.to(v_ptr.dtype.element_ty)
            acc0, acc1, acc2 = add_product(acc0, acc1, acc2, p, v0, v1, v2, PRECISION, E1, E2)
    return acc0, acc1, acc2, m, l


@triton.jit
def dq_segment(
    dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, lse, delta,
    k_ptr, v_ptr, stride_kl, stride_vl, mask_ptr, ckeys_ptr, row_a, row_b, threshold, scale_log2, start_m, key_end,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what one segment of keys contributes to dQ / (scale * keep_scale); loops as in `softmax_segment`."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    full, hi = key_ranges(start_m, key_end, CAUSAL, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        for start in tl.range(full if EDGE else 0, hi if EDGE else full, BLOCK_N):
            s, k0, k1, k2, real = scores_of(
                q0, q1, q2, k_ptr, stride_kl, mask_ptr, start, offs_m, offs_n, key_end,
                EDGE, CAUSAL, HAS_MASK, NEGATIVE, PRECISION, K, D0, D1, D2,
            )  # fmt: skip
            p = tl.exp2(s * scale_log2 - lse[:, None])
            v_base = v_ptr + tl.cast(start, tl.int64) * stride_vl
            v0, v1, v2 = load_row_block(
                v_base, offs_n, stride_vl, key_end - start, E0, E1, E2, KV, EDGE, real if HAS_MASK else None
            )
            dp = product_over_width(do0, do1, do2, v0, v1, v2, PRECISION, E1, E2)
            if DROPOUT:
                c = tl.load(ckeys_ptr + start + offs_n)
                dp = tl.where(keep(row_a[:, None], row_b[:, None], c[None, :], threshold), dp, 0.0)
            ds = (p * (dp - delta[:, None])).to(k_ptr.dtype.element_ty)
            dq0, dq1, dq2 = add_product(dq0, dq1, dq2, ds, k0, k1, k2, PRECISION, D1, D2)
    return dq0, dq1, dq2


# ---------------------------------------------------------------- O beyond its type

# delta = sum(O dO) from an O rounded to 16 bits gives dQ an error common to all keys of a query, up to 3.7 times that
# of the plain formula where 2 is allowed. Four more bits of O, in `rest`, bring it to at most 0.8.


@triton.jit
def rest_shift(DTYPE: tl.constexpr):
    """Place, in a float32, of the lowest of the four bits that follow an element of 16 bits."""
    SHIFT: tl.constexpr = 12 if DTYPE.is_bf16() else 9
    return SHIFT


@triton.jit
def store_rest(ptr, x, offs, stride, end, DTYPE: tl.constexpr, START: tl.constexpr, E: tl.constexpr, KV: tl.constexpr):
    """What rounding x [M, E] float32 to DTYPE left out, as signed steps of four bits, two columns a byte."""
    SHIFT: tl.constexpr = rest_shift(DTYPE)
    rounded = x.to(DTYPE).to(tl.float32)
    # floats of one sign are ordered as their bits are: the difference of the bits counts steps of float32
    steps = (x.to(tl.int32, bitcast=True) - rounded.to(tl.int32, bitcast=True) + (1 << (SHIFT - 1))) >> SHIFT
    steps = tl.minimum(tl.maximum(steps, -8), 7) & 15
    even, odd = tl.split(tl.reshape(steps, [x.shape[0], E // 2, 2]))
    store_part(ptr, even | (odd << 4), offs, stride, end, START // 2, E // 2, (KV + 1) // 2)


@triton.jit
def load_finer(
    o_ptr, rest_ptr, offs, H, end, START: tl.constexpr, E: tl.constexpr, KV: tl.constexpr
):  # fmt: skip
    """Columns START ... START + E of O, float32, with the bits that `store_rest` kept."""
    o = load_part(o_ptr, offs, H * KV, end, START, E, KV, True)
    if rest_ptr is None:
        return o.to(tl.float32)
    else:
        SHIFT: tl.constexpr = rest_shift(o.dtype)
        HALF: tl.constexpr = (KV + 1) // 2
        pair = load_part(rest_ptr, offs, H * HALF, end, START // 2, E // 2, HALF, True).to(tl.int32)
        steps = tl.reshape(tl.join((pair << 28) >> 28, (pair << 24) >> 28), [offs.shape[0], E])
        return (o.to(tl.float32).to(tl.int32, bitcast=True) + (steps << SHIFT)).to(tl.float32, bitcast=True)


@triton.jit
def finish_rows(
    acc0, acc1, acc2, m, l, o_ptr, rest_ptr, lse_ptr, b, h, start_m, keep_scale, H, Lq,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes O = acc keep_scale / l, 0 for a query without keys, further bits of it (unless rest_ptr is None), lse."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    b64 = b.to(tl.int64)
    l = tl.sum(l, 1)
    seen = l > 0.0
    factor = tl.where(seen, keep_scale / tl.where(seen, l, 1.0), 0.0)[:, None]
    lse = tl.where(seen, m + tl.log2(tl.where(seen, l, 1.0)), float("inf"))
    tl.store(lse_ptr + (b64 * H + h) * Lq + offs_m, lse, mask=offs_m < Lq)
    row = b64 * Lq * H + h
    # part by part, O and then its further bits: wide heads have no registers for two parts in both forms
    finish_part(acc0, factor, o_ptr, rest_ptr, row, offs_m, H, Lq, 0, E0, KV)
    if E1 > 0:
        finish_part(acc1, factor, o_ptr, rest_ptr, row, offs_m, H, Lq, E0, E1, KV)
    if E2 > 0:
        finish_part(acc2, factor, o_ptr, rest_ptr, row, offs_m, H, Lq, E0 + E1, E2, KV)


@triton.jit
def finish_part(
    acc, factor, o_ptr, rest_ptr, row, offs, H, Lq, START: tl.constexpr, E: tl.constexpr, KV: tl.constexpr
):  # fmt: skip
    """Writes acc factor into columns START ... START + E of O, whose first row is `row`, and its further bits."""
    x = acc * factor
    store_part(o_ptr + row * KV, x, offs, H * KV, Lq, START, E, KV)
    if rest_ptr is not None:
        HALF: tl.constexpr = (KV + 1) // 2
        store_rest(rest_ptr + row * HALF, x, offs, H * HALF, Lq, o_ptr.dtype.element_ty, START, E, KV)


@triton.jit
def backward_rows(
    do0, do1, do2, o_ptr, rest_ptr, lse_ptr, rows_ptr, rng_ptr, b, h, start_m, inverse_keep_scale, site, plane,
    H, Lq, Lpad, DROPOUT: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(lse, delta, dropout keys A and B) of a block of queries, also written to rows [2 or 4, B, H, Lpad].

    delta = sum(O dO) / keep_scale. Queries Lq ... Lpad - 1 get lse +inf: they have probability 0 and need no mask.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    b64 = b.to(tl.int64)
    o_base = o_ptr + (b64 * Lq * H + h) * KV
    rest_base = rest_ptr
    if rest_ptr is not None:
        rest_base = rest_ptr + (b64 * Lq * H + h) * ((KV + 1) // 2)
    delta = tl.sum(load_finer(o_base, rest_base, offs_m, H, Lq, 0, E0, KV) * do0.to(tl.float32), 1)
    if E1 > 0:
        delta += tl.sum(load_finer(o_base, rest_base, offs_m, H, Lq, E0, E1, KV) * do1.to(tl.float32), 1)
    if E2 > 0:
        delta += tl.sum(load_finer(o_base, rest_base, offs_m, H, Lq, E0 + E1, E2, KV) * do2.to(tl.float32), 1)
    delta *= inverse_keep_scale
    lse = tl.load(lse_ptr + (b64 * H + h) * Lq + offs_m, mask=offs_m < Lq, other=float("inf"))
    out = rows_ptr + (b64 * H + h) * Lpad + offs_m
    tl.store(out, lse)
    tl.store(out + plane, delta)
    row_a = offs_m
    row_b = offs_m
    if DROPOUT:
        row_a, row_b = row_keys(rng_ptr, site, b, h, offs_m)
        tl.store(out + 2 * plane, row_a.to(tl.float32, bitcast=True))
        tl.store(out + 3 * plane, row_b.to(tl.float32, bitcast=True))
    return lse, delta, row_a, row_b


@triton.jit
def load_dropout_rows(rows, plane):
    """(A, B) of queries at `rows`, pointers into the plane of lse."""
    row_a = tl.load(rows + 2 * plane).to(tl.int32, bitcast=True)
    row_b = tl.load(rows + 3 * plane).to(tl.int32, bitcast=True)
    return row_a, row_b
