"""combine(dropout(E[ids]), dropout(T[:L])) and its backward, deterministic and without atomics.

    out[b, i] = c (m_E E[ids[b, i]] + m_T T[i])          c = 1/2 (average) or 1 (sum), m = keep / (1 - p)
    dE[v] = sum over (b, i) with ids[b, i] = v of c m_E d_out[b, i]
    dT[i] = sum over b of c m_T d_out[b, i]

dE: the token positions are sorted by id (a stable sort on the device, so equal ids stay in their order), each row of E
finds its run of positions, and one program adds up the run in float32, in order, tile by tile. A program serves several
rows of E, PROGRAMS_E apart, so that frequent tokens, which have neighbouring ids, fall to different programs and the
column keys are made once for all of them. dT: a program owns one position and walks the batch. Rows that no token and
no position reaches are written as zeros by the same kernels. An id outside [0, V) reads nothing, gives a row of NaN and
reaches no row of dE. Saved: ids. Nothing waits for the device.
B batch, L positions, D features, V vocabulary, P rows of T.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import Dropout, keep_scale
from kernels.fused import tiles_rows
from kernels.fused.launch import alignment, architecture, check_supported, drop_arguments, launches, operator
from kernels.fused.primitives import aligned, column_keys, drop_rows, load_stream, signed_threshold

# rows of E a program serves in backward: 3,750 programs at 30,000
ROWS_OF_E = 8


@triton.jit(do_not_specialize=["rows", "length", "vocabulary", "site", "site_t", "threshold", "threshold_t"])
def _embedding_fwd_kernel(
    ids_ptr, table_ptr, positions_ptr, out_ptr, rng_ptr, rng_t_ptr,
    rows, length, vocabulary, stride_v, stride_p, site, site_t, threshold, threshold_t, scale, scale_t,
    HAS_DROPOUT: tl.constexpr, HAS_DROPOUT_T: tl.constexpr, AVERAGE: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    stride_v, stride_p = aligned(stride_v, ALIGN), aligned(stride_p, ALIGN)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    if HAS_DROPOUT:
        column = column_keys(rng_ptr, site, offs_d)
    if HAS_DROPOUT_T:
        column_t = column_keys(rng_t_ptr, site_t, offs_d)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        valid = row < rows
        row = tl.where(valid, row, 0)
        sequence, position = row // length, row % length
        mask = valid[:, None] & mask_d[None, :]
        ids = tl.load(ids_ptr + row, mask=valid, other=0)
        known = (ids >= 0) & (ids < vocabulary)
        offs = tl.where(known, ids, 0)[:, None] * stride_v + offs_d[None, :]
        x = tl.load(table_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        offs = position.to(tl.int64)[:, None] * stride_p + offs_d[None, :]
        t = tl.load(positions_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            x = drop_rows(x, rng_ptr, site, sequence, position, column, threshold, scale)
        if HAS_DROPOUT_T:
            t = drop_rows(t, rng_t_ptr, site_t, sequence, position, column_t, threshold_t, scale_t)
        factor = tl.where(known, 0.5 if AVERAGE else 1.0, float("nan"))
        out = (x + t) * factor[:, None]
        tl.store(out_ptr + row.to(tl.int64)[:, None] * D + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropped_rows(
    d_out_ptr, sequence, position, valid, stride_ob, stride_ol, offs_d, column, rng_ptr, site, threshold, scale,
    HAS_DROPOUT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """d_out of positions (sequence, position) as one dropout lets it through, float32; zero where not valid."""
    mask = valid[:, None] & (offs_d < D)[None, :]
    d = load_stream(d_out_ptr, sequence, position, stride_ob, stride_ol, offs_d, mask)
    if HAS_DROPOUT:
        d = drop_rows(d, rng_ptr, site, sequence, position, column, threshold, scale)
    return d


@triton.jit
def _store_sum(ptr, acc, row, offs_d, AVERAGE: tl.constexpr, D: tl.constexpr):
    """Row `row` of a table's gradient from its partial sums."""
    total = tl.sum(acc, axis=0)
    if AVERAGE:
        total *= 0.5
    offs = tl.to_tensor(row).to(tl.int64) * D + offs_d
    tl.store(ptr + offs, total.to(ptr.dtype.element_ty), mask=offs_d < D)


