"""y = x + dropout(s) and z = rmsnorm(y) gain in one pass over the stream, and its backward in one pass.

With w = dz gain, r = rsqrt(mean(y^2) + eps) and n = y r of a row of D features (means are sums over FEATURES, which is
D but where a stream is filled up with columns of zeros):

    g = dy + r (w - n mean(w n))      the gradient of y (dy: what the residual stream carries on, dz: of the norm)
    dx = g                            ds = keep / (1 - p) g                    dgain = sum over rows of dz n

A program owns whole rows, so that a row is read once and stays in registers. Programs are few and fixed in number: the
column keys of the dropout contract (one Philox call a column) and the gain are read once a program, and each program
adds up its share of dgain in registers; a second kernel adds the programs' shares in their order. The number of
programs follows from the shape alone, never from the device, so the sums have the same bits everywhere.

Forward reads x, s and writes y, z; backward reads dy, dz, y and writes dx, ds. Saved: y and r, one float32 a row.
B batch, L positions, D features; rows are (sequence, position).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import Dropout, keep_scale
from kernels.fused import tiles_rows
from kernels.fused.launch import (
    alignment,
    architecture,
    check_supported,
    differentiable,
    drop_arguments,
    launches,
    needs_backward,
    operator,
)
from kernels.fused.primitives import aligned, column_keys, drop_rows, load_stream, signed_threshold

REDUCE_ROWS, REDUCE_COLUMNS = 64, 32


@triton.jit
def _rows_of_tile(tile, rows, length, ROWS: tl.constexpr):
    """(row, valid, sequence, position) of the tile's rows; rows beyond the end read row 0 and are masked."""
    row = tile * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.where(valid, row, 0)
    return row, valid, row // length, row % length


@triton.jit
def _row_sums(a, b, mask, ALIGN: tl.constexpr, D: tl.constexpr):
    """Sums over the columns of a b, [ROWS]; a b is 0 outside the mask.

    Where a thread may have one column alone, its product would be contracted with the addition of another lane's into
    an fma: a b + shuffle(a b) rounds one of the two products, each lane another, all of them write their sum to one
    place of shared memory, and the bits would be the GPU's choice. A selection cannot be contracted.
    """
    product = a * b
    if D % 16 != 0 or ALIGN < 16:
        product = tl.where(mask, product, 0.0)
    return tl.sum(product, axis=1)


