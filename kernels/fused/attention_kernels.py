"""The programs of `attention`: forward, and backward in three steps (dQ, dK and dV, sum of partial dK and dV).

Equations and tiles: docs/kernels/attention.md. Shapes: q [B, Lq, H, K], k [Bk, Lk, G, K], v [Bk, Lk, G, KV], with Bk
1 or B; o, do [B, Lq, H, KV]; query head h reads key head h // GROUP. Strides of q, k, v, do are run-time arguments in
units of ALIGN; o is contiguous. dq, dk, dv: contiguous, or one of PARTS of a gradient [B, L, PARTS, H, K]; PARTS is
compile-time, as a run-time number it costs the register that K 32 lacks. lse [B, H, Lq] float32 in units of log2, +inf
for a query without keys.
"""

import triton
import triton.language as tl

from kernels.fused.attention_core import (
    add_product,
    backward_rows,
    dq_segment,
    empty_softmax,
    finish_rows,
    key_end_of,
    load_dropout_rows,
    load_row_block,
    product_over_width,
    query_block,
    softmax_segment,
    store_row_block,
    zero_row_block,
)
from kernels.fused.primitives import column_keys, keep, row_keys

# Programs are numbered in one dimension: the second and third of a CUDA grid end at 65,535.
FORWARD_RUNTIME = [
    "stride_qb", "stride_ql", "stride_qh", "stride_kb", "stride_kl", "stride_kh", "stride_vb", "stride_vl", "stride_vh",
    "stride_mb", "site", "threshold", "H", "GROUP", "Lq", "Lk",
]  # fmt: skip


