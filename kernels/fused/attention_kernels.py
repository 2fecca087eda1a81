"""The programs of attention over one or two segments of keys: forward, and backward in three steps (dQ; dK and dV of a
segment; sum of partial dK and dV).

Equations and tiles: docs/kernels/attention.md. Shapes: q [B, Lq, H, K]; k [Bk, Lk, G, K], v [Bk, Lk, G, KV] with Bk 1
or B, and those of a second segment or None; o, do [B, Lq, H, KV]. Query head h reads key head h // GROUP. lse
[B, H, Lq] float32 in units of log2, +inf for a query without keys; scores are in units of log2(e): exp2 is one
instruction, exp is two. CAUSAL concerns the first segment, key lengths and mask the last.

D and E are the parts of K and KV (`tiles_attention.parts_of`), and every block of rows is a tuple of such parts, whose
products are sums over them. Only the last part can reach beyond the width, where loads give 0. Strides are run-time
arguments in units of ALIGN elements (a compile-time power of two), so that a stride of 190 is known to be even and one
of 40 to be a multiple of 8, without a compiled kernel for each; the innermost stride is 1. `rows` are a pointer to a
head's first row and the stride of its rows. Programs are numbered in one dimension: the second and third of a CUDA
grid end at 65,535.
"""

import triton
import triton.language as tl

from kernels.fused.primitives import (
    add_product,
    column_keys,
    keep,
    load_rows,
    multiplied,
    product_over_width,
    row_keys,
    store_rows,
    zero_rows,
)

# The running maximum before any key. Finite, so that exp2(NO_KEY - NO_KEY) is 1 and not NaN; masked scores are -inf.
NO_KEY = tl.constexpr(-1.0e30)
# lengths, strides and seeds do not specialise a kernel
RUNTIME = [
    *(f"stride_{x}{d}" for x in ("q", "k", "v", "k2", "v2", "do") for d in "blh"), "stride_mb", "site", "threshold",
    "plane", "first", "gap", "H", "GROUP", "GROUP2", "Lq", "Lpad", "Lk", "Lk2", "PAIRS", "SPLITS", "Bk",
]  # fmt: skip


@triton.constexpr_function
def partial_sums(E):
    """Partial sums of probabilities a query: the columns of a product's tile lie in four threads, whose sums are then
    added once, at the end. Wide heads and those of several parts lack the registers."""
    return 8 if len(E) == 1 and E[0] <= 128 else 1


# ---------------------------------------------------------------- blocks of rows


@triton.jit
def head_rows(ptr, strides, b, h, ALIGN: tl.constexpr):
    """Rows of head h of sequence b in [B, L, H, K]."""
    return ptr + (b.to(tl.int64) * strides[0] + h * strides[2]) * ALIGN, strides[1] * ALIGN


@triton.jit
def rows_from(rows, start):
    """`rows` without the first `start`."""
    return rows[0] + tl.cast(start, tl.int64) * rows[1], rows[1]


@triton.jit
def zero_unless(x, real):
    """A block of rows, 0 in rows that are not `real`."""
    parts = ()
    for i in tl.static_range(len(x)):
        parts += (tl.where(real[:, None], x[i], 0.0),)
    return parts


@triton.jit
def multiplied_and_added(x, factor, y):
    """x factor + y of two blocks of rows."""
    parts = ()
    for i in tl.static_range(len(x)):
        parts += (x[i] * factor + y[i].to(tl.float32),)
    return parts


# ---------------------------------------------------------------- a segment of keys