@triton.jit(do_not_specialize=["vocabulary", "length", "site", "threshold"])
def _embedding_table_bwd_kernel(
    d_out_ptr, order_ptr, start_ptr, d_table_ptr, rng_ptr,
    vocabulary, length, stride_ob, stride_ol, site, threshold, scale,
    HAS_DROPOUT: tl.constexpr, AVERAGE: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    stride_ob, stride_ol = aligned(stride_ob, ALIGN), aligned(stride_ol, ALIGN)
    offs_d = tl.arange(0, BLOCK_D)
    column = offs_d
    if HAS_DROPOUT:
        column = column_keys(rng_ptr, site, offs_d)
    for v in range(tl.program_id(0), vocabulary, tl.num_programs(0)):
        start, end = tl.load(start_ptr + v), tl.load(start_ptr + v + 1)
        acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        for tile in range(start, end, ROWS):
            place = tile + tl.arange(0, ROWS)
            valid = place < end
            token = tl.load(order_ptr + place, mask=valid, other=0)
            sequence, position = token // length, token % length
            acc += _dropped_rows(
                d_out_ptr, sequence, position, valid, stride_ob, stride_ol, offs_d, column,
                rng_ptr, site, threshold, scale, HAS_DROPOUT, D,
            )  # fmt: skip
        _store_sum(d_table_ptr, acc, v, offs_d, AVERAGE, D)


@triton.jit(do_not_specialize=["batch", "length", "site", "threshold"])
def _embedding_positions_bwd_kernel(
    d_out_ptr, d_positions_ptr, rng_ptr, batch, length, stride_ob, stride_ol, site, threshold, scale,
    HAS_DROPOUT: tl.constexpr, AVERAGE: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    stride_ob, stride_ol = aligned(stride_ob, ALIGN), aligned(stride_ol, ALIGN)
    offs_d = tl.arange(0, BLOCK_D)
    column = offs_d
    if HAS_DROPOUT:
        column = column_keys(rng_ptr, site, offs_d)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    # positions beyond the sequences' length have no gradient
    for start in range(0, tl.where(position < length, batch, 0), ROWS):
        sequence = start + tl.arange(0, ROWS)
        valid = sequence < batch
        acc += _dropped_rows(
            d_out_ptr, sequence, position, valid, stride_ob, stride_ol, offs_d, column,
            rng_ptr, site, threshold, scale, HAS_DROPOUT, D,
        )  # fmt: skip
    _store_sum(d_positions_ptr, acc, position, offs_d, AVERAGE, D)


# ---------------------------------------------------------------- launch


@operator("march::embedding", rows=("table", "positions"))
def _forward_op(
    ids: Tensor, table: Tensor, positions: Tensor, rng: Tensor | None, p: float, site: int,
    rng_t: Tensor | None, p_t: float, site_t: int, average: bool,
) -> Tensor:  # fmt: skip
    (batch, length), (vocabulary, width) = ids.shape, table.shape
    out = torch.empty((batch, length, width), dtype=table.dtype, device=table.device)
    if out.numel() == 0 or not launches(out):
        return out
    tile = tiles_rows.row_tile(architecture(out), "stream", width)
    strides = table.stride(0), positions.stride(0)
    _embedding_fwd_kernel[(tiles_rows.programs(batch * length, tile),)](
        ids, table, positions, out, rng, rng_t, batch * length, length, vocabulary, *strides,
        site, site_t, signed_threshold(p), signed_threshold(p_t), keep_scale(p), keep_scale(p_t),
        HAS_DROPOUT=rng is not None, HAS_DROPOUT_T=rng_t is not None, AVERAGE=average, ALIGN=alignment(strides),
        D=width, ROWS=tile.rows, BLOCK_D=tile.block, num_warps=tile.warps,
    )  # fmt: skip
    return out


@operator("march::embedding_backward", rows=("d_out",))
def _backward_op(
    d_out: Tensor, ids: Tensor, vocabulary: int, positions: int, rng: Tensor | None, p: float, site: int,
    rng_t: Tensor | None, p_t: float, site_t: int, average: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of the table [V, D], gradient of the positions [P, D])."""
    batch, length, width = d_out.shape
    d_table = torch.empty((vocabulary, width), dtype=d_out.dtype, device=d_out.device)
    d_positions = torch.empty((positions, width), dtype=d_out.dtype, device=d_out.device)
    if d_out.numel() == 0:
        return d_table.zero_(), d_positions.zero_()
    if not launches(d_out):
        return d_table, d_positions
    tile = tiles_rows.row_tile(architecture(d_out), "runs", width)
    strides = d_out.stride()[:2]
    shape = {"AVERAGE": average, "ALIGN": alignment(strides), "D": width, "ROWS": tile.rows, "BLOCK_D": tile.block}
    shape["num_warps"] = tile.warps
    # stable: tokens of one id stay in the order of their positions, whatever the sort does inside
    sorted_ids, order = torch.sort(ids.flatten(), stable=True)
    start = torch.searchsorted(sorted_ids, torch.arange(vocabulary + 1, device=ids.device))
    _embedding_table_bwd_kernel[(triton.cdiv(vocabulary, ROWS_OF_E),)](
        d_out, order, start, d_table, rng, vocabulary, length, *strides, site, signed_threshold(p), keep_scale(p),
        HAS_DROPOUT=rng is not None, **shape,
    )  # fmt: skip
    _embedding_positions_bwd_kernel[(positions,)](
        d_out, d_positions, rng_t, batch, length, *strides, site_t, signed_threshold(p_t), keep_scale(p_t),
        HAS_DROPOUT=rng_t is not None, **shape,
    )  # fmt: skip
    return d_table, d_positions


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, table, positions, rng, *first, rng_t, p_t, site_t, average = inputs
    ctx.save_for_backward(ids, rng, rng_t)
    ctx.rows = table.shape[0], positions.shape[0]
    ctx.settings = first, (p_t, site_t), average
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, d_out: Tensor | None):
    if d_out is None:
        return (None,) * 10
    ids, rng, rng_t = ctx.saved_tensors
    first, second, average = ctx.settings
    d_table, d_positions = _backward_op(d_out, ids, *ctx.rows, rng, *first, rng_t, *second, average)
    return None, d_table, d_positions, *(None,) * 7


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def embedding(
    ids: Tensor, table: Tensor, positions: Tensor, *, combine: str, dropout: Dropout | None,
    position_dropout: Dropout | None,
) -> Tensor:  # fmt: skip
    """Contract in kernels.api.embedding. Up to 16384 features; float16, bfloat16, float32."""
    check_supported("embedding", table, positions, max_width=tiles_rows.MAX_WIDTH)
    drops = *drop_arguments(dropout), *drop_arguments(position_dropout)
    return _forward_op(ids, table, positions, *drops, combine == "average")
