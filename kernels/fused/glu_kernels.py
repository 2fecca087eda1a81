"""Device code of the glu kernels: products, activation, gating, dropout, and their gradients (docs/kernels/glu.md).

One family for all kinds: `plain` has one product, `gated` and `mixed` have two, accumulated in one pass over x. The
activation is a compile-time constant. Legend: B batch, L positions, M = B L rows, D inner width, F hidden width,
P products (1 or 2), N = F rounded up to 16, on which rows of hidden layer and products start.
"""

import triton
import triton.language as tl

from kernels.fused.activation_code import activate, relu, relu_slope, sigmoid, sigmoid_slope, slope
from kernels.fused.primitives import column_keys, keep, row_keys

# columns that an epilogue works on at a time: with 32, gelu and silu spill 17 and 25 registers in the recomputation
PART_N = tl.constexpr(16)
# lengths, sites and thresholds never compile anything anew
RUN_TIME = ["M", "L", "inner_blocks", "threshold", "gate_threshold", "site", "gate_site"]


@triton.jit
def _row_keys(rng_ptr, site, rows, L, DROPOUT: tl.constexpr):
    """Dropout keys of rows (sequence rows // L, position rows % L); anything where nothing is dropped."""
    if DROPOUT:
        return row_keys(rng_ptr, site, rows // L, 0, rows % L)
    else:
        return rows, rows


@triton.jit
def _drop(v, dropout, columns):
    """dropout(v) of the rows of the keys in `dropout` and of `columns`; the same of a gradient.

    dropout: (rng_ptr, site, threshold, scale, row keys). The gather looks idle: without it each thread draws the keys
    of all columns that it holds in the product's layout, 16 Philox calls instead of 1 (700 of 2600 instructions).
    """
    rng_ptr, site, threshold, scale, keys = dropout
    a, b = keys
    c = tl.gather(column_keys(rng_ptr, site, columns), tl.arange(0, columns.shape[0]), 0)
    return tl.where(keep(a[:, None], b[:, None], c[None, :], threshold), v * scale, 0.0)


@triton.jit
def _part(x, INDEX: tl.constexpr, PARTS: tl.constexpr):
    """Columns of part INDEX of PARTS (a power of two); in the product's layout no value moves."""
    if PARTS == 1:
        return x
    else:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        if INDEX < PARTS // 2:
            return _part(left, INDEX, PARTS // 2)
        else:
            return _part(right, INDEX - PARTS // 2, PARTS // 2)


@triton.jit
def _combine(
    first, second, dropout, gate_dropout, factor, columns,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, GATE_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The hidden layer from its products, float32 [rows, columns]."""
    if KIND == "plain":
        hidden = activate(first, ACTIVATION)
    elif KIND == "gated":
        hidden = activate(first, ACTIVATION) * second
    else:
        slow = sigmoid(first)
        if GATE_DROPOUT:
            slow = _drop(slow, gate_dropout, columns)
        hidden = (slow + relu(second)) * factor
    if DROPOUT:
        hidden = _drop(hidden, dropout, columns)
    return hidden


@triton.jit
def _gradients(
    first, second, d_hidden, dropout, gate_dropout, factor, columns,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, GATE_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of both products, float32; of `plain` the first alone counts."""
    if DROPOUT:
        d_hidden = _drop(d_hidden, dropout, columns)
    if KIND == "plain":
        d_first = d_hidden * slope(first, ACTIVATION)
        d_second = d_first
    elif KIND == "gated":
        d_first = d_hidden * second * slope(first, ACTIVATION)
        d_second = d_hidden * activate(first, ACTIVATION)
    else:
        d_hidden *= factor
        d_first = d_hidden * sigmoid_slope(first)
        if GATE_DROPOUT:
            d_first = _drop(d_first, gate_dropout, columns)
        d_second = d_hidden * relu_slope(second)
    return d_first, d_second


@triton.jit
def _sites(
    rng_ptr, site, threshold, scale, gate_rng_ptr, gate_site, gate_threshold, gate_scale, rows, L,
    DROPOUT: tl.constexpr, GATE_DROPOUT: tl.constexpr,
):  # fmt: skip
    """What `_drop` takes for both dropouts of `rows`."""
    keys = _row_keys(rng_ptr, site, rows, L, DROPOUT)
    gate_keys = _row_keys(gate_rng_ptr, gate_site, rows, L, GATE_DROPOUT)
    return (rng_ptr, site, threshold, scale, keys), (gate_rng_ptr, gate_site, gate_threshold, gate_scale, gate_keys)


@triton.jit
def _products(
    x_ptr, w_ptr, x_strides, stride_wr, M, L, F, N, inner_blocks,
    D: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(rows, first column, x W^T) of this program's tile: two accumulators in one pass over x, float32.

    Programs that share rows of x are neighbours: x is read from memory once, the weights stay in the L2.
    inner_blocks is D / BLOCK_K at run time: a constant count is unrolled whole, and spills behind it. Rows and columns
    beyond the end read the last valid one, so that the loop needs no masks; nobody stores those rows. Strides come in
    units, which tells the compiler their alignment: by itself it knows multiples of 16 alone, and D = 380 would be
    read 2 bytes at a time.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    left = tl.program_id(0) % tiles_n * BLOCK_N
    columns = left + tl.arange(0, BLOCK_N)
    stride_xb, stride_xl = x_strides
    safe_rows = tl.minimum(rows, M - 1)
    safe_columns = tl.minimum(columns, F - 1)
    sequence = (safe_rows // L).to(tl.int64)
    x_rows = x_ptr + ((sequence * stride_xb + (safe_rows % L).to(tl.int64) * stride_xl) * X_UNIT)[:, None]
    w_rows = w_ptr + (safe_columns.to(tl.int64) * (stride_wr * W_UNIT))[None, :]
    w_half = tl.cast(F, tl.int64) * (stride_wr * W_UNIT)
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = first
    for block in range(inner_blocks):
        inner = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x_ptrs = x_rows + inner[None, :]
        w_ptrs = w_rows + inner[:, None]
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
    return rows, left, first, second


@triton.jit(do_not_specialize=RUN_TIME)
def _glu_forward_kernel(
    x_ptr, w_ptr, hidden_ptr, saved_ptr, rng_ptr, gate_rng_ptr,
    M, L, F, N, inner_blocks, stride_xb, stride_xl, stride_wr,
    site, threshold, scale, gate_site, gate_threshold, gate_scale, factor,
    D: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, KIND: tl.constexpr, ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr, GATE_DROPOUT: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden [M, N] of x and w. Columns from F to N repeat the last one.

    SAVE: "product" also the products [M, P N]; "bits" one bit an element of where hidden is positive, 32 columns a
    word, [F / 32, M]; "" neither.
    """
    PAIR: tl.constexpr = KIND != "plain"
    # a word of bits is made from one part
    WIDTH: tl.constexpr = 32 if SAVE == "bits" else PART_N
    PARTS: tl.constexpr = BLOCK_N // WIDTH if BLOCK_N > WIDTH else 1
    rows, left, first, second = _products(
        x_ptr, w_ptr, (stride_xb, stride_xl), stride_wr, M, L, F, N, inner_blocks,
        D, X_UNIT, W_UNIT, PAIR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows64 = rows.to(tl.int64)[:, None]
    if SAVE == "product":
        columns = left + tl.arange(0, BLOCK_N)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        product_ptrs = saved_ptr + rows64 * (N * 2 if PAIR else N) + columns[None, :]
        tl.store(product_ptrs, first.to(saved_ptr.dtype.element_ty), mask=inside)
        if PAIR:
            tl.store(product_ptrs + N, second.to(saved_ptr.dtype.element_ty), mask=inside)
    dropout, gate_dropout = _sites(
        rng_ptr, site, threshold, scale, gate_rng_ptr, gate_site, gate_threshold, gate_scale, rows, L,
        DROPOUT, GATE_DROPOUT,
    )  # fmt: skip
    # one part of the columns after the other: all 64 at once spill 2 to 9 registers
    for part in tl.static_range(PARTS):
        columns = left + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        hidden = _combine(
            _part(first, part, PARTS), _part(second, part, PARTS), dropout, gate_dropout, factor, columns,
            KIND, ACTIVATION, DROPOUT, GATE_DROPOUT,
        )  # fmt: skip
        if SAVE == "bits":
            positive = (hidden > 0.0) & (columns < F)[None, :]
            word = tl.sum(tl.where(positive, 1 << tl.arange(0, WIDTH)[None, :], 0), axis=1)
            number = left // 32 + part
            out = saved_ptr + number.to(tl.int64) * M + rows
            tl.store(out, word, mask=rows < tl.where(number * 32 < F, M, 0))
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(hidden_ptr + rows64 * N + columns[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate(
    first, second, d_hidden_ptr, d_product_ptr, rows, columns, M, L, F, N, d_strides, dropout, gate_dropout, factor,
    D_UNIT: tl.constexpr, KIND: tl.constexpr, ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr, GATE_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Stores d_product [M, P N] of a block from its products and d_hidden [B, L, F]; columns from F to N become 0."""
    stride_db, stride_dl = d_strides
    d_rows = ((rows // L).to(tl.int64) * stride_db + (rows % L).to(tl.int64) * stride_dl) * D_UNIT
    real = (rows < M)[:, None] & (columns < F)[None, :]
    d_ptrs = d_hidden_ptr + d_rows[:, None] + columns[None, :]
    d_hidden = tl.load(d_ptrs, mask=real, other=0.0).to(tl.float32)
    d_first, d_second = _gradients(
        first, second, d_hidden, dropout, gate_dropout, factor, columns, KIND, ACTIVATION, DROPOUT, GATE_DROPOUT
    )
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    out_ptrs = d_product_ptr + rows.to(tl.int64)[:, None] * (N if KIND == "plain" else N * 2) + columns[None, :]
    tl.store(out_ptrs, d_first.to(d_product_ptr.dtype.element_ty), mask=inside)
    if KIND != "plain":
        tl.store(out_ptrs + N, d_second.to(d_product_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _glu_backward_kernel(
    saved_ptr, d_hidden_ptr, d_product_ptr, rng_ptr, gate_rng_ptr,
    M, L, F, N, stride_db, stride_dl,
    site, threshold, scale, gate_site, gate_threshold, gate_scale, factor,
    D_UNIT: tl.constexpr, KIND: tl.constexpr, ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr, GATE_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_product [M, P N] of d_hidden [B, L, F] and the saved products [M, P N]; columns from F to N become zero."""
    PAIR: tl.constexpr = KIND != "plain"
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    here = rows.to(tl.int64)[:, None] * (N * 2 if PAIR else N) + columns[None, :]
    first = tl.load(saved_ptr + here, mask=inside, other=0.0).to(tl.float32)
    second = first
    if PAIR:
        second = tl.load(saved_ptr + N + here, mask=inside, other=0.0).to(tl.float32)
    dropout, gate_dropout = _sites(
        rng_ptr, site, threshold, scale, gate_rng_ptr, gate_site, gate_threshold, gate_scale, rows, L,
        DROPOUT, GATE_DROPOUT,
    )  # fmt: skip
    _differentiate(
        first, second, d_hidden_ptr, d_product_ptr, rows, columns, M, L, F, N,
        (stride_db, stride_dl), dropout, gate_dropout, factor,
        D_UNIT, KIND, ACTIVATION, DROPOUT, GATE_DROPOUT,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def _glu_recompute_kernel(
    x_ptr, w_ptr, d_hidden_ptr, d_product_ptr, rng_ptr, gate_rng_ptr,
    M, L, F, N, inner_blocks, stride_xb, stride_xl, stride_wr, stride_db, stride_dl,
    site, threshold, scale, gate_site, gate_threshold, gate_scale, factor,
    D: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, GATE_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_product as `_glu_backward_kernel`, from products computed again."""
    PAIR: tl.constexpr = KIND != "plain"
    PARTS: tl.constexpr = BLOCK_N // PART_N if BLOCK_N > PART_N else 1
    rows, left, first, second = _products(
        x_ptr, w_ptr, (stride_xb, stride_xl), stride_wr, M, L, F, N, inner_blocks,
        D, X_UNIT, W_UNIT, PAIR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    dropout, gate_dropout = _sites(
        rng_ptr, site, threshold, scale, gate_rng_ptr, gate_site, gate_threshold, gate_scale, rows, L,
        DROPOUT, GATE_DROPOUT,
    )  # fmt: skip
    for part in tl.static_range(PARTS):
        columns = left + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        _differentiate(
            _part(first, part, PARTS), _part(second, part, PARTS), d_hidden_ptr, d_product_ptr, rows, columns,
            M, L, F, N, (stride_db, stride_dl), dropout, gate_dropout, factor,
            D_UNIT, KIND, ACTIVATION, DROPOUT, GATE_DROPOUT,
        )  # fmt: skip
