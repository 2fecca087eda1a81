"""Token and position embedding with their dropouts, backward written out."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dropout import Dropout, SiteKeys, pack_keys, site_keys, unpack_keys
from kernels.portable.drop import apply_, scale_of
from kernels.reference import at_least_float32


class _Embedding(torch.autograd.Function):
    """weight (dropout(E[ids]) + dropout(T[:L])); saves the ids and the dropout keys."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        positions: Tensor,
        weight: float,
        keys: SiteKeys | None,
        position_keys: SiteKeys | None,
    ) -> Tensor:
        ctx.weight = weight
        tokens = apply_(F.embedding(ids, table), keys).mul_(weight * scale_of(keys))
        places = positions[: ids.shape[1]]
        if position_keys is not None:
            places = apply_(places.expand_as(tokens).contiguous(), position_keys)
        ctx.save_for_backward(ids, *pack_keys(keys, position_keys))
        ctx.p, ctx.position_p = (None if k is None else k.p for k in (keys, position_keys))
        ctx.shapes = table.shape, positions.shape
        return tokens.add_(places, alpha=weight * scale_of(position_keys))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor):  # type: ignore[override]
        ids, *drawn = ctx.saved_tensors
        keys, position_keys = unpack_keys(drawn, ctx.p, ctx.position_p)
        table_shape, position_shape = ctx.shapes
        d_table = d_positions = None
        if ctx.needs_input_grad[1]:
            rows = apply_(d_out * (ctx.weight * scale_of(keys)), keys).flatten(0, 1)
            d_table = _scatter(rows, ids.flatten(), table_shape)
        if ctx.needs_input_grad[2]:
            places = apply_(d_out * (ctx.weight * scale_of(position_keys)), position_keys)
            d_positions = d_out.new_zeros(position_shape)
            torch.sum(places, 0, out=d_positions[: ids.shape[1]])
        return None, d_table, d_positions, None, None, None


def _scatter(rows: Tensor, ids: Tensor, shape: torch.Size) -> Tensor:
    """Dense gradient of a table: rows [T, D] added at ids [T], in float32 where the rows are 16-bit."""
    out = rows.new_zeros(shape)
    wide = at_least_float32(rows.dtype)
    if rows.dtype == wide or ids.numel() == 0:
        return out.index_add_(0, ids, rows)
    # frequent tokens add hundreds of rows, of which 16-bit accumulation would lose the small ones; rows of one token
    # share a place, so every copy to its row of the table writes the same value
    ids, order = ids.sort(stable=True)
    place = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).to(ids.dtype)]).cumsum(0)
    total = torch.zeros(rows.shape, dtype=wide, device=rows.device).index_add_(0, place, rows[order].to(wide))
    return out.index_copy_(0, ids, total[place].to(rows.dtype))


def embedding(
    ids: Tensor,
    table: Tensor,
    positions: Tensor,
    *,
    combine: str,
    dropout: Dropout | None,
    position_dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.embedding."""
    (batch, length), width = ids.shape, table.shape[1]
    keys, position_keys = (
        None if d is None or ids.numel() == 0 else site_keys(d, batch, 1, length, (width,))
        for d in (dropout, position_dropout)
    )
    return _Embedding.apply(ids, table, positions, 0.5 if combine == "average" else 1.0, keys, position_keys)