@triton.jit
def query_block(blocks, H, REVERSED: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first query, sequence, head) of this program, one of `blocks` a head. REVERSED: the last, longest ones first."""
    pid = tl.program_id(0)
    block, bh = pid % blocks, pid // blocks
    if REVERSED:
        block = blocks - 1 - block
    return block * BLOCK_M, bh // H, bh % H


@triton.jit
def key_end_of(lengths_ptr, b, Lk):
    """Number of leading keys of sequence b that can be real."""
    if lengths_ptr is None:
        return Lk
    else:
        # bounded before it is narrowed: a length may be any int64
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), Lk).to(tl.int32)


@triton.jit
def real_keys(lengths_ptr, mask_ptr, stride_mb, b, offs_n, Lk):
    """bool [N]: whether keys offs_n of sequence b may be attended to."""
    if mask_ptr is None:
        return offs_n < key_end_of(lengths_ptr, b, Lk)
    else:
        return tl.load(mask_ptr + b.to(tl.int64) * stride_mb + offs_n) == 0.0


@triton.jit
def open_segment(segment, lengths_ptr, b, h, ALIGN: tl.constexpr):
    """(rows of the keys, rows of the values, number of leading keys that can be real) for query head h of sequence b.
    segment: pointers, their strides, query heads a key head, length."""
    k_ptr, v_ptr, strides_k, strides_v, group, length = segment
    g = h // group
    keys = head_rows(k_ptr, strides_k, b, g, ALIGN)
    return keys, head_rows(v_ptr, strides_v, b, g, ALIGN), key_end_of(lengths_ptr, b, length)


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
def masked_scores(s, start, offs_m, offs_n, key_end, mask_ptr, EDGE: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores [M, N] with -inf where query offs_m must not see key start + offs_n. EDGE: the block may leave the
    valid region; one comparison an element serves the causal limit and the end of the keys. mask_ptr: 0 or -inf a key;
    one addition an element, where bytes would cost a comparison, a select and their conversion."""
    if EDGE:
        if CAUSAL:
            last = tl.minimum(offs_m, key_end - 1) - start
            s = tl.where(offs_n[None, :] <= last[:, None], s, float("-inf"))
        else:
            s = tl.where((offs_n < key_end - start)[None, :], s, float("-inf"))
    if mask_ptr is not None:
        s += tl.load(mask_ptr + start + offs_n)[None, :]
    return s


