"""Mean cross entropy of the logits (h scale) E^T, which are never held.

    s = scale h E^T        lse = log sum_v exp(s_v)        loss = sum over valid tokens (lse - s_label) / count
    G = exp(s - lse) - onehot(label), 0 in rows of ignored tokens      c = d_loss scale / count
    dh = c G E             dE = c G^T h

Forward is one product that keeps its logits in registers: a program walks a share (a split) of the vocabulary for a
tile of tokens with a running maximum and sum, in units of log 2, and writes three numbers a token; a second kernel
joins the splits in their order, a third adds up the tokens'. Logits are never rounded to 16 bits.

Gradients have two forms (LOGITS, docs/kernels), of four products each, the forward one among them:
"recompute": forward finds dh / c too, dE makes s again in registers (linear_cross_entropy_gradients.py), and no byte of
G is written. Rows of at most 1 KiB, 512 features of 16 bits: more do not fit shared memory.
"chunks": one product writes G of a chunk of the vocabulary, at most 200 MB, the library's products read it twice. A
chunk has all tokens, so its rows of dE are complete, accumulated in float32 inside one product and rounded once; dh is
accumulated in float32 over the chunks.
c is applied to float32 results on the device, from d_loss and count: G itself stays in [-1, 1], where float16 does not
underflow, and nothing waits for the device.

A label outside [0, V) other than ignore_index is never looked up: its lse is NaN, and with it the loss, its row of dh
and all of dE. Saved: h, E, labels, lse, 1 / count, and in the form "recompute" dh / c.
T tokens, D features, V vocabulary.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import tiles_rows
from kernels.fused.launch import (
    alignment,
    architecture,
    check_supported,
    filled,
    in_vectors,
    launches,
    needs_backward,
    operator,
)
from kernels.fused.linear_cross_entropy_gradients import (
    _linear_cross_entropy_dh_kernel,
    _linear_cross_entropy_gradient_kernel,
)
from kernels.fused.primitives import aligned

# G of a chunk of the vocabulary: [T, columns] in the dtype of h
CHUNK_BYTES = 200_000_000
# Splits of the vocabulary in forward, and token tiles whose programs follow each other. A group's working set, 32 tiles
# of h and 8 of E, is 3 MB at D 512 in bf16 and stays in the L2; E is read once a group, 7 times at 13,184 tokens.
SPLITS, GROUP = 8, 32
GROUP_BACKWARD = 16
LOGITS = ("recompute", "chunks")
# "recompute": bytes of a row of h and E. Shares of the vocabulary for dh, whose partial sums are float32 [3, T, D]: 206
# tiles of tokens on 64 SMs, one each, leave a fifth of the last round idle; 618 leave 3%.
RECOMPUTE_ROW, RECOMPUTE_SPLITS = 1024, 3
# bytes of an element up to which "auto" recomputes: in float32 it is correct, and spills 2,500 registers at D 256
RECOMPUTE_ELEMENT = 2
JOIN_TOKENS, MEAN_TOKENS, SCALE_ELEMENTS = 64, 1024, 4096
LOG2E, LN2 = math.log2(math.e), math.log(2.0)


@triton.jit
def _logits(
    h_ptr, w_ptr, offs_m, offs_n, stride_h, stride_w, width,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[offs_m] E[offs_n]^T in float32, [BLOCK_M, BLOCK_N]; all offsets are of existing rows.

    The width is a run-time argument: with a constant one LLVM unrolls the whole product, 255 registers and a spill.
    """
    width = aligned(width, ALIGN)
    stride_h, stride_w = aligned(stride_h, ALIGN), aligned(stride_w, ALIGN)
    offs_k = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_h + offs_k[None, :]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        if EVEN:
            h = tl.load(h_ptrs + k)
            w = tl.load(w_ptrs + k)
        else:
            h = tl.load(h_ptrs + k, mask=(offs_k < width - k)[None, :], other=0.0)
            w = tl.load(w_ptrs + k, mask=(offs_k < width - k)[None, :], other=0.0)
        acc = tl.dot(h, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["tokens", "vocabulary"])
