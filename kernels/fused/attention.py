"""`attention` on the fused kernels: launches, custom operators, autograd. Contract: kernels.api.attention.

Saved for backward: q, k, v, O and the log-sum-exp. What specialises a compiled kernel: dtype, head widths, causal,
the kind of padding, dropout on or off, the sign of scale, the common alignment of the strides (ALIGN), whether keys
are shared, and the tile. Lengths, batch, heads, strides, scale, seeds, site and probability do not.
"""

import math

import torch
import triton
from torch import Tensor

from kernels.dropout import SEGMENT_COLUMNS, Dropout, keep_scale
from kernels.fused import attention_kernels as programs
from kernels.fused import launch, tiles_attention
from kernels.fused.launch import (
    alignment,
    architecture,
    differentiable,
    drop_arguments,
    launches,
    needs_backward,
    operator,
)
from kernels.fused.primitives import signed_threshold
from kernels.packed import head_stride, unpack

LOG2_E = 1.4426950408889634
# Columns of the dropout table are padded to the largest block, so no load of them needs a mask.
COLUMN_PAD = 256
# Programs that dK and dV of shared keys are split into: four for each of the A5000's 64 SMs. A constant, because the
# split decides the order of summation, and ranks on different devices must agree.
SHARED_PROGRAMS = 256
SUM_BLOCK = 1024


def check_supported(operator: str, *tensors: Tensor, value_width: int = 0) -> None:
    """ValueError for what the kernels cannot do: float64, sequences of q, k, v or O whose offsets pass 2^31."""
    launch.check_supported(operator, *tensors)
    for x in tensors:
        length, row = x.shape[1], math.prod(x.shape[2:-1]) * max(head_stride(x.shape[-1]), value_width)
        if length * row >= launch.INT32 or length >= SEGMENT_COLUMNS:
            raise ValueError(
                f"{operator}: expected fewer than 2^24 positions and 2^31 elements in a sequence, got {length} "
                f"positions of {row} elements; shorten the sequences"
            )


def padded_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Head widths filled with zeros up to what the kernels want (`kernels.packed.head_stride`): 40 to 48, 190 to 192.
    A model that pads its projections' weights instead saves these copies (`kernels.head_width`)."""
    missing = [head_stride(x.shape[-1]) - x.shape[-1] for x in tensors]
    return tuple(torch.nn.functional.pad(x, (0, n)) if n else x for x, n in zip(tensors, missing, strict=True))