@triton.jit
def scores_of(
    q, keys, mask_ptr, start, offs_m, offs_n, key_end, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(Q K^T [M, N], masked, the keys start + offs_n, and, with a mask, which of these are real).

    Keys and values of padding are not loaded, since NaN in them would outlast a probability of 0."""
    real = offs_n
    if mask_ptr is not None:
        real = tl.load(mask_ptr + start + offs_n) == 0.0
    k = load_rows(rows_from(keys, start), offs_n, key_end - start, D, K, EDGE, real if mask_ptr is not None else None)
    s = product_over_width(q, k, PRECISION)
    if NEGATIVE:
        s = -s
    return masked_scores(s, start, offs_m, offs_n, key_end, mask_ptr, EDGE, CAUSAL), k, real


# ---------------------------------------------------------------- forward


@triton.jit
def softmax_segment(
    acc, m, l, q, keys, values, mask_ptr, ckeys_ptr, column, row_a, row_b, threshold, scale_log2, start_m,
    key_end,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One segment of keys into the running softmax (acc, m, l) of the queries from start_m on.

    m [M]: row maximum, in units of log2; l [M, 8 or 1]: partial sums of exp2(scores - m), before dropout. column: place
    of the segment's first key among the dropout keys.
    Two loops: over the blocks that every query sees in full, then over those at the diagonal and at the end
    of the keys (EDGE), which are masked.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    full, hi = key_ranges(start_m, key_end, CAUSAL, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        for start in tl.range(full if EDGE else 0, hi if EDGE else full, BLOCK_N):
            s, _, real = scores_of(
                q, keys, mask_ptr, start, offs_m, offs_n, key_end, EDGE, CAUSAL, NEGATIVE, PRECISION, D, K
            )
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            alpha = tl.exp2(m - m_new)
            p = tl.exp2(s * scale_log2 - m_new[:, None])
            l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BLOCK_M, BLOCK_N // l.shape[1], l.shape[1]]), 1)
            m = m_new
            if DROPOUT:
                c = tl.load(ckeys_ptr + column + start + offs_n)
                p = tl.where(keep(row_a[:, None], row_b[:, None], c[None, :], threshold), p, 0.0)
            v = load_rows(
                rows_from(values, start), offs_n, key_end - start, E, KV, EDGE, real if mask_ptr is not None else None
            )
            acc = add_product(multiplied(acc, alpha[:, None]), p.to(values[0].dtype.element_ty), v, PRECISION)
    return acc, m, l


@triton.jit(do_not_specialize=RUNTIME)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, lengths_ptr, mask_ptr, rng_ptr, ckeys_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_k2b, stride_k2l, stride_k2h, stride_v2b, stride_v2l, stride_v2h, stride_mb,
    scale_log2, keep_scale, site, threshold, first, H, GROUP, GROUP2, Lq, Lk, Lk2,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O and lse of one block of queries of one head. first: where the second segment's columns begin in ckeys."""
    start_m, b, h = query_block(tl.cdiv(Lq, BLOCK_M), H, CAUSAL, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if mask_ptr is not None:
        mask_ptr += b.to(tl.int64) * stride_mb
    own = (k_ptr, v_ptr, (stride_kb, stride_kl, stride_kh), (stride_vb, stride_vl, stride_vh), GROUP, Lk)
    other = (k2_ptr, v2_ptr, (stride_k2b, stride_k2l, stride_k2h), (stride_v2b, stride_v2l, stride_v2h), GROUP2, Lk2)
    if k2_ptr is None:
        segments = ((own, lengths_ptr, mask_ptr, 0),)
    else:
        segments = ((own, None, None, 0), (other, lengths_ptr, mask_ptr, first))
    row_a, row_b = offs_m, offs_m
    if DROPOUT:
        row_a, row_b = row_keys(rng_ptr, site, b, h, offs_m)
    q = load_rows(head_rows(q_ptr, (stride_qb, stride_ql, stride_qh), b, h, ALIGN), offs_m, Lq, D, K)
    acc = zero_rows(BLOCK_M, E)
    m = tl.full([BLOCK_M], NO_KEY, tl.float32)
    l = tl.zeros([BLOCK_M, partial_sums(E)], tl.float32)
    for i in tl.static_range(len(segments)):
        keys, values, key_end = open_segment(segments[i][0], segments[i][1], b, h, ALIGN)
        acc, m, l = softmax_segment(
            acc, m, l, q, keys, values, segments[i][2], ckeys_ptr, segments[i][3], row_a, row_b, threshold, scale_log2,
            start_m, key_end, CAUSAL and i == 0, DROPOUT, NEGATIVE, PRECISION, D, K, E, KV, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if K > 128:
        # adds 0, as in dK and dV: at K 192 eleven registers spill that hold addresses from before the loop
        offs_m += tl.program_id(1)
    l = tl.sum(l, 1)
    seen = l > 0.0
    factor = tl.where(seen, keep_scale / tl.where(seen, l, 1.0), 0.0)[:, None]
    lse = tl.where(seen, m + tl.log2(tl.where(seen, l, 1.0)), float("inf"))
    b64 = b.to(tl.int64)
    tl.store(lse_ptr + (b64 * H + h) * Lq + offs_m, lse, mask=offs_m < Lq)
    store_rows((o_ptr + (b64 * Lq * H + h) * KV, H * KV), acc, factor, offs_m, Lq, E, KV)


# ---------------------------------------------------------------- backward


@triton.jit
def backward_rows(
    do, o, lse_ptr, rows_ptr, rng_ptr, b, h, start_m, inverse_keep_scale, site, plane, H, Lq, Lpad,
    DROPOUT: tl.constexpr, E: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(lse, delta, dropout keys A and B) of a block of queries, also written to rows [2 or 4, B, H, Lpad].

    delta = sum(O dO) / keep_scale. Queries Lq ... Lpad - 1 get lse +inf: they have probability 0 and need no mask.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    o = load_rows(o, offs_m, Lq, E, KV)
    delta = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(E)):
        delta += tl.sum(o[i].to(tl.float32) * do[i].to(tl.float32), 1)
    delta *= inverse_keep_scale
    head = b.to(tl.int64) * H + h
    lse = tl.load(lse_ptr + head * Lq + offs_m, mask=offs_m < Lq, other=float("inf"))
    out = rows_ptr + head * Lpad + offs_m
    tl.store(out, lse)
    tl.store(out + plane, delta)
    row_a, row_b = offs_m, offs_m
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


@triton.jit
def dq_segment(
    dq, q, do, lse, delta, keys, values, mask_ptr, ckeys_ptr, column, row_a, row_b, threshold, scale_log2, start_m,
    key_end,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what one segment of keys contributes to dQ / (scale * keep_scale); loops as in `softmax_segment`."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    full, hi = key_ranges(start_m, key_end, CAUSAL, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        for start in tl.range(full if EDGE else 0, hi if EDGE else full, BLOCK_N):
            s, k, real = scores_of(
                q, keys, mask_ptr, start, offs_m, offs_n, key_end, EDGE, CAUSAL, NEGATIVE, PRECISION, D, K
            )
            p = tl.exp2(s * scale_log2 - lse[:, None])
            v = load_rows(
                rows_from(values, start), offs_n, key_end - start, E, KV, EDGE, real if mask_ptr is not None else None
            )
            dp = product_over_width(do, v, PRECISION)
            if DROPOUT:
                c = tl.load(ckeys_ptr + column + start + offs_n)
                dp = tl.where(keep(row_a[:, None], row_b[:, None], c[None, :], threshold), dp, 0.0)
            ds = (p * (dp - delta[:, None])).to(keys[0].dtype.element_ty)
            dq = add_product(dq, ds, k, PRECISION)
    return dq


@triton.jit(do_not_specialize=RUNTIME)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, rows_ptr,
    lengths_ptr, mask_ptr, rng_ptr, ckeys_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_k2b, stride_k2l, stride_k2h, stride_v2b, stride_v2l, stride_v2h, stride_dob, stride_dol, stride_doh,
    stride_mb,
    scale_log2, factor, inverse_keep_scale, site, threshold, plane, first, H, GROUP, GROUP2, Lq, Lpad, Lk, Lk2,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head, and the rows that dK and dV read; factor = scale * keep_scale.

    The programs of a head cover Lpad queries: those beyond Lq write rows and walk over no key. dQ is contiguous, or one
    of PARTS of a gradient [B, Lq, PARTS, H, K]; as a run-time number that costs the register that K 32 lacks.
    """
    start_m, b, h = query_block(Lpad // BLOCK_M, H, CAUSAL, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    b64 = b.to(tl.int64)
    if mask_ptr is not None:
        mask_ptr += b64 * stride_mb
    own = (k_ptr, v_ptr, (stride_kb, stride_kl, stride_kh), (stride_vb, stride_vl, stride_vh), GROUP, Lk)
    other = (k2_ptr, v2_ptr, (stride_k2b, stride_k2l, stride_k2h), (stride_v2b, stride_v2l, stride_v2h), GROUP2, Lk2)
    if k2_ptr is None:
        segments = ((own, lengths_ptr, mask_ptr, 0),)
    else:
        segments = ((own, None, None, 0), (other, lengths_ptr, mask_ptr, first))
    do = load_rows(head_rows(do_ptr, (stride_dob, stride_dol, stride_doh), b, h, ALIGN), offs_m, Lq, E, KV)
    lse, delta, row_a, row_b = backward_rows(
        do, (o_ptr + (b64 * Lq * H + h) * KV, H * KV), lse_ptr, rows_ptr, rng_ptr, b, h, start_m, inverse_keep_scale,
        site, plane, H, Lq, Lpad, DROPOUT, E, KV, BLOCK_M,
    )  # fmt: skip
    q = load_rows(head_rows(q_ptr, (stride_qb, stride_ql, stride_qh), b, h, ALIGN), offs_m, Lq, D, K)
    dq = zero_rows(BLOCK_M, D)
    for i in tl.static_range(len(segments)):
        keys, values, key_end = open_segment(segments[i][0], segments[i][1], b, h, ALIGN)
        dq = dq_segment(
            dq, q, do, lse, delta, keys, values, segments[i][2], ckeys_ptr, segments[i][3], row_a, row_b, threshold,
            scale_log2, start_m, tl.where(start_m < Lq, key_end, 0), CAUSAL and i == 0, DROPOUT, NEGATIVE, PRECISION,
            D, K, E, KV, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if (K > 192 and K <= 256) or K > 384:
        offs_m += tl.program_id(1)  # adds 0, as in forward
    row = PARTS * H
    store_rows((dq_ptr + (b64 * Lq * row + h) * K, row * K), dq, factor, offs_m, Lq, D, K)


@triton.jit
def dkdv_queries(
    dk, dv, k, v, real, column_c, queries, d_out, rows_ptr, plane, threshold, scale_log2, offs_n, lo, hi, Lq,
    EDGE: tl.constexpr, ZERO_KEYS: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds what queries lo ... hi - 1 of one head contribute to dK / (scale * keep_scale) and dV / keep_scale.

    Scores are transposed, [N, M]: P^T and dS^T are then left operands of their products as they stand in registers.
    Queries beyond Lq read zeros and an lse of +inf. EDGE: some queries come before some of the keys (causal).
    ZERO_KEYS: keys that are not `real` must add nothing.
    """
    offs_m = tl.arange(0, BLOCK_M)
    for start in tl.range(lo, hi, BLOCK_M):
        rows = rows_ptr + start + offs_m
        q = load_rows(rows_from(queries, start), offs_m, Lq - start, D, K)
        s = product_over_width(k, q, PRECISION)
        if NEGATIVE:
            s = -s
        lse = tl.load(rows)
        p = tl.exp2(s * scale_log2 - lse[None, :])
        if EDGE:
            p = tl.where(offs_n[:, None] <= (start + offs_m)[None, :], p, 0.0)
        if ZERO_KEYS:
            p = tl.where(real[:, None], p, 0.0)
        if DROPOUT:
            row_a, row_b = load_dropout_rows(rows, plane)
            kept = keep(row_a[None, :], row_b[None, :], column_c[:, None], threshold)
        do = load_rows(rows_from(d_out, start), offs_m, Lq - start, E, KV)
        if WANT_DV:
            pd = p
            if DROPOUT:
                pd = tl.where(kept, p, 0.0)
            dv = add_product(dv, pd.to(d_out[0].dtype.element_ty), do, PRECISION)
        if WANT_DK:
            dp = product_over_width(v, do, PRECISION)
            delta = tl.load(rows + plane)
            if DROPOUT:
                dp = tl.where(kept, dp, 0.0)
            ds = (p * (dp - delta[None, :])).to(queries[0].dtype.element_ty)
            dk = add_product(dk, ds, q, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, handed_ptr, rows_ptr, lengths_ptr, mask_ptr, ckeys_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_dob, stride_dol, stride_doh, stride_mb,
    scale_log2, factor_k, factor_v, threshold, plane, H, GROUP, Lq, Lpad, Lk, PAIRS, SPLITS, Bk,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    PARTS: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV (one of them where the other's pointer is None) of one block of keys of one key head, from one of
    SPLITS ranges of the (sequence, query head) pairs that read them.

    SHARED: PAIRS > 1 pairs read these keys; pair r is sequence r // GROUP and query head r % GROUP of the key head.
    Writes [SPLITS, Bk, Lk, PARTS, G, width], one part. handed: what came from elsewhere and is added to the float32
    sums, [Bk, Lk, 2, G, K] for K and V (or one of them where one is wanted), or None.
    """
    WANT_DK: tl.constexpr = dk_ptr is not None
    WANT_DV: tl.constexpr = dv_ptr is not None
    PADDED: tl.constexpr = lengths_ptr is not None or mask_ptr is not None
    blocks = tl.cdiv(Lk, BLOCK_N)
    heads = H // GROUP
    pid = tl.program_id(0)
    block, rest = pid % blocks, pid // blocks
    g, rest = rest % heads, rest // heads
    bk, split = rest % Bk, rest // Bk
    start_n = block * BLOCK_N
    local_n = tl.arange(0, BLOCK_N)
    offs_n = start_n + local_n
    bk64 = bk.to(tl.int64)
    k_rows = rows_from(head_rows(k_ptr, (stride_kb, stride_kl, stride_kh), bk, g, ALIGN), start_n)
    v_rows = rows_from(head_rows(v_ptr, (stride_vb, stride_vl, stride_vh), bk, g, ALIGN), start_n)
    k = load_rows(k_rows, local_n, Lk - start_n, D, K)
    v = load_rows(v_rows, local_n, Lk - start_n, E, KV)
    dk = zero_rows(BLOCK_N, D)
    dv = zero_rows(BLOCK_N, E)
    column_c = offs_n
    if DROPOUT:
        column_c = tl.load(ckeys_ptr + offs_n)
    real = offs_n < Lk
    lo_pair = 0
    hi_pair = 1
    if SHARED:
        lo_pair = PAIRS * split // SPLITS
        hi_pair = PAIRS * (split + 1) // SPLITS
    # constant bounds where keys are not shared: the compiler then sees no outer loop
    for pair in range(lo_pair, hi_pair):
        b = bk + pair // GROUP
        h = g * GROUP + pair % GROUP
        key_end = key_end_of(lengths_ptr, b, Lk)
        if SHARED:
            real = real_keys(lengths_ptr, mask_ptr, stride_mb, b, offs_n, Lk)
        # a block without real keys has nothing to do: its range of queries is empty
        end = tl.where(start_n < key_end, Lq, 0)
        queries = head_rows(q_ptr, (stride_qb, stride_ql, stride_qh), b, h, ALIGN)
        d_out = head_rows(do_ptr, (stride_dob, stride_dol, stride_doh), b, h, ALIGN)
        rows = rows_ptr + (b.to(tl.int64) * H + h) * Lpad
        lo = 0
        if CAUSAL:
            # queries before the block see none of it, those from its end on see all
            edge = tl.minimum(start_n // BLOCK_M * BLOCK_M, end)
            lo = tl.minimum(tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M, end)
            dk, dv = dkdv_queries(
                dk, dv, k, v, real, column_c, queries, d_out, rows, plane, threshold, scale_log2, offs_n, edge, lo, Lq,
                True, SHARED and PADDED, DROPOUT, NEGATIVE, PRECISION, WANT_DK, WANT_DV, D, K, E, KV, BLOCK_M,
            )  # fmt: skip
        dk, dv = dkdv_queries(
            dk, dv, k, v, real, column_c, queries, d_out, rows, plane, threshold, scale_log2, offs_n, lo, end, Lq,
            False, SHARED and PADDED, DROPOUT, NEGATIVE, PRECISION, WANT_DK, WANT_DV, D, K, E, KV, BLOCK_M,
        )  # fmt: skip
    # only now: alive through the loop it spills two or three registers
    if not SHARED:
        real = real_keys(lengths_ptr, mask_ptr, stride_mb, bk, offs_n, Lk)
    elif PADDED:
        real = offs_n < 0
        for pair in range(lo_pair, hi_pair):
            real |= real_keys(lengths_ptr, mask_ptr, stride_mb, bk + pair // GROUP, offs_n, Lk)
    if handed_ptr is not None or PRECISION == "tf32x3" or K > 112:
        # adds 0, which the compiler does not know: it otherwise keeps addresses from before the loop, and with those of
        # the loads spills 6 registers at K 128 (254 are used now, 190 instead of 193 at 64), of the stores alone two
        # (216 are used now), in float32 one
        local_n += tl.program_id(1)
    row, left = PARTS * heads, Lk - start_n
    out_row = ((tl.cast(split, tl.int64) * Bk + bk) * Lk + start_n) * row + g
    handed_row = (bk64 * Lk + start_n) * 2 * heads + g
    if WANT_DK:
        if PADDED or not SHARED:
            # rows of padding keys hold what their scores gave, infinities included: replaced, not multiplied
            dk = zero_unless(dk, real)
        if handed_ptr is not None:
            handed = load_rows((handed_ptr + handed_row * K, 2 * heads * K), local_n, left, D, K)
            dk = multiplied_and_added(dk, factor_k, handed)
            factor_k = 1.0
        store_rows((dk_ptr + out_row * K, row * K), dk, factor_k, local_n, left, D, K)
    if WANT_DV:
        if PADDED or not SHARED:
            dv = zero_unless(dv, real)
        if handed_ptr is not None:
            if WANT_DK:
                handed_row += heads
            handed = load_rows((handed_ptr + handed_row * KV, 2 * heads * KV), local_n, left, E, KV)
            dv = multiplied_and_added(dv, factor_v, handed)
            factor_v = 1.0
        store_rows((dv_ptr + out_row * KV, row * KV), dv, factor_v, local_n, left, E, KV)


# ---------------------------------------------------------------- beside the products


@triton.jit(do_not_specialize=RUNTIME)
def _column_keys_kernel(ckeys_ptr, rng_ptr, site, first, gap, BLOCK: tl.constexpr):
    """Dropout keys of columns 0 ... first - 1, then of columns first + gap ...: one program BLOCK of them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ckeys_ptr + i, column_keys(rng_ptr, site, tl.where(i < first, i, i + gap)))
