"""Attention on the fused kernels, over one segment of keys or two: launches, custom operators, autograd. Contract:
kernels.api.

Sources are [q, k, v] and perhaps the second segment's k and v, or packed tensors that hold these (`kernels.packed`).
Saved for backward: the sources, O and the log-sum-exp. What specialises a compiled kernel: dtype, head widths, the
number of segments, causal, the kind of padding, dropout on or off, the sign of scale, the common alignment of the
strides (ALIGN), whether keys are shared, and the tile. Lengths, batch, heads, strides, scale, seeds, site and
probability do not.
"""

import math
from typing import Any

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
from kernels.fused.primitives import _sum_partials_kernel, signed_threshold
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


def precision(dtype: torch.dtype) -> str:
    """Products of float32 tiles: three tf32 products each, errors of about 2^-21; others are exact as they are."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def arguments(
    direction: str, lengths: Tensor | None, mask: Tensor | None, scale: float, causal: bool, p: float,
    **tensors: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """What the kernels of a call have in common, by their names. tensors: q, k, v and what else [B, L, H, K] the kernel
    of this direction reads with strides, None where it is absent."""
    found: dict[str, Any] = {f"{n}_ptr": x for n, x in tensors.items()}
    strides = {
        f"stride_{n}{d}": None if x is None else 0 if x.shape[i] == 1 else x.stride(i)
        for n, x in tensors.items()
        for i, d in enumerate("blh")
    }
    align = alignment(s for s in strides.values() if s)
    found |= {n: s and s // align for n, s in strides.items()}
    q, k, v = (x for x in (tensors["q"], tensors["k"], tensors["v"]) if x is not None)
    width, value_width, bits = q.shape[3], v.shape[3], 8 * q.element_size()
    tile = tiles_attention.tile(direction, architecture(q), width, value_width, causal, p > 0, bits)
    return found | {
        "lengths_ptr": lengths, "mask_ptr": mask, "stride_mb": None if mask is None else mask.stride(0),
        # of scale 0 this is not 0: -inf times 0 is NaN
        "scale_log2": max(abs(scale), 1e-30) * LOG2_E, "threshold": signed_threshold(p),
        "H": q.shape[2], "GROUP": q.shape[2] // k.shape[2], "Lq": q.shape[1], "Lk": k.shape[1],
        "CAUSAL": causal, "DROPOUT": p > 0, "NEGATIVE": scale < 0, "PRECISION": precision(q.dtype), "ALIGN": align,
        "D": tiles_attention.parts_of(direction, width, bits), "K": width,
        "E": tiles_attention.parts_of(direction, value_width, bits), "KV": value_width, **tile.options(),
    }  # fmt: skip


def query_arguments(
    direction: str, q: Tensor, keys: tuple[Tensor, ...], lengths: Tensor | None, mask: Tensor | None,
    rng: Tensor | None, scale: float, causal: bool, p: float, site: int, **further: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """`arguments` of a kernel that walks over `keys`: [k, v], or those of two segments."""
    (k, v), (k2, v2) = keys[:2], keys[2:] or (None, None)
    direction += "" if mask is None and k2 is None else "_extra"
    columns = dropout_columns(p, rng, site, *(x.shape[1] for x in keys[::2]), x=q)
    return arguments(direction, lengths, mask, scale, causal, p, q=q, k=k, v=v, k2=k2, v2=v2, **further) | {
        "rng_ptr": rng, "ckeys_ptr": columns, "site": site, "first": None if k2 is None else padded_columns(k.shape[1]),
        "GROUP2": None if k2 is None else q.shape[2] // k2.shape[2], "Lk2": None if k2 is None else k2.shape[1],
    }  # fmt: skip


def padded_columns(keys: int) -> int:
    """Entries of the dropout table for a segment of `keys` keys."""
    return triton.cdiv(keys, COLUMN_PAD) * COLUMN_PAD


def dropout_columns(p: float, rng: Tensor | None, site: int, *segments: int, x: Tensor) -> Tensor | None:
    """Dropout keys int32 of every column of one or two key segments, each padded; None without dropout."""
    if p == 0:
        return None
    padded = [padded_columns(n) for n in segments]
    table = torch.empty(sum(padded), dtype=torch.int32, device=x.device)
    programs._column_keys_kernel[(table.numel() // COLUMN_PAD,)](
        table, rng, site, padded[0], SEGMENT_COLUMNS - padded[0], BLOCK=COLUMN_PAD
    )
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


@operator("march_kernels::attention", vectors=("sources",))
def attention_op(
    sources: list[Tensor], lengths: Tensor | None, mask: Tensor | None, rng: Tensor | None,
    scale: float, causal: bool, p: float, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(O [B, Lq, H, Kv], lse [B, H, Lq] float32 in units of log2)."""
    (q, *keys), mask = unpack(*sources), mask_bias(mask, lengths)
    batch, queries, heads, _ = q.shape
    o = torch.empty((batch, queries, heads, keys[1].shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if not launches(q) or o.numel() == 0:
        return o, lse
    given = query_arguments("forward", q, tuple(keys), lengths, mask, rng, scale, causal, p, site)
    programs._attention_fwd_kernel[(triton.cdiv(queries, given["BLOCK_M"]) * heads * batch,)](
        o_ptr=o, lse_ptr=lse, keep_scale=keep_scale(p), **given
    )
    return o, lse


def empty_rows(q: Tensor, keys: list[Tensor], block: int, causal: bool, p: float) -> Tensor:
    """rows [2 or 4, B, H, Lpad] float32: what dQ writes of every query for dK and dV. Lpad: whole blocks of both, of
    `block` queries in dQ. ValueError where an offset in it could pass 2^31."""
    batch, queries, heads, _ = q.shape
    shape = q.shape[3], keys[1].shape[3], causal, p > 0, 8 * q.element_size()
    directions = {d for i in range(0, len(keys), 2) for d in key_directions(q, *keys[i : i + 2])}
    block = max(block, *(tiles_attention.tile(direction, architecture(q), *shape).m for direction in directions))
    padded = triton.cdiv(queries, block) * block
    if 4 * batch * heads * padded >= launch.INT32:
        raise ValueError(
            f"attention: expected fewer than 2^29 rows of queries in blocks of {block} for a backward pass, got "
            f"{batch} sequences of {heads} heads and {queries} queries; split the batch"
        )
    return torch.empty((4 if p > 0 else 2, batch, heads, padded), dtype=torch.float32, device=q.device)


def key_directions(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, ...]:
    """The kernels that dK and dV take: one or two."""
    found = tiles_attention.key_directions(q.shape[3], v.shape[3], 8 * q.element_size())
    shared = k.shape[0] * k.shape[2] < q.shape[0] * q.shape[2]
    return ("dkdv_shared",) if shared and len(found) == 1 else found


def parts_of_row(x: Tensor) -> int:
    """Parts of the packed gradient [B, L, parts, H, K] that `x` is one of; 1 of a gradient of its own."""
    return x.stride(1) // (x.shape[2] * x.shape[3])


def launch_dkdv(
    segment: tuple[Tensor, ...], columns: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, scale: float, causal: bool, p: float, handed: Tensor | None,
) -> None:  # fmt: skip
    """Writes dK and dV of one key segment (dk, dv, q, k, v, do, rows of the whole softmax); handed
    [B, Lk, 2, G, K]: gradients of K and V from elsewhere, to be added."""
    dk, dv, q, k, v, do, rows = segment
    shared, keys, groups, _ = k.shape
    if keys == 0:
        return
    pairs = q.shape[0] // shared * (q.shape[2] // groups)
    assert handed is None or pairs == 1, "keys that are handed on belong to one query head"
    for direction in key_directions(q, k, v):
        given = arguments(direction, lengths, mask, scale, causal, p, q=q, k=k, v=v, do=do)
        base = triton.cdiv(keys, given["BLOCK_N"]) * groups * shared
        splits = max(1, min(pairs, SHARED_PROGRAMS // base))
        wanted = {n: x for n, x in (("dk", dk), ("dv", dv)) if n in direction}
        # of two launches each reads its own part
        added = handed if handed is None or len(wanted) == 2 else handed.select(2, 0 if "dk" in wanted else 1)
        parts = wanted
        if splits > 1:
            parts = {
                n: torch.empty((splits, *x.shape), dtype=torch.float32, device=x.device) for n, x in wanted.items()
            }
        programs._attention_bwd_dkdv_kernel[(base * splits,)](
            dk_ptr=parts.get("dk"), dv_ptr=parts.get("dv"), handed_ptr=added, rows_ptr=rows, ckeys_ptr=columns,
            factor_k=scale * keep_scale(p), factor_v=keep_scale(p), plane=rows.stride(0), Lpad=rows.shape[3],
            PAIRS=pairs, SPLITS=splits, Bk=shared, PARTS=1 if splits > 1 else parts_of_row(dk), SHARED=pairs > 1,
            **given,
        )  # fmt: skip
        for n, out in wanted.items() if splits > 1 else ():
            grid = (triton.cdiv(out.numel(), SUM_BLOCK),)
            _sum_partials_kernel[grid](
                parts[n], out, out.numel(), splits, groups * out.shape[3], out.stride(1), BLOCK=SUM_BLOCK
            )


@operator("march_kernels::attention_backward", vectors=("do", "sources"))
def attention_backward_op(
    do: Tensor, sources: list[Tensor], o: Tensor, lse: Tensor, handed: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, rng: Tensor | None, scale: float, causal: bool, p: float, site: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of `sources`, contiguous and packed as they are. handed: see `launch_dkdv`."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sources]
    (q, *keys), mask = unpack(*sources), mask_bias(mask, lengths)
    batch, _, heads, _ = q.shape
    if not launches(q):
        return gradients
    if o.numel() == 0 or all(x.numel() == 0 for x in keys):
        return [x.zero_() for x in gradients]
    dq, *d_keys = unpack(*gradients)
    given = query_arguments("dq", q, tuple(keys), lengths, mask, rng, scale, causal, p, site, do=do)
    rows, columns, first = empty_rows(q, keys, given["BLOCK_M"], causal, p), given["ckeys_ptr"], given["first"]
    programs._attention_bwd_dq_kernel[(rows.shape[3] // given["BLOCK_M"] * heads * batch,)](
        o_ptr=o, lse_ptr=lse, dq_ptr=dq, rows_ptr=rows, factor=scale * keep_scale(p),
        inverse_keep_scale=1.0 / keep_scale(p), plane=rows.stride(0), Lpad=rows.shape[3], PARTS=parts_of_row(dq),
        **given,
    )  # fmt: skip
    segments = [(*d_keys[i : i + 2], q, *keys[i : i + 2], do, rows) for i in range(0, len(keys), 2)]
    if first is not None:
        own, columns = (None, None) if columns is None else (columns[:first], columns[first:])
        launch_dkdv(segments[0], own, None, None, scale, causal, p, None)
        causal = False
    launch_dkdv(segments[-1], columns, lengths, mask, scale, causal, p, handed)
    return gradients


class Attention(torch.autograd.Function):
    """`attention_op` of sources whose gradients are packed as they are.

    Of [qkv] the keys and values are outputs too: what their other readers send back reaches this backward, where dK and
    dV start from it, instead of autograd, which would add two tensors. A function and not a registered operator,
    because these may not return views of their inputs.
    """

    @staticmethod
    def forward(lengths, mask, rng, scale, causal, p, site, *sources):
        o, lse = attention_op(list(sources), lengths, mask, rng, scale, causal, p, site)
        return o, lse, *([sources[0][:, :, 1:]] if len(sources) == 1 else [])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *masks, ctx.scale, ctx.causal, ctx.p, ctx.site = inputs[:7]
        ctx.save_for_backward(*output[:2], *masks, *inputs[7:])
        ctx.mark_non_differentiable(output[1])
        # else backward begins by filling the gradient of lse with zeros
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, _lse, handed=None):
        o, lse, lengths, mask, rng, *sources = ctx.saved_tensors
        if do is None:
            # the keys and values alone were used
            return *[None] * 7, None if handed is None else torch.cat([torch.zeros_like(handed[:, :, :1]), handed], 2)
        settings = lengths, mask, rng, ctx.scale, ctx.causal, ctx.p, ctx.site
        return *[None] * 7, *attention_backward_op(do, sources, o, lse, handed, *settings)


def attention(
    q: Tensor, *keys: Tensor | None, scale: float, causal: bool, key_lengths: Tensor | None, key_mask: Tensor | None,
    dropout: Dropout | None, return_kv: bool = False, **named: Tensor | None,
) -> Any:  # fmt: skip
    """Contract in kernels.api.attention. Rows that cannot be read 16 bytes at a time cost a copy (`in_vectors`,
    `padded_heads`)."""
    sources = [x for x in (q, *keys, *(named.get(name) for name in ("k", "v", "k2", "v2"))) if x is not None]
    rng, p, site = drop_arguments(dropout)
    width = unpack(*sources)[2].shape[3]
    check_supported("attention", *sources, value_width=width)
    settings = key_lengths, key_mask, rng, scale, causal, p, site
    padded = padded_heads(*sources)
    out, _, *kv = differentiable(Attention, needs_backward(*padded), *settings, *padded)
    return (out[..., :width], kv[0][..., :width]) if return_kv else out[..., :width]
