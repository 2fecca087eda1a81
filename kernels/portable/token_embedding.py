"""Token and position embedding with their dropouts, backward written out."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import Dropout, SiteKeys, pack_keys, site_keys, unpack_keys
from kernels.portable.chunked_attention import _eager_cpu
from kernels.portable.drop import add_scaled, apply_, scale_of
from kernels.reference import at_least_float32
from kernels.validation import once_differentiable


class _Embedding(torch.autograd.Function):
    """weight (dropout(E[ids]) + dropout(T[:L])); saves the ids and the dropout keys."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, table: Tensor, positions: Tensor, weight: float, keys: SiteKeys | None,
        position_keys: SiteKeys | None, sparse: bool,
    ) -> Tensor:  # fmt: skip
        ctx.weight, ctx.sparse = weight, sparse
        unknown: Tensor | None = (ids < 0) | (ids >= table.shape[0])
        assert unknown is not None
        if _eager_cpu(ids) and not bool(unknown.any()):
            unknown = None
        else:
            ids = ids.masked_fill(unknown, 0)
        tokens = apply_(F.embedding(ids, table), keys).mul_(weight * scale_of(keys))
        places = positions[: ids.shape[1]]
        if position_keys is not None:
            # a copy for certain: of one sequence `contiguous()` is the table itself
            places = apply_(places.expand_as(tokens).clone(memory_format=torch.contiguous_format), position_keys)
        ctx.save_for_backward(ids, unknown, *pack_keys(keys, position_keys))
        ctx.p, ctx.position_p = (None if k is None else k.p for k in (keys, position_keys))
        ctx.shapes = table.shape, positions.shape
        tokens = add_scaled(tokens, places, weight * scale_of(position_keys))
        return tokens if unknown is None else tokens.masked_fill_(unknown[..., None], torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor):  # type: ignore[override]
        ids, unknown, *drawn = ctx.saved_tensors
        keys, position_keys = unpack_keys(drawn, ctx.p, ctx.position_p)
        table_shape, position_shape = ctx.shapes
        d_table = d_positions = None
        if ctx.needs_input_grad[1]:
            rows = apply_(d_out * (ctx.weight * scale_of(keys)), keys).flatten(0, 1)
            if unknown is not None:
                rows = rows.masked_fill_(unknown.reshape(-1, 1), 0.0)
            d_table = _sparse(rows, ids, table_shape) if ctx.sparse else rows.new_zeros(table_shape)
            if not ctx.sparse:
                _add_rows_(d_table, ids.flatten(), rows)
        if ctx.needs_input_grad[2]:
            places = apply_(d_out * (ctx.weight * scale_of(position_keys)), position_keys)
            d_positions = d_out.new_zeros(position_shape)
            torch.sum(places, 0, out=d_positions[: ids.shape[1]])
        return None, d_table, d_positions, None, None, None, None


def _sparse(rows: Tensor, ids: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(ids.reshape(1, -1), rows, shape, check_invariants=False)


def _add_rows_(out: Tensor, ids: Tensor, rows: Tensor) -> None:
    """out[ids] += rows; out [V, D], ids [T], rows [T, D]; added up in float32 where out is 16-bit."""
    wide = at_least_float32(out.dtype)
    if out.dtype == wide or ids.numel() == 0:
        out.index_add_(0, ids, rows)
        return
    # frequent tokens add hundreds of rows, of which 16-bit accumulation would lose the small ones; rows of one token
    # share a place, so every copy to its row of the table writes the same value
    ids, order = ids.sort(stable=True)
    place = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).to(ids.dtype)]).cumsum(0)
    total = torch.zeros(rows.shape, dtype=wide, device=rows.device).index_add_(0, place, rows[order].to(wide))
    out.index_copy_(0, ids, (out[ids].to(wide) + total[place]).to(out.dtype))


class _TiedTable(torch.autograd.Function):
    """A table [V, D] for look-ups and as an output layer of `dtype`; one dense gradient for both uses.

    Look-ups hand back their rows as a sparse gradient, which is added to the output layer's. Dense gradients of two
    look-ups of a [30000, 512] table were 12% of a training step: zeros, and additions of zeros, 61 MB each.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.like = table.shape, table.dtype, table.device
        return table.view_as(table), table.view_as(table) if dtype == table.dtype else table.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_lookup: Tensor | None, d_output: Tensor | None):  # type: ignore[override]
        shape, dtype, device = ctx.like
        if d_output is None:
            total = torch.zeros(shape, dtype=dtype, device=device)
        else:
            total = d_output.to(dtype, copy=True)
        if d_lookup is not None and d_lookup.layout == torch.sparse_coo:
            _add_rows_(total, d_lookup._indices()[0], d_lookup._values())
        elif d_lookup is not None:
            total += d_lookup
        return total, None


def tied_table(table: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Contract in kernels.api.tied_table."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and table.requires_grad):
        return table, table if dtype is None else table.to(dtype)
    return _TiedTable.apply(table, dtype or table.dtype)


def embedding(
    ids: Tensor, table: Tensor, positions: Tensor, *, combine: str, dropout: Dropout | None,
    position_dropout: Dropout | None,
) -> Tensor:  # fmt: skip
    """Contract in kernels.api.embedding."""
    (batch, length), width = ids.shape, table.shape[1]
    keys, position_keys = (
        None if d is None or ids.numel() == 0 else site_keys(d, batch, 1, length, (width,))
        for d in (dropout, position_dropout)
    )
    weight = 0.5 if combine == "average" else 1.0
    # a traced function knows no grad_fn, and no tied table; float16 has no addition of sparse gradients
    sparse = not torch.compiler.is_compiling() and table.dtype != torch.float16
    sparse = sparse and isinstance(table.grad_fn, _TiedTable._backward_cls)  # type: ignore[attr-defined]
    return _Embedding.apply(ids, table, positions, weight, keys, position_keys, sparse)