def _linear_cross_entropy_fwd_kernel(
    h_ptr, w_ptr, labels_ptr, top_ptr, total_ptr, target_ptr,
    tokens, vocabulary, stride_h, stride_w, width, scale_log2,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of each token and split: the largest logit (in units of log 2), the sum of 2^(logit - largest), the label's."""
    pid = tl.program_id(0)
    first = pid // (GROUP * SPLITS) * GROUP
    size = tl.minimum(tl.cdiv(tokens, BLOCK_M) - first, GROUP)
    inside = pid % (GROUP * SPLITS)
    row = (first + inside % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = inside // size
    # rows beyond the end repeat the last one, so that the inner loop needs no mask; they are not written
    offs_m = tl.minimum(row, tokens - 1)
    label = tl.load(labels_ptr + offs_m)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    target = tl.zeros([BLOCK_M], dtype=tl.float32)
    tiles = tl.cdiv(vocabulary, BLOCK_N)
    share = tl.cdiv(tiles, SPLITS)
    for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n = tl.minimum(column, vocabulary - 1)
        s = _logits(
            h_ptr, w_ptr, offs_m, offs_n, stride_h, stride_w, width, EVEN, ALIGN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        s *= scale_log2
        s = tl.where((column < vocabulary)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), axis=1)
        target += tl.sum(tl.where(column[None, :] == label[:, None], s, 0.0), axis=1)
        top = new
    out = split * tokens + row
    tl.store(top_ptr + out, top, mask=row < tokens)
    tl.store(total_ptr + out, total, mask=row < tokens)
    tl.store(target_ptr + out, target, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens", "vocabulary", "ignore_index"])
def _linear_cross_entropy_join_kernel(
    top_ptr, total_ptr, target_ptr, labels_ptr, lse_ptr, loss_ptr, sum_ptr, count_ptr, tokens, vocabulary, ignore_index,
    LN2: tl.constexpr, SPLITS: tl.constexpr, TARGETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Joins the splits, in order: lse in units of log 2, the loss of each token, sum and count of this block's."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < tokens
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(top_ptr + split * tokens + row, mask=mask, other=0.0))
    total = tl.zeros([BLOCK], dtype=tl.float32)
    target = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        # a split without columns has the sum 0 and the maximum -inf: it adds 0
        share = tl.load(top_ptr + split * tokens + row, mask=mask, other=0.0)
        total += tl.load(total_ptr + split * tokens + row, mask=mask, other=1.0) * tl.exp2(share - top)
    for split in tl.static_range(TARGETS):
        target += tl.load(target_ptr + split * tokens + row, mask=mask, other=0.0)
    label = tl.load(labels_ptr + row, mask=mask, other=0)
    valid = mask & (label != ignore_index)
    lse = tl.where(valid & ((label < 0) | (label >= vocabulary)), float("nan"), top + tl.log2(total))
    loss = tl.where(valid, (lse - target) * LN2, 0.0)
    tl.store(lse_ptr + row, lse, mask=mask)
    tl.store(loss_ptr + row, loss, mask=mask)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(loss, axis=0))
    tl.store(count_ptr + tl.program_id(0), tl.sum(valid.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["blocks"])
def _linear_cross_entropy_mean_kernel(sum_ptr, count_ptr, loss_ptr, inverse_ptr, blocks, BLOCK: tl.constexpr):
    """One program: the mean loss and 1 / count of valid tokens, 0 and 1 where there are none."""
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    valid = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, blocks, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(sum_ptr + offs, mask=offs < blocks, other=0.0)
        valid += tl.load(count_ptr + offs, mask=offs < blocks, other=0)
    inverse = 1.0 / tl.maximum(tl.sum(valid, axis=0), 1).to(tl.float32)
    tl.store(loss_ptr, tl.sum(acc, axis=0) * inverse)
    tl.store(inverse_ptr, inverse)


@triton.jit(do_not_specialize=["tokens", "columns", "first_column", "ignore_index"])
def _linear_cross_entropy_dlogits_kernel(
    h_ptr, w_ptr, labels_ptr, lse_ptr, g_ptr,
    tokens, columns, first_column, stride_h, stride_w, stride_g, width, scale_log2, ignore_index,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G of the columns [first_column, first_column + columns); w_ptr points at the first of them."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    first = pid // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tl.cdiv(tokens, BLOCK_M) - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    row = (first + inside % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = inside // size * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_n = tl.minimum(row, tokens - 1), tl.minimum(column, columns - 1)
    s = _logits(
        h_ptr, w_ptr, offs_m, offs_n, stride_h, stride_w, width, EVEN, ALIGN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    label = tl.load(labels_ptr + offs_m)
    g = tl.exp2(s * scale_log2 - tl.load(lse_ptr + offs_m)[:, None])
    g = tl.where((column + first_column)[None, :] == label[:, None], g - 1.0, g)
    g = tl.where((label != ignore_index)[:, None], g, 0.0)
    # a row of G has room for whole tiles: a mask of columns would split the stores into 2 bytes each
    offs = row.to(tl.int64)[:, None] * stride_g + column[None, :]
    tl.store(g_ptr + offs, g.to(g_ptr.dtype.element_ty), mask=(row < tokens)[:, None])


# elements is specialised, unlike other lengths: where 16 divides it the mask lets accesses be 16 bytes wide
@triton.jit(do_not_specialize=["parts"])
def _linear_cross_entropy_scale_kernel(
    x_ptr, out_ptr, d_loss_ptr, inverse_ptr, scale, parts, elements, BLOCK: tl.constexpr
):
    """out = (x[0] + x[1] + ..., in this order) scale d_loss / count, flat, in out's dtype."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(d_loss_ptr).to(tl.float32) * tl.load(inverse_ptr) * scale
    x = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        x += tl.load(x_ptr + offs, mask=offs < elements, other=0.0)
        x_ptr += elements
    tl.store(out_ptr + offs, (x * factor).to(out_ptr.dtype.element_ty), mask=offs < elements)


# ---------------------------------------------------------------- launch


def chunk_columns(tokens: int, vocabulary: int, element_size: int, block: int = 128) -> int:
    """Columns of a chunk: a multiple of `block`; nearly equal chunks of at most CHUNK_BYTES, where a block fits."""
    most = max(1, CHUNK_BYTES // (tokens * element_size) // block) * block
    chunks = triton.cdiv(vocabulary, most)
    return triton.cdiv(triton.cdiv(vocabulary, chunks), block) * block


def _product(a: Tensor, b: Tensor, acc: Tensor | None = None) -> Tensor:
    """acc + a b in float32 by the library."""
    if a.dtype != torch.float32:
        if a.device.type == "cpu":
            a, b = a.float(), b.float()
        elif acc is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        else:
            return torch.addmm(acc, a, b, out_dtype=torch.float32)
    return torch.mm(a, b) if acc is None else acc.addmm_(a, b)


def _splits(words: int, block: int) -> tuple[int, int]:
    """(number of shares of the vocabulary for dh, words of a share: whole blocks)."""
    share = triton.cdiv(triton.cdiv(words, min(RECOMPUTE_SPLITS, triton.cdiv(words, block))), block) * block
    return triton.cdiv(words, share), share


def _align(h: Tensor, weight: Tensor) -> int:
    return alignment((h.shape[1], h.stride(0), weight.stride(0)))


def _gradient_options(h: Tensor, weight: Tensor, tile: tiles_rows.Tile) -> dict[str, object]:
    width = h.shape[1]
    return {"D": width, "PARTS": tiles_rows.parts_of(width), "ALIGN": _align(h, weight), **tile.options(without="k")}


@operator("march::linear_cross_entropy", vectors=("h", "weight"))
def _forward_op(
    h: Tensor, weight: Tensor, labels: Tensor, scale: float, ignore_index: int, logits: str, with_dh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mean loss [], loss of each token [B, L], lse in units of log 2 [T], 1 / count [1]), all float32, and dh / c
    [T, D] in the dtype of h where `with_dh`, else empty.

    logits: the form of backward, one of LOGITS.
    """
    tokens, width, vocabulary = labels.numel(), h.shape[-1], weight.shape[0]

    def allocate(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=h.device)

    loss, per_token, lse, inverse = allocate(), allocate(*labels.shape), allocate(tokens), allocate(1)
    dh = allocate(*((tokens, width) if with_dh else (0,)), dtype=h.dtype)
    if tokens == 0:
        return loss.zero_(), per_token, lse, inverse.fill_(1.0), dh
    if not launches(h):
        return loss, per_token, lse, inverse, dh
    h = in_vectors(h.flatten(0, -2))
    if with_dh:
        tile = tiles_rows.product_tile(architecture(h), "gradient", 8 * h.element_size())
        splits, share = _splits(vocabulary, tile.n)
        top, total, target = allocate(splits, tokens), allocate(splits, tokens), allocate(1, tokens)
        parts = allocate(splits, tokens, width)
        _linear_cross_entropy_gradient_kernel[(triton.cdiv(tokens, tile.m) * splits,)](
            h, weight, None, labels, None, None, parts, top, total, tokens, vocabulary, share,
            h.stride(0), weight.stride(0), scale, scale * LOG2E, ignore_index,
            TOKENS=True, **_gradient_options(h, weight, tile),
        )  # fmt: skip
        rows = tiles_rows.row_tile(architecture(h), "stream", width)
        _linear_cross_entropy_dh_kernel[(triton.cdiv(tokens, rows.rows),)](
            parts, top, total, h, weight, labels, dh, target, tokens, vocabulary, h.stride(0), weight.stride(0),
            scale * LOG2E, ignore_index,
            SPLITS=splits, D=width, BLOCK_D=rows.block, ROWS=rows.rows, num_warps=rows.warps,
        )  # fmt: skip
    else:
        splits = SPLITS
        top, total, target = (allocate(splits, tokens) for _ in range(3))
        tile = tiles_rows.product_tile(architecture(h), "forward", 8 * h.element_size())
        _linear_cross_entropy_fwd_kernel[(triton.cdiv(tokens, tile.m) * SPLITS,)](
            h, weight, labels, top, total, target, tokens, vocabulary, h.stride(0), weight.stride(0), width,
            scale * LOG2E, EVEN=width % tile.k == 0, ALIGN=_align(h, weight), SPLITS=SPLITS, GROUP=GROUP,
            **tile.options(),
        )  # fmt: skip
    blocks = triton.cdiv(tokens, JOIN_TOKENS)
    sums, counts = allocate(blocks), allocate(blocks, dtype=torch.int32)
    _linear_cross_entropy_join_kernel[(blocks,)](
        top, total, target, labels, lse, per_token, sums, counts, tokens, vocabulary, ignore_index,
        LN2=LN2, SPLITS=splits, TARGETS=target.shape[0], BLOCK=JOIN_TOKENS, num_warps=2,
    )  # fmt: skip
    _linear_cross_entropy_mean_kernel[(1,)](sums, counts, loss, inverse, blocks, BLOCK=MEAN_TOKENS, num_warps=4)
    return loss, per_token, lse, inverse, dh


def _scaled(x: Tensor, out: Tensor, d_loss: Tensor, inverse: Tensor, scale: float) -> None:
    """out = the sum of x [parts, ...] times scale d_loss / count."""
    _linear_cross_entropy_scale_kernel[(triton.cdiv(out.numel(), SCALE_ELEMENTS),)](
        x, out, d_loss, inverse, scale, x.numel() // out.numel(), out.numel(), BLOCK=SCALE_ELEMENTS, num_warps=8
    )


def _recomputed(
    d_loss: Tensor, h: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, inverse: Tensor,
    scale: float, ignore_index: int, unscaled: Tensor, dh: Tensor, dw: Tensor,
) -> None:  # fmt: skip
    """Writes dh and dw, where they are not empty; no logits in memory. unscaled: dh / c."""
    if dh.numel():
        _scaled(unscaled, dh, d_loss, inverse, scale)
    if dw.numel():
        tokens = h.shape[0]
        tile = tiles_rows.product_tile(architecture(h), "gradient", 8 * h.element_size())
        _linear_cross_entropy_gradient_kernel[(triton.cdiv(dw.shape[0], tile.m),)](
            weight, h, lse, labels, d_loss, inverse, dw, None, None, dw.shape[0], tokens, tokens,
            weight.stride(0), h.stride(0), scale, scale * LOG2E, ignore_index, TOKENS=False,
            **_gradient_options(h, weight, tile),
        )  # fmt: skip


def _chunked(
    d_loss: Tensor, h: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, inverse: Tensor,
    scale: float, ignore_index: int, _: Tensor, dh: Tensor, dw: Tensor,
) -> None:  # fmt: skip
    """Writes dh and dw, where they are not empty, from chunks of G."""
    (tokens, width), vocabulary = h.shape, weight.shape[0]
    tile = tiles_rows.product_tile(architecture(h), "dlogits", 8 * h.element_size())
    # whole tiles in a row of G, which is stored without a mask of columns
    columns = chunk_columns(tokens, vocabulary, h.element_size(), max(128, tile.n))
    g = torch.empty((tokens, columns), dtype=h.dtype, device=h.device)
    wide_dh = None
    for first in range(0, vocabulary, columns):
        rows = weight[first : first + columns]
        count = rows.shape[0]
        _linear_cross_entropy_dlogits_kernel[(triton.cdiv(tokens, tile.m) * triton.cdiv(count, tile.n),)](
            h, rows, labels, lse, g, tokens, count, first, h.stride(0), weight.stride(0), columns, width,
            scale * LOG2E, ignore_index,
            EVEN=width % tile.k == 0, ALIGN=_align(h, weight), GROUP=GROUP_BACKWARD,
            **tile.options(),
        )  # fmt: skip
        if dh.numel():
            wide_dh = _product(g[:, :count], rows, wide_dh)
        if dw.numel():
            _scaled(_product(g[:, :count].T, h), dw[first : first + count], d_loss, inverse, scale)
    if wide_dh is not None:
        _scaled(wide_dh, dh, d_loss, inverse, scale)


@operator("march::linear_cross_entropy_backward", vectors=("h", "weight"))
def _backward_op(
    d_loss: Tensor, h: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, inverse: Tensor, unscaled: Tensor,
    scale: float, ignore_index: int, logits: str, needs_h: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dh [B, L, D], dE [V, D]); empty where not needed. logits: one of LOGITS."""
    dh = torch.empty(h.shape if needs_h else (0,), dtype=h.dtype, device=h.device)
    dw = torch.empty(weight.shape if needs_weight else (0,), dtype=weight.dtype, device=h.device)
    if labels.numel() == 0:
        return dh, dw.zero_()
    if not launches(h):
        return dh, dw
    form = _recomputed if logits == "recompute" else _chunked
    form(d_loss, in_vectors(h.flatten(0, -2)), weight, labels, lse, inverse, scale, ignore_index, unscaled, dh, dw)
    return dh, dw


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    h, weight, labels, scale, ignore_index, logits, _ = inputs
    _, per_token, lse, inverse, unscaled = output
    ctx.mark_non_differentiable(per_token, lse, inverse, unscaled)
    # else backward begins by filling a gradient of dh / c with zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, labels, lse, inverse, unscaled)
    ctx.settings = scale, ignore_index, logits


def _autograd_backward(ctx: Any, d_loss: Tensor | None, *_: Any):
    if d_loss is None:
        return (None,) * 7
    needs_h, needs_weight = ctx.needs_input_grad[:2]
    dh, dw = _backward_op(d_loss, *ctx.saved_tensors, *ctx.settings, needs_h, needs_weight)
    return dh if needs_h else None, dw if needs_weight else None, None, None, None, None, None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, *, scale: float, ignore_index: int, logits: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Contract in kernels.api.linear_cross_entropy. float16, bfloat16, float32; at least one word.

    logits: how backward gets them, "recompute" or "chunks"; "auto" is "recompute" for 16 bits up to 512 features, where
    it fits, else "chunks". Rows that cannot be read 16 bytes at a time are copied (kernels.fused.launch).
    """
    check_supported("linear_cross_entropy", h, weight)
    h, weight = filled(h, weight)
    row = h.shape[-1] * h.element_size()
    if logits == "auto":
        fits = row <= RECOMPUTE_ROW and h.element_size() <= RECOMPUTE_ELEMENT
        logits = "recompute" if fits else "chunks"
    if logits not in LOGITS or (logits == "recompute" and row > RECOMPUTE_ROW):
        raise ValueError(
            f"linear_cross_entropy: expected logits 'auto', 'chunks', or 'recompute' for rows of at most "
            f"{RECOMPUTE_ROW} bytes, got {logits!r} for {row}; use 'auto'"
        )
    with_dh = logits == "recompute" and needs_backward(h)
    loss, per_token, *_ = _forward_op(h, weight, labels, scale, ignore_index, logits, with_dh)
    return loss, per_token
