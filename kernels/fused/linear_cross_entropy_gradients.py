"""Device code of linear_cross_entropy without logits in memory: programs make them in registers, twice in a step.

    dh / c = softmax(s) E - E[label]        dE = c G^T h        (names: linear_cross_entropy.py)

dh / c needs no logits of its own: softmax(s) E is attention over the words, whose keys and values are both E, so the
pass that finds lse finds it too, with a running softmax. Four products in all, two in forward and two for dE.
(Milakov and Gimelshein, 2018: the running softmax; Dao et al., 2022: with the product behind it.)

One kernel does both: a program owns a block of rows (tokens for dh, words for dE) and walks the rows of the other
operand. A tile of those is loaded once and serves both products, s^T = other own^T and out += P other.
"""

import triton
import triton.language as tl

from kernels.fused.primitives import (
    add_product,
    aligned,
    load_rows,
    multiplied,
    product_over_width,
    store_rows,
    zero_rows,
)


@triton.jit
def _statistics(lse_ptr, labels_ptr, rows, valid, ignore_index):
    """(lse, label) of tokens `rows`; infinite and no word's where ignored or not valid, so that G is 0 there."""
    label = tl.load(labels_ptr + rows)
    counts = valid & (label != ignore_index)
    return tl.where(counts, tl.load(lse_ptr + rows), float("inf")), tl.where(counts, label, -1).to(tl.int32)


@triton.jit
def _softmax(s, top, total, inside):
    """One tile of the running softmax over words; s [words, tokens] in units of log 2: (2^(s - top) [words, tokens];
    the new largest logit and sum of each token; 2^(old top - new top))."""
    s = tl.where(inside[:, None], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, axis=0))
    p = tl.exp2(s - new[None, :])
    keep = tl.exp2(top - new)
    return p, new, total * keep + tl.sum(p, axis=0), keep


@triton.jit
def _store_row(ptr, a, b, rows_a, rows_b, end):
    tl.store(ptr + rows_a, a, mask=rows_a < end)
    tl.store(ptr + rows_b, b, mask=rows_b < end)


