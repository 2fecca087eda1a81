"""The hidden layer of a feedforward in one kernel: products, activation, gating, dropout (docs/kernels/glu.md).

One family for all kinds: `plain` has one product, `gated` and `mixed` have two, accumulated in one pass over x. The
activation is a compile-time constant. Legend: B batch, L positions, M = B L rows, D inner width, F hidden width,
P products (1 or 2), N = F rounded up to 16: rows of the hidden layer start at multiples of N, since F = 1365 would
mean stores of 2 bytes.

Backward computes the gradients of the products ("d_product") in one elementwise pass, or together with the products
where they were not kept; d_x and d_weight are plain products and stay with the library.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_only import architecture, launches
from kernels.dropout import Dropout, keep_scale
from kernels.fused import tiles_glu as tiles
from kernels.fused.primitives import column_keys, keep, row_keys, signed_threshold

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COLUMN_UNIT = 16
RUN_TIME = ["M", "L", "threshold", "gate_threshold", "site", "gate_site"]


@triton.jit
def _activate(a, ACTIVATION: tl.constexpr):
    """act(a) in float32."""
    if ACTIVATION == "relu":
        return tl.maximum(a, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return a * tl.sigmoid(a)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(a)
    else:
        return a


@triton.jit
def _slope(a, ACTIVATION: tl.constexpr):
    """act'(a) in float32; 0 for relu at 0, as torch has it."""
    if ACTIVATION == "relu":
        return tl.where(a > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * a * a) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * density
    elif ACTIVATION == "silu":
        s = tl.sigmoid(a)
        return s * (1.0 + a * (1.0 - s))
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(a)
        return s * (1.0 - s)
    else:
        return tl.full(a.shape, 1.0, tl.float32)