@triton.jit(do_not_specialize=["rows", "length", "site", "threshold"])
def _residual_norm_fwd_kernel(
    x_ptr, s_ptr, gain_ptr, y_ptr, z_ptr, rstd_ptr, rng_ptr,
    rows, length, stride_xb, stride_xl, stride_sb, stride_sl, site, threshold, scale, eps,
    HAS_X: tl.constexpr, HAS_S: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    stride_xb, stride_xl = aligned(stride_xb, ALIGN), aligned(stride_xl, ALIGN)
    stride_sb, stride_sl = aligned(stride_sb, ALIGN), aligned(stride_sl, ALIGN)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    gain = tl.load(gain_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        column = column_keys(rng_ptr, site, offs_d)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, valid, sequence, position = _rows_of_tile(tile, rows, length, ROWS)
        mask = valid[:, None] & mask_d[None, :]
        if HAS_S:
            y = load_stream(s_ptr, sequence, position, stride_sb, stride_sl, offs_d, mask)
            if HAS_DROPOUT:
                y = drop_rows(y, rng_ptr, site, sequence, position, column, threshold, scale)
        if HAS_X:
            x = load_stream(x_ptr, sequence, position, stride_xb, stride_xl, offs_d, mask)
            y = x + y if HAS_S else x
        offs = row.to(tl.int64)[:, None] * D + offs_d[None, :]
        if HAS_S:
            # the norm sees what the stream keeps, the rounded sum: backward starts from it
            rounded = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offs, rounded, mask=mask)
            y = rounded.to(tl.float32)
        rstd = tl.rsqrt(_row_sums(y, y, mask, ALIGN, D) / FEATURES + eps)
        tl.store(rstd_ptr + row, rstd, mask=valid)
        z = y * rstd[:, None] * gain[None, :]
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length", "site", "threshold"])
def _residual_norm_bwd_kernel(
    dy_ptr, dz_ptr, y_ptr, rstd_ptr, gain_ptr, dx_ptr, ds_ptr, partial_ptr, rng_ptr,
    rows, length, stride_dyb, stride_dyl, stride_dzb, stride_dzl, stride_yb, stride_yl, site, threshold, scale,
    HAS_DY: tl.constexpr, HAS_DROPOUT: tl.constexpr, WRITE_DX: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    stride_dyb, stride_dyl = aligned(stride_dyb, ALIGN), aligned(stride_dyl, ALIGN)
    stride_dzb, stride_dzl = aligned(stride_dzb, ALIGN), aligned(stride_dzl, ALIGN)
    stride_yb, stride_yl = aligned(stride_yb, ALIGN), aligned(stride_yl, ALIGN)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    gain = tl.load(gain_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        column = column_keys(rng_ptr, site, offs_d)
    # one accumulator a row of the tile: the rows are added once, at the end
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, valid, sequence, position = _rows_of_tile(tile, rows, length, ROWS)
        mask = valid[:, None] & mask_d[None, :]
        n = load_stream(y_ptr, sequence, position, stride_yb, stride_yl, offs_d, mask)
        dz = load_stream(dz_ptr, sequence, position, stride_dzb, stride_dzl, offs_d, mask)
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]
        n *= rstd
        acc += dz * n
        w = dz * gain[None, :]
        mean = _row_sums(w, n, mask, ALIGN, D) / FEATURES
        g = rstd * (w - n * mean[:, None])
        if HAS_DY:
            g += load_stream(dy_ptr, sequence, position, stride_dyb, stride_dyl, offs_d, mask)
        offs = row.to(tl.int64)[:, None] * D + offs_d[None, :]
        if WRITE_DX:
            tl.store(dx_ptr + offs, g.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_DROPOUT:
            g = drop_rows(g, rng_ptr, site, sequence, position, column, threshold, scale)
            tl.store(ds_ptr + offs, g.to(ds_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0) * D + offs_d, tl.sum(acc, axis=0), mask=mask_d)


@triton.jit(do_not_specialize=["rows"])
def _sum_rows_kernel(partial_ptr, out_ptr, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[d] = sum over rows of partial [rows, D], rows in order."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + offs_r
        mask = (row < rows)[:, None] & (offs_d < D)[None, :]
        acc += tl.load(partial_ptr + row[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_d, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=offs_d < D)


# ---------------------------------------------------------------- launch


def _row_strides(*streams: Tensor | None) -> list[int]:
    """(sequence, position) strides of each, 0 of what is not there."""
    return [stride for x in streams for stride in ((0, 0) if x is None else x.stride()[:2])]


@operator("march::residual_norm", rows=("x", "s"))
def _forward_op(
    x: Tensor | None, s: Tensor | None, gain: Tensor, rng: Tensor | None, p: float, site: int, eps: float, features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, rstd); y is empty where s is None, and then equals x."""
    stream = s if s is not None else x
    assert stream is not None
    batch, length, width = stream.shape
    y = torch.empty((batch, length, width) if s is not None else (0,), dtype=stream.dtype, device=stream.device)
    z = torch.empty((batch, length, width), dtype=stream.dtype, device=stream.device)
    rstd = torch.empty((batch, length), dtype=torch.float32, device=stream.device)
    if z.numel() == 0 or not launches(z):
        return y, z, rstd
    tile, strides = tiles_rows.row_tile(architecture(z), "stream", width), _row_strides(x, s)
    _residual_norm_fwd_kernel[(tiles_rows.programs(batch * length, tile),)](
        x, s, gain, y, z, rstd, rng, batch * length, length, *strides,
        site, signed_threshold(p), keep_scale(p), eps,
        HAS_X=x is not None, HAS_S=s is not None, HAS_DROPOUT=rng is not None, ALIGN=alignment(strides),
        D=width, FEATURES=features, ROWS=tile.rows, BLOCK_D=tile.block, num_warps=tile.warps,
    )  # fmt: skip
    return y, z, rstd


@operator("march::residual_norm_backward", rows=("dy", "dz", "y"))
def _backward_op(
    dy: Tensor | None, dz: Tensor, y: Tensor, rstd: Tensor, gain: Tensor, rng: Tensor | None,
    p: float, site: int, features: int, needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient of y, the same dropped, gradient of gain); the first is empty unless needs_dx or there is no dropout,
    the second is empty without dropout."""
    batch, length, width = y.shape
    write_dx = needs_dx or rng is None
    dx = torch.empty(y.shape if write_dx else (0,), dtype=y.dtype, device=y.device)
    ds = torch.empty(y.shape if rng is not None else (0,), dtype=y.dtype, device=y.device)
    dgain = torch.empty((width,), dtype=gain.dtype, device=y.device)
    if y.numel() == 0:
        return dx, ds, dgain.zero_()
    if not launches(dz):
        return dx, ds, dgain
    tile, strides = tiles_rows.row_tile(architecture(dz), "stream", width), _row_strides(dy, dz, y)
    programs = tiles_rows.programs(batch * length, tile)
    partial = torch.empty((programs, width), dtype=torch.float32, device=y.device)
    _residual_norm_bwd_kernel[(programs,)](
        dy, dz, y, rstd, gain, dx, ds, partial, rng, batch * length, length, *strides,
        site, signed_threshold(p), keep_scale(p),
        HAS_DY=dy is not None, HAS_DROPOUT=rng is not None, WRITE_DX=write_dx, ALIGN=alignment(strides),
        D=width, FEATURES=features, ROWS=tile.rows, BLOCK_D=tile.block, num_warps=tile.warps,
    )  # fmt: skip
    _sum_rows_kernel[(triton.cdiv(width, REDUCE_COLUMNS),)](
        partial, dgain, programs, D=width, ROWS=REDUCE_ROWS, BLOCK_D=REDUCE_COLUMNS, num_warps=4
    )
    return dx, ds, dgain


class _ResidualNorm(torch.autograd.Function):
    """(y, z, rstd). Of the norm alone y is x: the stream passes through the function, so that its gradient and the
    norm's are added where both are in registers, not by a further pass over the stream; a custom op may not return its
    input."""

    @staticmethod
    def forward(x, s, gain, rng, p, site, eps, features):
        y, z, rstd = _forward_op(x, s, gain, rng, p, site, eps, features)
        return x.view_as(x) if s is None else y, z, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, s, gain, rng, ctx.p, ctx.site, _, ctx.features = inputs
        ctx.save_for_backward(x if s is None else output[0], output[2], gain, rng)
        ctx.given = x is not None, s is not None
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None, _: Tensor | None):  # type: ignore[override]
        has_x, has_s = ctx.given
        if dz is None and (dy is None or not has_s):
            return dy, *(None,) * 7
        y, rstd, gain, rng = ctx.saved_tensors
        # the norm unused is rare (a stream that ends without one): it costs a tensor of zeros
        dz = torch.zeros_like(y) if dz is None else dz
        dx, ds, dgain = _backward_op(dy, dz, y, rstd, gain, rng, ctx.p, ctx.site, ctx.features, has_x)
        ds = (ds if rng is not None else dx) if has_s else None
        return dx if has_x else None, ds, dgain, *(None,) * 5


def residual_norm(
    x: Tensor | None, s: Tensor | None, gain: Tensor, *, dropout: Dropout | None, eps: float,
    features: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contract in kernels.api.residual_norm. Streams up to 16384 features; float16, bfloat16, float32."""
    stream = s if s is not None else x
    assert stream is not None
    check_supported("residual_norm", stream, max_width=tiles_rows.MAX_WIDTH)
    features = features or gain.shape[0]
    recorded = needs_backward(x, s, gain)
    return differentiable(_ResidualNorm, recorded, x, s, gain, *drop_arguments(dropout), eps, features)[:2]