@triton.jit
def _half(acc, top, total, s, other, rows, lse, label, inside, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
    """Adds to half of the own rows what a tile of other rows gives: (sums, largest logits, their sums); s [other, own].
    TOKENS as below: softmax(s), running, else G by lse and label of the other rows."""
    if TOKENS:
        g, top, total, keep = _softmax(s, top, total, inside)
        acc = multiplied(acc, keep[:, None])
    else:
        g = tl.exp2(s - lse[:, None])
        g = tl.where(rows[None, :] == label[:, None], g - 1.0, g)
    return add_product(acc, tl.trans(g.to(other[0].dtype)), other, PRECISION), top, total


@triton.jit(do_not_specialize=["own_rows", "other_rows", "share", "ignore_index"])
def _linear_cross_entropy_gradient_kernel(
    own_ptr, other_ptr, lse_ptr, labels_ptr, d_loss_ptr, inverse_ptr, out_ptr, top_ptr, total_ptr,
    own_rows, other_rows, share, stride_own, stride_other, scale, scale_log2, ignore_index,
    TOKENS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Own rows are words: out [V, D] = dE. PARTS: of D, one or two.

    TOKENS: own rows are tokens, and this is the forward pass. lse is not known yet: as in attention, out [splits, T, D]
    is sum 2^(s - top) E over a share of the words, beside it the largest logit and the sum of each token, [splits, T]
    each, in units of log 2.
    s is transposed: products that feed one another get one layout from Triton, all warps along the columns, and the 64
    own rows fill 8 warps, where 32 other rows leave half of them to compute the same. G goes through shared memory in
    two halves, one after the other: own rows (64 KiB at D 512), other rows (32) and all of G (4) are 1 KiB too many.
    """
    HALF: tl.constexpr = BLOCK_M // 2
    stride_own, stride_other = aligned(stride_own, ALIGN), aligned(stride_other, ALIGN)
    tiles = tl.cdiv(own_rows, BLOCK_M)
    top = tl.program_id(0) % tiles * BLOCK_M
    split = tl.program_id(0) // tiles
    rows_a = top + tl.arange(0, HALF)
    rows_b = rows_a + HALF
    # in this order the even columns of s^T are the first half of the rows: split without moving a value
    order = tl.arange(0, BLOCK_M)
    rows = top + order % 2 * HALF + order // 2
    own_at = tl.minimum(rows, own_rows - 1).to(tl.int64)
    own = load_rows((own_ptr, stride_own), own_at, own_rows, PARTS, D, False)
    top_a = tl.full([HALF], float("-inf"), tl.float32)
    top_b = tl.full([HALF], float("-inf"), tl.float32)
    total_a = tl.zeros([HALF], tl.float32)
    total_b = tl.zeros([HALF], tl.float32)
    a = zero_rows(HALF, PARTS)
    b = zero_rows(HALF, PARTS)
    first = split * share
    end = tl.minimum(first + share, other_rows)
    offs_n = tl.arange(0, BLOCK_N)
    other_ptr += first.to(tl.int64) * stride_other
    for start in range(first, end, BLOCK_N):
        # rows beyond the end repeat the last one; their G is 0
        inside = offs_n < end - start
        other_at = tl.minimum(offs_n, end - start - 1)
        other = load_rows((other_ptr, stride_other), other_at, end, PARTS, D, False)
        s = product_over_width(other, own, PRECISION)
        s_a, s_b = (s * scale_log2).reshape(BLOCK_N, HALF, 2).split()
        lse, label = offs_n, offs_n
        if not TOKENS:
            lse, label = _statistics(lse_ptr, labels_ptr, start + other_at, inside, ignore_index)
        # the second half's softmax stands behind the first half's products, under which it can run
        a, top_a, total_a = _half(a, top_a, total_a, s_a, other, rows_a, lse, label, inside, TOKENS, PRECISION)
        b, top_b, total_b = _half(b, top_b, total_b, s_b, other, rows_b, lse, label, inside, TOKENS, PRECISION)
        other_ptr += BLOCK_N * stride_other.to(tl.int64)
    if TOKENS:
        factor = 1.0
        at = split * own_rows
        _store_row(top_ptr + at, top_a, top_b, rows_a, rows_b, own_rows)
        _store_row(total_ptr + at, total_a, total_b, rows_a, rows_b, own_rows)
    else:
        factor = tl.load(d_loss_ptr).to(tl.float32) * tl.load(inverse_ptr) * scale
    out = (out_ptr + split.to(tl.int64) * own_rows * D, D)
    store_rows(out, a, factor, rows_a.to(tl.int64), own_rows, PARTS, D)
    store_rows(out, b, factor, rows_b.to(tl.int64), own_rows, PARTS, D)


@triton.jit(do_not_specialize=["tokens", "vocabulary", "ignore_index"])
def _linear_cross_entropy_dh_kernel(
    parts_ptr, top_ptr, total_ptr, h_ptr, w_ptr, labels_ptr, out_ptr, target_ptr,
    tokens, vocabulary, stride_h, stride_w, scale_log2, ignore_index,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Joins the shares of the words, in order: out = dh / c = softmax(s) E - E[label], 0 where ignored, NaN where the
    label is no word; target: the label's logit, in units of log 2. (Found in the products' loop it cost 0.4 issue slots
    a product.)"""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = tl.minimum(row, tokens - 1)
    inside = (row < tokens)[:, None] & (column < D)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(top_ptr + split * tokens + at))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    offs = at.to(tl.int64)[:, None] * D + column[None, :]
    for split in tl.static_range(SPLITS):
        weight = tl.exp2(tl.load(top_ptr + split * tokens + at) - top)
        total += tl.load(total_ptr + split * tokens + at) * weight
        acc += tl.load(parts_ptr + offs, mask=inside, other=0.0) * weight[:, None]
        parts_ptr += tokens.to(tl.int64) * D
    label = tl.load(labels_ptr + at)
    valid = label != ignore_index
    known = (label >= 0) & (label < vocabulary)
    word = tl.where(valid & known, label, 0)
    e = tl.load(w_ptr + word.to(tl.int64)[:, None] * stride_w + column[None, :], mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + at.to(tl.int64)[:, None] * stride_h + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(target_ptr + row, tl.sum(h * e, axis=1) * scale_log2, mask=row < tokens)
    acc = tl.where(known[:, None], acc / total[:, None] - e, float("nan"))
    acc = tl.where(valid[:, None], acc, 0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=inside)