@triton.jit
def _drop(v, rng_ptr, site, threshold, scale, rows, columns, L):
    """dropout(v) of rows (sequence rows // L, position rows % L) and `columns`; the same of a gradient."""
    a, b = row_keys(rng_ptr, site, rows // L, 0, rows % L)
    c = column_keys(rng_ptr, site, columns)
    return tl.where(keep(a[:, None], b[:, None], c[None, :], threshold), v * scale, 0.0)


@triton.jit
def _combine(
    first,
    second,
    rng_ptr,
    site,
    threshold,
    scale,
    gate_rng_ptr,
    gate_site,
    gate_threshold,
    gate_scale,
    factor,
    rows,
    columns,
    L,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    GATE_DROPOUT: tl.constexpr,
):
    """The hidden layer from its products, float32 [rows, columns]."""
    if KIND == "plain":
        hidden = _activate(first, ACTIVATION)
    elif KIND == "gated":
        hidden = _activate(first, ACTIVATION) * second
    else:
        slow = tl.sigmoid(first)
        if GATE_DROPOUT:
            slow = _drop(slow, gate_rng_ptr, gate_site, gate_threshold, gate_scale, rows, columns, L)
        hidden = (slow + tl.maximum(second, 0.0)) * factor
    if DROPOUT:
        hidden = _drop(hidden, rng_ptr, site, threshold, scale, rows, columns, L)
    return hidden


@triton.jit
def _gradients(
    first,
    second,
    d_hidden,
    rng_ptr,
    site,
    threshold,
    scale,
    gate_rng_ptr,
    gate_site,
    gate_threshold,
    gate_scale,
    factor,
    rows,
    columns,
    L,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    GATE_DROPOUT: tl.constexpr,
):
    """Gradients of both products, float32; of `plain` the first alone counts."""
    if DROPOUT:
        d_hidden = _drop(d_hidden, rng_ptr, site, threshold, scale, rows, columns, L)
    if KIND == "plain":
        d_first = d_hidden * _slope(first, ACTIVATION)
        d_second = d_first
    elif KIND == "gated":
        d_first = d_hidden * second * _slope(first, ACTIVATION)
        d_second = d_hidden * _activate(first, ACTIVATION)
    else:
        d_hidden *= factor
        d_first = d_hidden * _slope(first, "sigmoid")
        if GATE_DROPOUT:
            d_first = _drop(d_first, gate_rng_ptr, gate_site, gate_threshold, gate_scale, rows, columns, L)
        d_second = d_hidden * _slope(second, "relu")
    return d_first, d_second


@triton.jit
def _products(
    x_ptr,
    w_ptr,
    stride_xb,
    stride_xl,
    stride_xd,
    stride_wr,
    stride_wd,
    rows,
    columns,
    M,
    L,
    F,
    D: tl.constexpr,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x W^T of `rows` and `columns` in one pass over x: two accumulators, float32 [BLOCK_M, BLOCK_N].

    Rows and columns beyond the end read the last valid one, so that the loop needs no masks; nobody stores them.
    Strides come in units, which tells the compiler their alignment: it knows multiples of 16 alone by itself, and
    D = 380 would be read 2 bytes at a time.
    """
    safe_rows = tl.minimum(rows, M - 1)
    safe_columns = tl.minimum(columns, F - 1)
    sequence = (safe_rows // L).to(tl.int64)
    x_rows = x_ptr + (sequence * (stride_xb * X_UNIT) + (safe_rows % L) * (stride_xl * X_UNIT))[:, None]
    w_rows = w_ptr + (safe_columns.to(tl.int64) * (stride_wr * W_UNIT))[None, :]
    w_half = F.to(tl.int64) * (stride_wr * W_UNIT)
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = first
    for k in range(0, D, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        x_ptrs = x_rows + (inner * stride_xd)[None, :]
        w_ptrs = w_rows + (inner * stride_wd)[:, None]
        if D % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(inner < D)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(inner < D)[:, None], other=0.0)
        first = tl.dot(x, w, first, input_precision=PRECISION)
        if PAIR:
            if D % BLOCK_K == 0:
                w = tl.load(w_ptrs + w_half)
            else:
                w = tl.load(w_ptrs + w_half, mask=(inner < D)[:, None], other=0.0)
            second = tl.dot(x, w, second, input_precision=PRECISION)
    return first, second


@triton.jit(do_not_specialize=RUN_TIME)
def _glu_forward_kernel(
    x_ptr,
    w_ptr,
    hidden_ptr,
    product_ptr,
    rng_ptr,
    gate_rng_ptr,
    M,
    L,
    F,
    N,
    stride_xb,
    stride_xl,
    stride_xd,
    stride_wr,
    stride_wd,
    site,
    threshold,
    scale,
    gate_site,
    gate_threshold,
    gate_scale,
    factor,
    D: tl.constexpr,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    GATE_DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden [M, N] of x and w; with SAVE also the products [M, P N]. Columns from F to N become zero.

    Programs that share rows of x are neighbours: x is read from memory once, the weights stay in the L2.
    """
    PAIR: tl.constexpr = KIND != "plain"
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first, second = _products(
        x_ptr,
        w_ptr,
        stride_xb,
        stride_xl,
        stride_xd,
        stride_wr,
        stride_wd,
        rows,
        columns,
        M,
        L,
        F,
        D,
        X_UNIT,
        W_UNIT,
        PAIR,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    real = (columns < F)[None, :]
    if SAVE:
        stride_p = N * 2 if PAIR else N
        product_ptrs = product_ptr + rows.to(tl.int64)[:, None] * stride_p + columns[None, :]
        kind = product_ptr.dtype.element_ty
        tl.store(product_ptrs, tl.where(real, first, 0.0).to(kind), mask=inside)
        if PAIR:
            tl.store(product_ptrs + N, tl.where(real, second, 0.0).to(kind), mask=inside)
    hidden = _combine(
        first,
        second,
        rng_ptr,
        site,
        threshold,
        scale,
        gate_rng_ptr,
        gate_site,
        gate_threshold,
        gate_scale,
        factor,
        rows,
        columns,
        L,
        KIND,
        ACTIVATION,
        DROPOUT,
        GATE_DROPOUT,
    )
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(hidden_ptrs, tl.where(real, hidden, 0.0).to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _glu_backward_kernel(
    saved_ptr,
    x_ptr,
    w_ptr,
    d_hidden_ptr,
    d_product_ptr,
    rng_ptr,
    gate_rng_ptr,
    M,
    L,
    F,
    N,
    stride_xb,
    stride_xl,
    stride_xd,
    stride_wr,
    stride_wd,
    stride_db,
    stride_dl,
    stride_df,
    site,
    threshold,
    scale,
    gate_site,
    gate_threshold,
    gate_scale,
    factor,
    D: tl.constexpr,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    D_UNIT: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    GATE_DROPOUT: tl.constexpr,
    FROM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """d_product [M, P N] of d_hidden; columns from F to N become zero.

    FROM "product": saved holds the products. "x": computes them again. "hidden": saved holds the hidden layer
    of a plain relu, which is positive exactly where the product was positive and kept.
    """
    PAIR: tl.constexpr = KIND != "plain"
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    real = (rows < M)[:, None] & (columns < F)[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    stride_p = N * 2 if PAIR else N
    if FROM == "x":
        first, second = _products(
            x_ptr,
            w_ptr,
            stride_xb,
            stride_xl,
            stride_xd,
            stride_wr,
            stride_wd,
            rows,
            columns,
            M,
            L,
            F,
            D,
            X_UNIT,
            W_UNIT,
            PAIR,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        stride_s = N if FROM == "hidden" else stride_p
        saved_ptrs = saved_ptr + rows64 * stride_s + columns[None, :]
        first = tl.load(saved_ptrs, mask=inside, other=0.0).to(tl.float32)
        second = first
        if PAIR:
            second = tl.load(saved_ptrs + N, mask=inside, other=0.0).to(tl.float32)
    d_rows = (rows // L).to(tl.int64) * (stride_db * D_UNIT) + (rows % L) * (stride_dl * D_UNIT)
    d_ptrs = d_hidden_ptr + d_rows[:, None] + (columns * stride_df)[None, :]
    d_hidden = tl.load(d_ptrs, mask=real, other=0.0).to(tl.float32)
    if FROM == "hidden":
        d_first = tl.where(first > 0.0, d_hidden * scale, 0.0)
        d_second = d_first
    else:
        d_first, d_second = _gradients(
            first,
            second,
            d_hidden,
            rng_ptr,
            site,
            threshold,
            scale,
            gate_rng_ptr,
            gate_site,
            gate_threshold,
            gate_scale,
            factor,
            rows,
            columns,
            L,
            KIND,
            ACTIVATION,
            DROPOUT,
            GATE_DROPOUT,
        )
    kind = d_product_ptr.dtype.element_ty
    d_product_ptrs = d_product_ptr + rows64 * stride_p + columns[None, :]
    tl.store(d_product_ptrs, d_first.to(kind), mask=inside)
    if PAIR:
        tl.store(d_product_ptrs + N, d_second.to(kind), mask=inside)


def _padded(width: int) -> int:
    return -(-width // COLUMN_UNIT) * COLUMN_UNIT


def _unit(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides."""
    unit = 16
    while any(stride % unit for stride in strides):
        unit //= 2
    return unit


def _x_strides(x: Tensor, weight: Tensor) -> dict[str, Any]:
    x_unit, w_unit = _unit(x.stride(0), x.stride(1)), _unit(weight.stride(0))
    return {
        "stride_xb": x.stride(0) // x_unit,
        "stride_xl": x.stride(1) // x_unit,
        "stride_xd": x.stride(2),
        "stride_wr": weight.stride(0) // w_unit,
        "stride_wd": weight.stride(1),
        "D": x.shape[2],
        "X_UNIT": x_unit,
        "W_UNIT": w_unit,
    }


def _dropouts(p: float, site: int, gate_p: float, gate_site: int) -> dict[str, Any]:
    return {
        "site": site,
        "threshold": signed_threshold(p),
        "scale": keep_scale(p),
        "gate_site": gate_site,
        "gate_threshold": signed_threshold(gate_p),
        "gate_scale": keep_scale(gate_p),
        "DROPOUT": p > 0,
        "GATE_DROPOUT": gate_p > 0,
    }


def _forward(
    x: Tensor,
    weight: Tensor,
    rng: Tensor | None,
    gate_rng: Tensor | None,
    kind: str,
    activation: str,
    factor: float,
    p: float,
    site: int,
    gate_p: float,
    gate_site: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(hidden [B, L, F] with rows N apart, products [B L, P N] or [0]); see `glu`."""
    batch, length, _ = x.shape
    halves = 1 if kind == "plain" else 2
    width = weight.shape[0] // halves
    padded, rows = _padded(width), batch * length
    hidden = torch.empty((batch, length, padded), dtype=x.dtype, device=x.device)
    product = torch.empty((rows, halves * padded) if save else (0,), dtype=x.dtype, device=x.device)
    if launches(x) and rows and width:
        tile = tiles.product_tile(architecture(x), halves == 2, 8 * x.element_size())
        grid = (triton.cdiv(rows, tile.m) * triton.cdiv(padded, tile.n),)
        _glu_forward_kernel[grid](
            x,
            weight,
            hidden,
            product,
            rng,
            gate_rng,
            rows,
            length,
            width,
            padded,
            factor=factor,
            KIND=kind,
            ACTIVATION=activation,
            SAVE=save,
            **_x_strides(x, weight),
            **_dropouts(p, site, gate_p, gate_site),
            **tile.options(),
        )
    return hidden[..., :width], product


def _backward(
    d_hidden: Tensor,
    saved: Tensor,
    x: Tensor,
    weight: Tensor,
    rng: Tensor | None,
    gate_rng: Tensor | None,
    kind: str,
    activation: str,
    factor: float,
    p: float,
    site: int,
    gate_p: float,
    gate_site: int,
    source: str,
) -> Tensor:
    """d_product [B L, P N]; source: "product", "hidden" or "x", see `_glu_backward_kernel`."""
    batch, length, width = d_hidden.shape
    halves = 1 if kind == "plain" else 2
    padded, rows = _padded(width), batch * length
    d_product = torch.empty((rows, halves * padded), dtype=x.dtype, device=x.device)
    if launches(x) and rows and width:
        tile = tiles.product_tile(architecture(x), halves == 2, 8 * x.element_size())
        if source != "x":
            tile = tiles.ELEMENTWISE
        unit = _unit(d_hidden.stride(0), d_hidden.stride(1))
        grid = (triton.cdiv(rows, tile.m) * triton.cdiv(padded, tile.n),)
        _glu_backward_kernel[grid](
            saved,
            x,
            weight,
            d_hidden,
            d_product,
            rng,
            gate_rng,
            rows,
            length,
            width,
            padded,
            stride_db=d_hidden.stride(0) // unit,
            stride_dl=d_hidden.stride(1) // unit,
            stride_df=d_hidden.stride(2),
            factor=factor,
            D_UNIT=unit,
            KIND=kind,
            ACTIVATION=activation,
            FROM=source,
            **_x_strides(x, weight),
            **_dropouts(p, site, gate_p, gate_site),
            **tile.options(),
        )
    return d_product


_forward_op = torch.library.custom_op("march::glu", _forward, mutates_args=())
_forward_op.register_fake(_forward)
_backward_op = torch.library.custom_op("march::glu_backward", _backward, mutates_args=())
_backward_op.register_fake(_backward)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, rng, gate_rng, *settings, save = inputs
    hidden, product = output
    ctx.settings = settings
    kind, activation = settings[:2]
    ctx.source = "product" if save else "hidden" if kind == "plain" and activation == "relu" else "x"
    saved = {"product": product, "hidden": hidden, "x": None}[ctx.source]
    ctx.save_for_backward(x, weight, rng, gate_rng, saved)
    ctx.mark_non_differentiable(product)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_hidden: Tensor | None, _: Tensor | None) -> tuple:
    x, weight, rng, gate_rng, saved = ctx.saved_tensors
    unused = (None,) * 10
    if d_hidden is None:
        return None, None, *unused
    if saved is None:
        saved = x.new_empty(0)
    d_product = _backward_op(d_hidden, saved, x, weight, rng, gate_rng, *ctx.settings, ctx.source)
    halves = 1 if ctx.settings[0] == "plain" else 2
    width = weight.shape[0] // halves
    padded, depth = _padded(width), weight.shape[1]
    d_x = d_weight = None
    if ctx.needs_input_grad[0]:
        if padded != width:
            # columns beyond F are zero in d_product, so any finite rows would do; a copy of 3 MB at F 1365
            weight = torch.nn.functional.pad(weight.view(halves, width, depth), (0, 0, 0, padded - width)).flatten(0, 1)
        d_x = (d_product @ weight).view(x.shape)
    if ctx.needs_input_grad[1]:
        d_weight = d_product.T @ x.reshape(-1, depth)
        if padded != width:
            d_weight = d_weight.view(halves, padded, depth)[:, :width].reshape(-1, depth)
    return d_x, d_weight, *unused


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def glu(
    x: Tensor,
    weight: Tensor,
    *,
    kind: str,
    activation: str,
    factor: float,
    dropout: Dropout | None,
    gate_dropout: Dropout | None,
    recompute: bool = False,
) -> Tensor:
    """Contract in kernels.api.glu. float16, bfloat16 or float32, else ValueError.

    Keeps for backward x, weight and the products [B L, P N]; with `recompute` none of the products, which backward
    then computes again. A plain relu keeps its output instead in both cases. The result is a view of rows N apart.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"glu: expected float16, bfloat16 or float32, got {x.dtype}; use impl='torch' or 'reference'")
    differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    save = differentiable and not recompute and not (kind == "plain" and activation == "relu")
    hidden, _ = _forward_op(
        x,
        weight,
        dropout.rng if dropout else None,
        gate_dropout.rng if gate_dropout else None,
        kind,
        activation,
        factor,
        dropout.p if dropout else 0.0,
        dropout.site if dropout else 0,
        gate_dropout.p if gate_dropout else 0.0,
        gate_dropout.site if gate_dropout else 0,
        save,
    )
    return hidden