def strides_of(*tensors: Tensor) -> tuple[int, list[int]]:
    """(ALIGN, strides of each [B, L, H, K] without the last, in units of ALIGN); 0 for dimensions of size 1."""
    strides = [0 if n == 1 else s for x in tensors for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    align = alignment(strides)
    return align, [s // align for s in strides]


def precision(dtype: torch.dtype) -> str:
    """Products of float32 tiles: three tf32 products each, errors of about 2^-21; others are exact as they are."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def width_constants(direction: str, q: Tensor, v: Tensor) -> dict[str, int]:
    """Head widths and their parts, as the kernels name them."""
    width, value_width = q.shape[3], v.shape[3]
    d, e = (tiles_attention.parts_of(direction, n, 8 * q.element_size()) for n in (width, value_width))
    return {"K": width, "D0": d[0], "D1": d[1], "D2": d[2], "KV": value_width, "E0": e[0], "E1": e[1], "E2": e[2]}


def scale_constants(scale: float, dtype: torch.dtype) -> tuple[float, dict]:
    """|scale| log2(e), and what is compile-time about scale and dtype. Scale 0 becomes 1e-30: -inf times 0 is NaN."""
    return max(abs(scale), 1e-30) * LOG2_E, {"NEGATIVE": scale < 0, "PRECISION": precision(dtype)}


def key_directions(q: Tensor, v: Tensor) -> tuple[str, ...]:
    """The kernels that dK and dV take: one or two."""
    return tiles_attention.key_directions(q.shape[3], v.shape[3], 8 * q.element_size())


def tile_for(direction: str, q: Tensor, v: Tensor, causal: bool, dropout: bool) -> dict[str, int]:
    """Launch options from the table."""
    bits = q.element_size() * 8
    return tiles_attention.tile(direction, architecture(q), q.shape[3], v.shape[3], causal, dropout, bits).options()


def padded_columns(keys: int) -> int:
    """Entries of the dropout table for a segment of `keys` keys."""
    return triton.cdiv(keys, COLUMN_PAD) * COLUMN_PAD


def column_table(segments: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    """Empty dropout table of one or two key segments, each padded, and the (first, gap) that the kernel fills it by."""
    padded = [padded_columns(n) for n in segments]
    table = torch.empty(sum(padded), dtype=torch.int32, device=device)
    return table, (padded[0], SEGMENT_COLUMNS - padded[0])


def forward_columns(p: float, rng: Tensor | None, site: int, segments: tuple[int, ...], x: Tensor) -> Tensor | None:
    """Dropout keys of every column of a forward pass."""
    if p == 0:
        return None
    table, (first, gap) = column_table(segments, x.device)
    if launches(x):
        programs._column_keys_kernel[(table.numel() // COLUMN_PAD,)](table, rng, site, first, gap, BLOCK=COLUMN_PAD)
    return table


def mask_bias(mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """A bool mask [B, Lk] as float32 0 (real) or -inf, with columns padded by -inf so that no load needs a mask.
    ValueError for lengths beside it: no kernel reads both."""
    if mask is None:
        return None
    if lengths is not None:
        raise ValueError(
            "attention: expected key_lengths or key_mask, got both; give the mask alone, it can express the lengths"
        )
    batch, keys = mask.shape
    bias = torch.full((batch, padded_columns(keys)), -math.inf, dtype=torch.float32, device=mask.device)
    bias[:, :keys].masked_fill_(mask, 0.0)
    return bias


def rest_of(o: Tensor, backward: bool) -> Tensor:
    """Empty [B, Lq, H, Kv / 2] bytes for the four bits of O beyond its 16; no elements where O is float32, or without a
    backward pass. That needs them to sum O dO (docs/kernels/attention.md, "Error budget")."""
    size = (*o.shape[:3], (o.shape[3] + 1) // 2) if backward and o.element_size() == 2 else (0,)
    return torch.empty(size, dtype=torch.uint8, device=o.device)


def present(x: Tensor) -> Tensor | None:
    """`x` as a kernel's argument: None if it has no elements."""
    return x if x.numel() else None


def empty_rows(q: Tensor, v: Tensor, direction: str, causal: bool, p: float) -> Tensor:
    """rows [2 or 4, B, H, Lpad] float32: what dQ writes of every query for dK and dV. Lpad: whole blocks of both.
    ValueError where an offset in it could pass 2^31."""
    batch, queries, heads, _ = q.shape
    directions = (direction, *key_directions(q, v))
    block = max(tile_for(d, q, v, causal, p > 0)["BLOCK_M"] for d in directions)
    padded = triton.cdiv(queries, block) * block
    if 4 * batch * heads * padded >= launch.INT32:
        raise ValueError(
            f"attention: expected fewer than 2^29 rows of queries in blocks of {block} for a backward pass, got "
            f"{batch} sequences of {heads} heads and {queries} queries; split the batch"
        )
    return torch.empty((4 if p > 0 else 2, batch, heads, padded), dtype=torch.float32, device=q.device)


@operator("march_kernels::attention", vectors=("q", "k", "v"))
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, rng: Tensor | None,
    scale: float, causal: bool, p: float, site: int, backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(O [B, Lq, H, Kv], lse [B, H, Lq] float32 in units of log2, O's further bits: `rest_of`)."""
    mask = mask_bias(mask, lengths)
    batch, queries, heads, _ = q.shape
    keys, groups, value_width = k.shape[1], k.shape[2], v.shape[3]
    o = torch.empty((batch, queries, heads, value_width), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    rest = rest_of(o, backward)
    if not launches(q) or o.numel() == 0:
        return o, lse, rest
    if keys == 0:
        return o.zero_(), lse.fill_(math.inf), rest.zero_()
    columns = forward_columns(p, rng, site, (keys,), q)
    align, strides = strides_of(q, k, v)
    tile = tile_for("forward" if mask is None else "forward_extra", q, v, causal, p > 0)
    scale_log2, constants = scale_constants(scale, q.dtype)
    grid = (triton.cdiv(queries, tile["BLOCK_M"]) * heads * batch,)
    programs._attention_fwd_kernel[grid](
        q, k, v, o, present(rest), lse, lengths, mask, rng, columns,
        *strides, 0 if mask is None else mask.stride(0),
        scale_log2, keep_scale(p), site, signed_threshold(p), heads, heads // groups, queries, keys,
        CAUSAL=causal, HAS_LENGTHS=lengths is not None, HAS_MASK=mask is not None, DROPOUT=p > 0, ALIGN=align,
        **constants, **width_constants("forward", q, v), **tile,
    )  # fmt: skip
    return o, lse, rest


def parts_of_row(x: Tensor) -> int:
    """Parts of the packed gradient [B, L, parts, H, K] that `x` is one of; 1 of a gradient of its own."""
    return x.stride(1) // (x.shape[2] * x.shape[3])


def launch_dkdv(
    dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor, rows: Tensor, columns: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, scale: float, causal: bool, p: float, handed: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes dK and dV of one key segment, given the rows of the whole softmax; handed [B, Lk, 2, G, K]: gradients of
    K and V from elsewhere, to be added."""
    batch, queries, heads, _ = q.shape
    shared, keys, groups, _ = k.shape
    if keys == 0:
        return
    pairs = batch // shared * (heads // groups)
    assert handed is None or pairs == 1, "keys that are handed on belong to one query head"
    align, strides = strides_of(q, k, v, do)
    scale_log2, constants = scale_constants(scale, q.dtype)
    for direction in key_directions(q, v):
        tile = tile_for(direction, q, v, causal, p > 0)
        base = triton.cdiv(keys, tile["BLOCK_N"]) * groups * shared
        splits = max(1, min(pairs, SHARED_PROGRAMS // base))
        wanted = {"dk": dk, "dv": dv}
        wanted = {n: x for n, x in wanted.items() if n in direction}
        # of two launches each reads its own part
        added = handed if handed is None or len(wanted) == 2 else handed.select(2, 0 if "dk" in wanted else 1)
        parts = wanted
        if splits > 1:
            parts = {
                n: torch.empty((splits, *x.shape), dtype=torch.float32, device=x.device) for n, x in wanted.items()
            }
        programs._attention_bwd_dkdv_kernel[(base * splits,)](
            q, k, v, do, parts.get("dk"), parts.get("dv"), added, rows, lengths, mask, columns,
            *strides, 0 if mask is None else mask.stride(0),
            scale_log2, scale * keep_scale(p), keep_scale(p), signed_threshold(p), rows.stride(0),
            heads, heads // groups, queries, rows.shape[3], keys, pairs, splits, shared,
            CAUSAL=causal, HAS_LENGTHS=lengths is not None, HAS_MASK=mask is not None, DROPOUT=p > 0, ALIGN=align,
            PARTS=1 if splits > 1 else parts_of_row(dk), HANDED=handed is not None, SHARED=pairs > 1,
            WANT_DK="dk" in wanted, WANT_DV="dv" in wanted,
            **constants, **width_constants(direction, q, v), **tile,
        )  # fmt: skip
        for n, out in wanted.items() if splits > 1 else ():
            grid = (triton.cdiv(out.numel(), SUM_BLOCK),)
            programs._sum_partials_kernel[grid](
                parts[n], out, out.numel(), splits, groups * out.shape[3], out.stride(1), BLOCK=SUM_BLOCK
            )


@operator("march_kernels::attention_backward", vectors=("do", "sources"))
def attention_backward_op(
    do: Tensor, sources: list[Tensor], o: Tensor, lse: Tensor, rest: Tensor, handed: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, rng: Tensor | None, scale: float, causal: bool, p: float, site: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of `sources`, contiguous: [q, k, v], or packed as [qkv] or [q, kv]. handed: see `launch_dkdv`."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sources]
    (q, k, v), mask = unpack(*sources), mask_bias(mask, lengths)
    batch, queries, heads, _ = q.shape
    keys, groups = k.shape[1], k.shape[2]
    if not launches(q):
        return gradients
    if o.numel() == 0 or keys == 0:
        return [x.zero_() for x in gradients]
    dq, dk, dv = unpack(*gradients)
    direction = "dq" if mask is None else "dq_extra"
    rows = empty_rows(q, v, direction, causal, p)
    columns = forward_columns(p, rng, site, (keys,), q)
    align, strides = strides_of(q, k, v, do)
    tile = tile_for(direction, q, v, causal, p > 0)
    scale_log2, constants = scale_constants(scale, q.dtype)
    programs._attention_bwd_dq_kernel[(rows.shape[3] // tile["BLOCK_M"] * heads * batch,)](
        q, k, v, o, present(rest), lse, do, dq, rows, lengths, mask, rng, columns,
        *strides, 0 if mask is None else mask.stride(0),
        scale_log2, scale * keep_scale(p), 1.0 / keep_scale(p), site, signed_threshold(p), rows.stride(0),
        heads, heads // groups, queries, rows.shape[3], keys,
        CAUSAL=causal, HAS_LENGTHS=lengths is not None, HAS_MASK=mask is not None, DROPOUT=p > 0, ALIGN=align,
        PARTS=parts_of_row(dq), **constants, **width_constants("dq", q, v), **tile,
    )  # fmt: skip
    launch_dkdv(dk, dv, q, k, v, do, rows, columns, lengths, mask, scale, causal, p, handed)
    return gradients


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, lengths, mask, rng, ctx.scale, ctx.causal, ctx.p, ctx.site, _ = inputs
    # else backward begins by filling gradients of lse and of the further bits with zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, lengths, mask, rng)


def _autograd(ctx, do, *_):
    q, k, v, *forward_outputs, lengths, mask, rng = ctx.saved_tensors
    settings = lengths, mask, rng, ctx.scale, ctx.causal, ctx.p, ctx.site
    return *attention_backward_op(do, [q, k, v], *forward_outputs, None, *settings), *[None] * 8


attention_op.register_autograd(_autograd, setup_context=_setup_context)


class PackedAttention(torch.autograd.Function):
    """`attention_op` of packed sources, [qkv] or [q, kv], whose gradients are packed likewise.

    Of [qkv] the keys and values are outputs too: what their other readers send back reaches this backward, where dK and
    dV start from it, instead of autograd, which would add two tensors. A function and not a registered operator,
    because these may not return views of their inputs.
    """

    @staticmethod
    def forward(lengths, mask, rng, scale, causal, p, site, backward, *sources):
        o, lse, rest = attention_op(*unpack(*sources), lengths, mask, rng, scale, causal, p, site, backward)
        return o, lse, rest, *([sources[0][:, :, 1:]] if len(sources) == 1 else [])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *padding, rng, scale, causal, p, site, _ = inputs[:8]
        ctx.settings = scale, causal, p, site
        ctx.save_for_backward(*output[:3], *padding, rng, *inputs[8:])
        ctx.mark_non_differentiable(*output[1:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, _lse, _rest, handed=None):
        o, lse, rest, lengths, mask, rng, *sources = ctx.saved_tensors
        if do is None:
            # the keys and values alone were used
            return *[None] * 8, None if handed is None else torch.cat([torch.zeros_like(handed[:, :, :1]), handed], 2)
        gradients = attention_backward_op(do, sources, o, lse, rest, handed, lengths, mask, rng, *ctx.settings)
        return *[None] * 8, *gradients


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.attention. Rows that cannot be read 16 bytes at a time cost a copy (`in_vectors`,
    `padded_heads`)."""
    rng, p, site = drop_arguments(dropout)
    check_supported("attention", q, k, v, value_width=v.shape[3])
    value_width = v.shape[3]
    q, k, v = padded_heads(q, k, v)
    backward = needs_backward(q, k, v)
    return attention_op(q, k, v, key_lengths, key_mask, rng, scale, causal, p, site, backward)[0][..., :value_width]


def self_attention(
    qkv: Tensor,
    *,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """Contract in kernels.api.self_attention. Copies as in `attention`."""
    rng, p, site = drop_arguments(dropout)
    check_supported("self_attention", qkv)
    width = qkv.shape[-1]
    (qkv,) = padded_heads(qkv)
    backward = needs_backward(qkv)
    padding = key_lengths, key_mask
    out, *_, kv = differentiable(PackedAttention, backward, *padding, rng, scale, causal, p, site, backward, qkv)
    return out[..., :width], kv[..., :width]


def cross_attention(
    q: Tensor,
    kv: Tensor,
    *,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.cross_attention. Copies as in `attention`."""
    rng, p, site = drop_arguments(dropout)
    check_supported("cross_attention", q, kv)
    width = q.shape[-1]
    sources = padded_heads(q, kv)
    backward = needs_backward(*sources)
    padding = key_lengths, key_mask
    out, *_ = differentiable(PackedAttention, backward, *padding, rng, scale, causal, p, site, backward, *sources)
    return out[..., :width]