@triton.jit(do_not_specialize=["site", "first", "gap"])
def _column_keys_kernel(ckeys_ptr, rng_ptr, site, first, gap, BLOCK: tl.constexpr):
    """Dropout keys of columns 0 ... first - 1, then of columns first + gap ...: one program BLOCK of them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ckeys_ptr + i, column_keys(rng_ptr, site, tl.where(i < first, i, i + gap)))


@triton.jit(do_not_specialize=FORWARD_RUNTIME)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, rest_ptr, lse_ptr, lengths_ptr, mask_ptr, rng_ptr, ckeys_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_mb,
    scale_log2, keep_scale, site, threshold, H, GROUP, Lq, Lk,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O, its further bits (unless rest_ptr is None) and lse of one block of queries of one head."""
    start_m, b, h = query_block(tl.cdiv(Lq, BLOCK_M), H, CAUSAL, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    b64, g = b.to(tl.int64), h // GROUP
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base = mask_ptr + b64 * stride_mb
    row_a = offs_m
    row_b = offs_m
    if DROPOUT:
        row_a, row_b = row_keys(rng_ptr, site, b, h, offs_m)
    q_base = q_ptr + (b64 * stride_qb + h * stride_qh) * ALIGN
    q0, q1, q2 = load_row_block(q_base, offs_m, stride_ql * ALIGN, Lq, D0, D1, D2, K)
    acc0, acc1, acc2, m, l = empty_softmax(BLOCK_M, E0, E1, E2)
    acc0, acc1, acc2, m, l = softmax_segment(
        acc0, acc1, acc2, m, l, q0, q1, q2,
        k_ptr + (b64 * stride_kb + g * stride_kh) * ALIGN, v_ptr + (b64 * stride_vb + g * stride_vh) * ALIGN,
        stride_kl * ALIGN, stride_vl * ALIGN, mask_base, ckeys_ptr, row_a, row_b, threshold, scale_log2,
        start_m, key_end_of(lengths_ptr, b, Lk, HAS_LENGTHS),
        CAUSAL, HAS_MASK, DROPOUT, NEGATIVE, PRECISION, K, D0, D1, D2, KV, E0, E1, E2, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    finish_rows(
        acc0, acc1, acc2, m, l, o_ptr, rest_ptr, lse_ptr, b, h, start_m, keep_scale, H, Lq, KV, E0, E1, E2, BLOCK_M
    )


BACKWARD_RUNTIME = [
    "stride_qb", "stride_ql", "stride_qh", "stride_kb", "stride_kl", "stride_kh", "stride_vb", "stride_vl", "stride_vh",
    "stride_dob", "stride_dol", "stride_doh", "stride_mb", "site", "threshold", "plane", "H", "GROUP", "Lq", "Lpad",
    "Lk", "PAIRS", "SPLITS", "Bk",
]  # fmt: skip


@triton.jit(do_not_specialize=[n for n in BACKWARD_RUNTIME if n not in ("PAIRS", "SPLITS", "Bk")])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, rest_ptr, lse_ptr, do_ptr, dq_ptr, rows_ptr, lengths_ptr, mask_ptr, rng_ptr, ckeys_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_dob, stride_dol, stride_doh, stride_mb,
    scale_log2, factor, inverse_keep_scale, site, threshold, plane, H, GROUP, Lq, Lpad, Lk,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head, and the rows that dK and dV read; factor = scale * keep_scale.

    The programs of a head cover Lpad queries: those beyond Lq write rows and walk over no key.
    """
    start_m, b, h = query_block(Lpad // BLOCK_M, H, CAUSAL, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    b64, g = b.to(tl.int64), h // GROUP
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base = mask_ptr + b64 * stride_mb
    do_base = do_ptr + (b64 * stride_dob + h * stride_doh) * ALIGN
    do0, do1, do2 = load_row_block(do_base, offs_m, stride_dol * ALIGN, Lq, E0, E1, E2, KV)
    lse, delta, row_a, row_b = backward_rows(
        do0, do1, do2, o_ptr, rest_ptr, lse_ptr, rows_ptr, rng_ptr, b, h, start_m, inverse_keep_scale, site, plane,
        H, Lq, Lpad, DROPOUT, KV, E0, E1, E2, BLOCK_M,
    )  # fmt: skip
    q_base = q_ptr + (b64 * stride_qb + h * stride_qh) * ALIGN
    q0, q1, q2 = load_row_block(q_base, offs_m, stride_ql * ALIGN, Lq, D0, D1, D2, K)
    dq0, dq1, dq2 = zero_row_block(BLOCK_M, D0, D1, D2)
    key_end = key_end_of(lengths_ptr, b, Lk, HAS_LENGTHS)
    dq0, dq1, dq2 = dq_segment(
        dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, lse, delta,
        k_ptr + (b64 * stride_kb + g * stride_kh) * ALIGN, v_ptr + (b64 * stride_vb + g * stride_vh) * ALIGN,
        stride_kl * ALIGN, stride_vl * ALIGN, mask_base, ckeys_ptr, row_a, row_b, threshold, scale_log2,
        start_m, tl.where(start_m < Lq, key_end, 0),
        CAUSAL, HAS_MASK, DROPOUT, NEGATIVE, PRECISION, K, D0, D1, D2, KV, E0, E1, E2, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    row = PARTS * H
    store_row_block(dq_ptr + (b64 * Lq * row + h) * K, dq0, dq1, dq2, factor, offs_m, row * K, Lq, D0, D1, D2, K)


@triton.jit
def dkdv_queries(
    dk0, dk1, dk2, dv0, dv1, dv2, k0, k1, k2, v0, v1, v2, real, column_c,
    q_ptr, do_ptr, rows_ptr, stride_ql, stride_dol, plane, threshold, scale_log2, offs_n, lo, hi, Lq,
    EDGE: tl.constexpr, ZERO_KEYS: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds what queries lo ... hi - 1 of one head contribute to dK / (scale * keep_scale) and dV / keep_scale.

    Scores are transposed, [N, M]: P^T and dS^T are then left operands of their products as they stand in registers.
    Queries beyond Lq read zeros and an lse of +inf. EDGE: some queries come before some of the keys (causal).
    ZERO_KEYS: keys that are not `real` must add nothing.
    """
    offs_m = tl.arange(0, BLOCK_M)
    for start in tl.range(lo, hi, BLOCK_M):
        q_base = q_ptr + tl.cast(start, tl.int64) * stride_ql
        do_base = do_ptr + tl.cast(start, tl.int64) * stride_dol
        rows = rows_ptr + start + offs_m
        q0, q1, q2 = load_row_block(q_base, offs_m, stride_ql, Lq - start, D0, D1, D2, K)
        s = product_over_width(k0, k1, k2, q0, q1, q2, PRECISION, D1, D2)
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
        do0, do1, do2 = load_row_block(do_base, offs_m, stride_dol, Lq - start, E0, E1, E2, KV)
        if WANT_DV:
            pd = p
            if DROPOUT:
                pd = tl.where(kept, p, 0.0)
            pd = pd.to(do_ptr.dtype.element_ty)
            dv0, dv1, dv2 = add_product(dv0, dv1, dv2, pd, do0, do1, do2, PRECISION, E1, E2)
        if WANT_DK:
            dp = product_over_width(v0, v1, v2, do0, do1, do2, PRECISION, E1, E2)
            delta = tl.load(rows + plane)
            if DROPOUT:
                dp = tl.where(kept, dp, 0.0)
            ds = (p * (dp - delta[None, :])).to(q_ptr.dtype.element_ty)
            dk0, dk1, dk2 = add_product(dk0, dk1, dk2, ds, q0, q1, q2, PRECISION, D1, D2)
    return dk0, dk1, dk2, dv0, dv1, dv2


@triton.jit(do_not_specialize=BACKWARD_RUNTIME)
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, handed_ptr, rows_ptr, lengths_ptr, mask_ptr, ckeys_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_dob, stride_dol, stride_doh, stride_mb,
    scale_log2, factor_k, factor_v, threshold, plane, H, GROUP, Lq, Lpad, Lk, PAIRS, SPLITS, Bk,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr,
    HANDED: tl.constexpr, SHARED: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one key head, from one of SPLITS ranges of the (sequence, query head) pairs
    that read them.

    SHARED: PAIRS > 1 pairs read these keys; pair r is sequence r // GROUP and query head r % GROUP of the key head.
    Writes [SPLITS, Bk, Lk, PARTS, G, width], one part. HANDED: adds what came from elsewhere, [Bk, Lk, 2, G, K] for K
    and V (or one of them where one is wanted), to the float32 sums.
    """
    PADDED: tl.constexpr = HAS_LENGTHS or HAS_MASK
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
    k_base = k_ptr + (bk64 * stride_kb + g * stride_kh + tl.cast(start_n, tl.int64) * stride_kl) * ALIGN
    v_base = v_ptr + (bk64 * stride_vb + g * stride_vh + tl.cast(start_n, tl.int64) * stride_vl) * ALIGN
    k0, k1, k2 = load_row_block(k_base, local_n, stride_kl * ALIGN, Lk - start_n, D0, D1, D2, K)
    v0, v1, v2 = load_row_block(v_base, local_n, stride_vl * ALIGN, Lk - start_n, E0, E1, E2, KV)
    dk0, dk1, dk2 = zero_row_block(BLOCK_N, D0, D1, D2)
    dv0, dv1, dv2 = zero_row_block(BLOCK_N, E0, E1, E2)
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
        b64 = b.to(tl.int64)
        key_end = key_end_of(lengths_ptr, b, Lk, HAS_LENGTHS)
        if SHARED:
            real = real_keys(lengths_ptr, mask_ptr, stride_mb, b, offs_n, Lk, HAS_LENGTHS, HAS_MASK)
        # a block without real keys has nothing to do: its range of queries is empty
        end = tl.where(start_n < key_end, Lq, 0)
        q_base = q_ptr + (b64 * stride_qb + h * stride_qh) * ALIGN
        do_base = do_ptr + (b64 * stride_dob + h * stride_doh) * ALIGN
        rows = rows_ptr + (b64 * H + h) * Lpad
        lo = 0
        if CAUSAL:
            # queries before the block see none of it, those from its end on see all
            edge = tl.minimum(start_n // BLOCK_M * BLOCK_M, end)
            lo = tl.minimum(tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M, end)
            dk0, dk1, dk2, dv0, dv1, dv2 = dkdv_queries(
                dk0, dk1, dk2, dv0, dv1, dv2, k0, k1, k2, v0, v1, v2, real, column_c,
                q_base, do_base, rows, stride_ql * ALIGN, stride_dol * ALIGN, plane, threshold, scale_log2, offs_n,
                edge, lo, Lq,
                True, SHARED and PADDED, DROPOUT, NEGATIVE, PRECISION, WANT_DK, WANT_DV,
                K, D0, D1, D2, KV, E0, E1, E2, BLOCK_M,
            )  # fmt: skip
        dk0, dk1, dk2, dv0, dv1, dv2 = dkdv_queries(
            dk0, dk1, dk2, dv0, dv1, dv2, k0, k1, k2, v0, v1, v2, real, column_c,
            q_base, do_base, rows, stride_ql * ALIGN, stride_dol * ALIGN, plane, threshold, scale_log2, offs_n,
            lo, end, Lq,
            False, SHARED and PADDED, DROPOUT, NEGATIVE, PRECISION, WANT_DK, WANT_DV,
            K, D0, D1, D2, KV, E0, E1, E2, BLOCK_M,
        )  # fmt: skip
    # only now: alive through the loop it spills two or three registers
    if not SHARED:
        real = real_keys(lengths_ptr, mask_ptr, stride_mb, bk, offs_n, Lk, HAS_LENGTHS, HAS_MASK)
    elif PADDED:
        real = offs_n < 0
        for pair in range(lo_pair, hi_pair):
            b = bk + pair // GROUP
            real |= real_keys(lengths_ptr, mask_ptr, stride_mb, b, offs_n, Lk, HAS_LENGTHS, HAS_MASK)
    row, left = PARTS * heads, Lk - start_n
    if HANDED or PRECISION == "tf32x3":
        # adds 0, which the compiler does not know: it otherwise keeps addresses from before the loop, and with those of
        # the loads spills 6 registers at K 128 (254 are used now, 190 instead of 193 at 64), in float32 one
        local_n += tl.program_id(1)
    out_row = ((tl.cast(split, tl.int64) * Bk + bk) * Lk + start_n) * row + g
    handed_row = (bk64 * Lk + start_n) * 2 * heads + g
    if WANT_DK:
        if PADDED or not SHARED:
            # rows of padding keys hold what their scores gave, infinities included: replaced, not multiplied
            dk0, dk1, dk2 = zero_unless(dk0, dk1, dk2, real, D1, D2)
        if HANDED:
            handed = handed_ptr + handed_row * K
            dk0, dk1, dk2 = add_rows(dk0, dk1, dk2, factor_k, handed, local_n, 2 * heads * K, left, D0, D1, D2, K)
            factor_k = 1.0
        store_row_block(dk_ptr + out_row * K, dk0, dk1, dk2, factor_k, local_n, row * K, left, D0, D1, D2, K)
    if WANT_DV:
        if PADDED or not SHARED:
            dv0, dv1, dv2 = zero_unless(dv0, dv1, dv2, real, E1, E2)
        if HANDED:
            if WANT_DK:
                handed_row += heads
            handed = handed_ptr + handed_row * KV
            dv0, dv1, dv2 = add_rows(dv0, dv1, dv2, factor_v, handed, local_n, 2 * heads * KV, left, E0, E1, E2, KV)
            factor_v = 1.0
        store_row_block(dv_ptr + out_row * KV, dv0, dv1, dv2, factor_v, local_n, row * KV, left, E0, E1, E2, KV)


@triton.jit
def zero_unless(x0, x1, x2, real, D1: tl.constexpr, D2: tl.constexpr):
    """The parts of a block of rows, 0 in rows that are not `real`."""
    x0 = tl.where(real[:, None], x0, 0.0)
    if D1 > 0:
        x1 = tl.where(real[:, None], x1, 0.0)
    if D2 > 0:
        x2 = tl.where(real[:, None], x2, 0.0)
    return x0, x1, x2


@triton.jit
def add_rows(
    x0, x1, x2, factor, ptr, offs, stride, end,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The parts of a block of rows, multiplied by `factor`, plus the block at `ptr`."""
    y0, y1, y2 = load_row_block(ptr, offs, stride, end, D0, D1, D2, WIDTH)
    x0 = x0 * factor + y0.to(tl.float32)
    if D1 > 0:
        x1 = x1 * factor + y1.to(tl.float32)
    if D2 > 0:
        x2 = x2 * factor + y2.to(tl.float32)
    return x0, x1, x2


@triton.jit
def real_keys(lengths_ptr, mask_ptr, stride_mb, b, offs_n, Lk, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr):
    """bool [N]: whether keys offs_n of sequence b may be attended to."""
    if HAS_MASK:
        return tl.load(mask_ptr + b.to(tl.int64) * stride_mb + offs_n) == 0.0
    else:
        return offs_n < key_end_of(lengths_ptr, b, Lk, HAS_LENGTHS)


@triton.jit(do_not_specialize=["n", "splits", "row", "out_row"])
def _sum_partials_kernel(parts_ptr, out_ptr, n, splits, row, out_row, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., in this order; parts float32 [splits, n], n / row rows of `row`
    elements, which begin `out_row` elements apart in out."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * n + offs, mask=offs < n, other=0.0)
    out = out_ptr + offs // row * out_row + offs % row
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=offs < n)
