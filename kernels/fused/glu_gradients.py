"""Device code of the products behind a plain relu's gradient: dx = g W and dW = g^T x, with g = c dh where kept.

g exists in no memory: each product reads dh, and one bit an element that forward wrote, and sets to zero what the relu
and the dropout stopped (docs/kernels/glu.md). Legend: M = B L rows, D inner width, F hidden width, W = F / 32 words.
"""

import triton
import triton.language as tl

from kernels.fused.primitives import aligned


@triton.jit
def _kept(words, BLOCK: tl.constexpr):
    """[rows, BLOCK] booleans from the words [rows, BLOCK / 32] of the columns, bit j of a word for its column j."""
    bit = tl.arange(0, 32)
    # an element's bit by a constant within its byte: the shift by whole bytes is the same for what a thread holds
    kept = (words[:, :, None] >> (bit & 24)[None, None, :]) & (1 << (bit & 7))[None, None, :]
    return kept.reshape(words.shape[0], BLOCK) != 0


@triton.jit(do_not_specialize=["M", "blocks"])
def _glu_dx_kernel(
    d_ptr, w_ptr, bits_ptr, dx_ptr, M, F, blocks, stride_d, stride_w, scale,
    D: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx [M, D] of dh [M, F], W [F, D] and the bits [W, M]."""
    WORDS: tl.constexpr = BLOCK_K // 32
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    stride_d, stride_w = aligned(stride_d, ALIGN), aligned(stride_w, ALIGN)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # offsets within the tile in 32 bits, of rows that exist; what moves on is one 64-bit address a tensor
    top = tl.program_id(0) // tiles_n * BLOCK_M
    safe = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - top)
    offs_k = tl.arange(0, BLOCK_K)
    d_offs = safe[:, None] * stride_d + offs_k[None, :]
    w_offs = offs_k[:, None] * stride_w + columns[None, :]
    word_offs = tl.arange(0, WORDS)[None, :] * M + safe[:, None]
    d_ptr += top.to(tl.int64) * stride_d
    bits_ptr += top
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(blocks):
        if EVEN:
            words = tl.load(bits_ptr + word_offs)
            d = tl.load(d_ptr + d_offs)
            w = tl.load(w_ptr + w_offs)
        else:
            inside = offs_k < F - block * BLOCK_K
            there = tl.arange(0, WORDS) * 32 < F - block * BLOCK_K
            words = tl.load(bits_ptr + word_offs, mask=there[None, :], other=0)
            d = tl.load(d_ptr + d_offs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptr + w_offs, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
        g = tl.where(_kept(words, BLOCK_K), d, 0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
        d_ptr += BLOCK_K
        w_ptr += BLOCK_K * tl.cast(stride_w, tl.int64)
        bits_ptr += WORDS * M.to(tl.int64)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    out_ptrs = dx_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(out_ptrs, (acc * scale).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "share"])
def _glu_dw_kernel(
    d_ptr, x_ptr, bits_ptr, parts_ptr, M, F, share, stride_d, stride_x, scale,
    D: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One split's part of dW, float32 [splits, F, D]: its `share` of the rows of dh [M, F] and x [M, D]."""
    WORDS: tl.constexpr = BLOCK_M // 32
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(F, BLOCK_M)
    stride_d, stride_x = aligned(stride_d, ALIGN), aligned(stride_x, ALIGN)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    hidden = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.minimum(tile // tiles_n * WORDS + tl.arange(0, WORDS), tl.cdiv(F, 32) - 1)
    first = split * share
    offs_k = tl.arange(0, BLOCK_K)
    d_offs = offs_k[:, None] * stride_d + hidden[None, :]
    x_offs = offs_k[:, None] * stride_x + columns[None, :]
    word_ptrs = bits_ptr + first + word.to(tl.int64)[None, :] * M + offs_k[:, None]
    d_ptr += first.to(tl.int64) * stride_d
    x_ptr += first.to(tl.int64) * stride_x
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    rows_left = tl.minimum(share, M - first)
    full = rows_left // BLOCK_K * BLOCK_K
    # two loops, over whole blocks of rows and over what is left: one has no mask of rows
    for EDGE in tl.static_range(2):
        for start in range(full if EDGE else 0, rows_left if EDGE else full, BLOCK_K):
            there = (offs_k < (rows_left - start if EDGE else BLOCK_K))[:, None]
            if EDGE:
                words = tl.load(word_ptrs + start, mask=there, other=0)
            else:
                words = tl.load(word_ptrs + start)
            if EVEN and not EDGE:
                d = tl.load(d_ptr + d_offs)
                x = tl.load(x_ptr + x_offs)
            elif EVEN:
                d = tl.load(d_ptr + d_offs, mask=there, other=0.0)
                x = tl.load(x_ptr + x_offs, mask=there, other=0.0)
            else:
                d = tl.load(d_ptr + d_offs, mask=there & (hidden < F)[None, :], other=0.0)
                x = tl.load(x_ptr + x_offs, mask=there & (columns < D)[None, :], other=0.0)
            g = tl.where(_kept(words, BLOCK_M), d, 0.0)
            acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
            d_ptr += BLOCK_K * tl.cast(stride_d, tl.int64)
            x_ptr += BLOCK_K * tl.cast(stride_x, tl.int64)
    inside = (hidden < F)[:, None] & (columns < D)[None, :]
    out = (split.to(tl.int64) * F + hidden)[:, None] * D + columns[None, :]
    tl.store(parts_ptr + out, acc * scale, mask=inside)
