"""`unified_attention` on the fused kernels: one softmax over [own keys, causal | other keys, padding-masked].

A program walks over the own keys and then over the others, with one running softmax (dQ: with one log-sum-exp); keys,
values and masks are read where they lie. Given the log-sum-exp of the whole row, dK and dV of a segment are those of
plain attention over it: the kernel of `attention` computes them, once a segment. Contract: kernels.api.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import Dropout, keep_scale
from kernels.fused.attention import (
    check_supported,
    empty_rows,
    forward_columns,
    launch_dkdv,
    mask_bias,
    padded_columns,
    padded_heads,
    parts_of_row,
    present,
    rest_of,
    scale_constants,
    strides_of,
    tile_for,
    width_constants,
)
from kernels.fused.attention_core import (
    backward_rows,
    dq_segment,
    empty_softmax,
    finish_rows,
    key_end_of,
    load_row_block,
    query_block,
    softmax_segment,
    store_row_block,
    zero_row_block,
)
from kernels.fused.launch import differentiable, drop_arguments, launches, needs_backward, operator
from kernels.fused.primitives import row_keys, signed_threshold
from kernels.packed import unpack

RUNTIME = [
    "stride_qb", "stride_ql", "stride_qh", "stride_kb", "stride_kl", "stride_kh", "stride_vb", "stride_vl", "stride_vh",
    "stride_ob", "stride_ol", "stride_oh", "stride_wb", "stride_wl", "stride_wh", "stride_mb", "stride_dob",
    "stride_dol", "stride_doh", "site", "threshold", "plane", "first", "H", "GROUP", "OTHER_GROUP", "Lq", "Lpad", "Lk",
    "Lo",
]  # fmt: skip


def _names(*absent: str) -> list[str]:
    return [name for name in RUNTIME if name not in absent]


@triton.jit(do_not_specialize=_names("stride_dob", "stride_dol", "stride_doh", "plane", "Lpad"))
def _unified_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, other_k_ptr, other_v_ptr, o_ptr, rest_ptr, lse_ptr, lengths_ptr, mask_ptr, rng_ptr, ckeys_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh, stride_wb, stride_wl, stride_wh, stride_mb,
    scale_log2, keep_scale, site, threshold, first, H, GROUP, OTHER_GROUP, Lq, Lk, Lo,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O, its further bits and lse of one block of queries of one head. stride_o*, stride_w*: of the other segment's
    keys and values; first: where its columns begin in the dropout table."""
    start_m, b, h = query_block(tl.cdiv(Lq, BLOCK_M), H, True, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    b64 = b.to(tl.int64)
    row_a = offs_m
    row_b = offs_m
    other_ckeys = ckeys_ptr
    if DROPOUT:
        row_a, row_b = row_keys(rng_ptr, site, b, h, offs_m)
        other_ckeys = ckeys_ptr + first
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base = mask_ptr + b64 * stride_mb
    q_base = q_ptr + (b64 * stride_qb + h * stride_qh) * ALIGN
    q0, q1, q2 = load_row_block(q_base, offs_m, stride_ql * ALIGN, Lq, D0, D1, D2, K)
    acc0, acc1, acc2, m, l = empty_softmax(BLOCK_M, E0, E1, E2)
    g = h // GROUP
    acc0, acc1, acc2, m, l = softmax_segment(
        acc0, acc1, acc2, m, l, q0, q1, q2,
        k_ptr + (b64 * stride_kb + g * stride_kh) * ALIGN, v_ptr + (b64 * stride_vb + g * stride_vh) * ALIGN,
        stride_kl * ALIGN, stride_vl * ALIGN, None, ckeys_ptr, row_a, row_b, threshold, scale_log2, start_m, Lk,
        True, False, DROPOUT, NEGATIVE, PRECISION, K, D0, D1, D2, KV, E0, E1, E2, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    g = h // OTHER_GROUP
    acc0, acc1, acc2, m, l = softmax_segment(
        acc0, acc1, acc2, m, l, q0, q1, q2,
        other_k_ptr + (b64 * stride_ob + g * stride_oh) * ALIGN,
        other_v_ptr + (b64 * stride_wb + g * stride_wh) * ALIGN,
        stride_ol * ALIGN, stride_wl * ALIGN, mask_base, other_ckeys, row_a, row_b, threshold, scale_log2,
        start_m, key_end_of(lengths_ptr, b, Lo, HAS_LENGTHS),
        False, HAS_MASK, DROPOUT, NEGATIVE, PRECISION, K, D0, D1, D2, KV, E0, E1, E2, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    finish_rows(
        acc0, acc1, acc2, m, l, o_ptr, rest_ptr, lse_ptr, b, h, start_m, keep_scale, H, Lq, KV, E0, E1, E2, BLOCK_M
    )


@triton.jit(do_not_specialize=_names())
def _unified_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, other_k_ptr, other_v_ptr, o_ptr, rest_ptr, lse_ptr, do_ptr, dq_ptr, rows_ptr,
    lengths_ptr, mask_ptr, rng_ptr, ckeys_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh, stride_wb, stride_wl, stride_wh, stride_dob, stride_dol, stride_doh, stride_mb,
    scale_log2, factor, inverse_keep_scale, site, threshold, plane, first, H, GROUP, OTHER_GROUP, Lq, Lpad, Lk, Lo,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr,
    K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KV: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head over both segments, and the rows that dK and dV read, as in
    `_attention_bwd_dq_kernel`; factor = scale * keep_scale. PARTS: as in attention."""
    start_m, b, h = query_block(Lpad // BLOCK_M, H, True, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    b64 = b.to(tl.int64)
    other_ckeys = ckeys_ptr
    if DROPOUT:
        other_ckeys = ckeys_ptr + first
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
    g = h // GROUP
    dq0, dq1, dq2 = dq_segment(
        dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, lse, delta,
        k_ptr + (b64 * stride_kb + g * stride_kh) * ALIGN, v_ptr + (b64 * stride_vb + g * stride_vh) * ALIGN,
        stride_kl * ALIGN, stride_vl * ALIGN, None, ckeys_ptr, row_a, row_b, threshold, scale_log2,
        start_m, tl.where(start_m < Lq, Lk, 0),
        True, False, DROPOUT, NEGATIVE, PRECISION, K, D0, D1, D2, KV, E0, E1, E2, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    g = h // OTHER_GROUP
    key_end = key_end_of(lengths_ptr, b, Lo, HAS_LENGTHS)
    dq0, dq1, dq2 = dq_segment(
        dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, lse, delta,
        other_k_ptr + (b64 * stride_ob + g * stride_oh) * ALIGN,
        other_v_ptr + (b64 * stride_wb + g * stride_wh) * ALIGN,
        stride_ol * ALIGN, stride_wl * ALIGN, mask_base, other_ckeys, row_a, row_b, threshold, scale_log2,
        start_m, tl.where(start_m < Lq, key_end, 0),
        False, HAS_MASK, DROPOUT, NEGATIVE, PRECISION, K, D0, D1, D2, KV, E0, E1, E2, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    row = PARTS * H
    store_row_block(dq_ptr + (b64 * Lq * row + h) * K, dq0, dq1, dq2, factor, offs_m, row * K, Lq, D0, D1, D2, K)


@operator("march_kernels::unified_attention", vectors=("q", "k", "v", "other_k", "other_v"))
def unified_attention_op(
    q: Tensor, k: Tensor, v: Tensor, other_k: Tensor, other_v: Tensor, lengths: Tensor | None, mask: Tensor | None,
    rng: Tensor | None, scale: float, p: float, site: int, backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(O [B, L, H, Kv], lse [B, H, L] float32 in units of log2, O's further bits: `rest_of`)."""
    mask = mask_bias(mask, lengths)
    batch, queries, heads, _ = q.shape
    keys, others, value_width = k.shape[1], other_k.shape[1], v.shape[3]
    o = torch.empty((batch, queries, heads, value_width), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    rest = rest_of(o, backward)
    if not launches(q) or o.numel() == 0:
        return o, lse, rest
    columns = forward_columns(p, rng, site, (keys, others), q)
    align, strides = strides_of(q, k, v, other_k, other_v)
    tile = tile_for("forward_extra", q, v, True, p > 0)
    scale_log2, constants = scale_constants(scale, q.dtype)
    _unified_attention_fwd_kernel[(triton.cdiv(queries, tile["BLOCK_M"]) * heads * batch,)](
        q, k, v, other_k, other_v, o, present(rest), lse, lengths, mask, rng, columns,
        *strides,
        0 if mask is None else mask.stride(0),
        scale_log2, keep_scale(p), site, signed_threshold(p), padded_columns(keys),
        heads, heads // k.shape[2], heads // other_k.shape[2], queries, keys, others,
        HAS_LENGTHS=lengths is not None, HAS_MASK=mask is not None, DROPOUT=p > 0, ALIGN=align,
        **constants, **width_constants("forward", q, v), **tile,
    )  # fmt: skip
    return o, lse, rest


@operator("march_kernels::unified_attention_backward", vectors=("do", "sources"))
def unified_attention_backward_op(
    do: Tensor, sources: list[Tensor], o: Tensor, lse: Tensor, rest: Tensor,
    lengths: Tensor | None, mask: Tensor | None, rng: Tensor | None, scale: float, p: float, site: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of `sources`, contiguous: [q, k, v, other k, other v], or packed as [qkv, other kv]."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sources]
    (q, k, v, other_k, other_v), mask = unpack(*sources), mask_bias(mask, lengths)
    batch, queries, heads, _ = q.shape
    keys, others = k.shape[1], other_k.shape[1]
    if not launches(q):
        return gradients
    if o.numel() == 0:
        return [x.zero_() for x in gradients]
    dq, dk, dv, other_dk, other_dv = unpack(*gradients)
    rows = empty_rows(q, v, "dq_extra", True, p)
    columns = forward_columns(p, rng, site, (keys, others), q)
    align, strides = strides_of(q, k, v, other_k, other_v, do)
    tile = tile_for("dq_extra", q, v, True, p > 0)
    scale_log2, constants = scale_constants(scale, q.dtype)
    first = padded_columns(keys)
    _unified_attention_bwd_dq_kernel[(rows.shape[3] // tile["BLOCK_M"] * heads * batch,)](
        q, k, v, other_k, other_v, o, present(rest), lse, do, dq, rows, lengths, mask, rng, columns,
        *strides,
        0 if mask is None else mask.stride(0),
        scale_log2, scale * keep_scale(p), 1.0 / keep_scale(p), site, signed_threshold(p), rows.stride(0), first,
        heads, heads // k.shape[2], heads // other_k.shape[2], queries, rows.shape[3], keys, others,
        HAS_LENGTHS=lengths is not None, HAS_MASK=mask is not None, DROPOUT=p > 0, ALIGN=align,
        PARTS=parts_of_row(dq), **constants, **width_constants("dq", q, v), **tile,
    )  # fmt: skip
    own_columns, other_columns = (None, None) if columns is None else (columns[:first], columns[first:])
    launch_dkdv(dk, dv, q, k, v, do, rows, own_columns, None, None, scale, True, p)
    launch_dkdv(other_dk, other_dv, q, other_k, other_v, do, rows, other_columns, lengths, mask, scale, False, p)
    return gradients


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, other_k, other_v, lengths, mask, rng, *ctx.settings, _ = inputs
    # else backward begins by filling gradients of lse and of the further bits with zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, lengths, mask, rng, q, k, v, other_k, other_v)


def _autograd(ctx, do, *_):
    o, lse, rest, lengths, mask, rng, *sources = ctx.saved_tensors
    gradients = unified_attention_backward_op(do, sources, o, lse, rest, lengths, mask, rng, *ctx.settings)
    return *gradients, *[None] * 7


unified_attention_op.register_autograd(_autograd, setup_context=_setup_context)


class PackedUnifiedAttention(torch.autograd.Function):
    """`unified_attention_op` of packed sources [qkv, other kv], whose gradients are packed likewise."""

    @staticmethod
    def forward(lengths, mask, rng, scale, p, site, backward, qkv, kv_other):
        return unified_attention_op(*unpack(qkv, kv_other), lengths, mask, rng, scale, p, site, backward)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        lengths, mask, rng, *ctx.settings, _, qkv, kv_other = inputs
        ctx.save_for_backward(*output, lengths, mask, rng, qkv, kv_other)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, *_):
        o, lse, rest, lengths, mask, rng, *sources = ctx.saved_tensors
        gradients = unified_attention_backward_op(do, sources, o, lse, rest, lengths, mask, rng, *ctx.settings)
        return *[None] * 7, *gradients


def unified_attention(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_other: Tensor,
    v_other: Tensor,
    *,
    scale: float,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.unified_attention. Copies as in kernels.fused.attention."""
    rng, p, site = drop_arguments(dropout)
    check_supported("unified_attention", q, k_own, v_own, k_other, v_other, value_width=v_own.shape[3])
    inputs = padded_heads(q, k_own, v_own, k_other, v_other)
    backward = needs_backward(*inputs)
    return unified_attention_op(*inputs, key_lengths, key_mask, rng, scale, p, site, backward)[0][..., : v_own.shape[3]]


def packed_unified_attention(
    qkv: Tensor,
    kv_other: Tensor,
    *,
    scale: float,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.packed_unified_attention. Copies as in kernels.fused.attention."""
    rng, p, site = drop_arguments(dropout)
    check_supported("packed_unified_attention", qkv, kv_other)
    sources = padded_heads(qkv, kv_other)
    backward = needs_backward(*sources)
    padding = key_lengths, key_mask
    out, *_ = differentiable(PackedUnifiedAttention, backward, *padding, rng, scale, p, site, backward, *sources)
    return out[..., : qkv.shape[-1]]
