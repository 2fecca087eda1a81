"""What two or more operators share on the device: the dropout contract of kernels.dropout, blocks of rows in parts of
their width and their products, the sum of partial sums.

Words are int32 whose bits are the contract's 32-bit words, products and sums wrap. The contract's unsigned comparison
word >= T becomes a signed one by flipping the sign bit of both sides; adding 2^31 flips it, so `row_keys` adds it to
B once a row and an element costs one multiply-add, one comparison and one select:

    a, b = row_keys(rng_ptr, site, sequence, head, position)     # once a row
    c = column_keys(rng_ptr, site, column)                       # once a column (a table pays where columns repeat)
    kept = keep(a[:, None], b[:, None], c[None, :], threshold)   # threshold from `signed_threshold(p)`
    x = tl.where(kept, x * scale, 0.0)                           # scale from kernels.dropout.keep_scale(p)

`sequence` is local (0 is the first of this call): the kernel adds the first global index from `rng`.
"""

import triton
import triton.language as tl

from kernels.dropout import threshold


def signed_threshold(p: float) -> int:
    """T - 2^31: what `keep` compares with, an int32. Pass it as a run-time argument (`do_not_specialize`)."""
    return threshold(p) - (1 << 31)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """`stride`, which ALIGN divides, so that the compiler sees it. Triton itself knows of a run-time integer only
    whether 16 divides it: rows of 380 elements would be read 2 bytes at a time, where 8 are aligned."""
    return stride // ALIGN * ALIGN


@triton.jit
def _philox(rng_ptr, c0, c1, c2, c3):
    """First two words of Philox-4x32-10 with the key (seed, step); c0 int32 of any shape, the others int32 scalars."""
    k0 = tl.load(rng_ptr).to(tl.uint32)
    k1 = tl.load(rng_ptr + 1).to(tl.uint32)
    w0, w1, _, _ = tl.philox_impl(c0.to(tl.uint32), c1, c2, c3, k0, k1)
    return w0.to(tl.int32, bitcast=True), w1.to(tl.int32, bitcast=True)


@triton.jit
def row_keys(rng_ptr, site, sequence, head, position):
    """(A, B + 2^31) of rows (sequence, head, position), int32 [...] in the shape of `position`.

    site, sequence, head: scalars; sequence counts from 0 in this call.
    """
    sequence = (tl.load(rng_ptr + 2) + sequence).to(tl.uint32)
    head = tl.to_tensor(head).to(tl.uint32)
    tag = (tl.to_tensor(site) * 2).to(tl.uint32)
    w0, w1 = _philox(rng_ptr, position, head, sequence, tag)
    return w0 | 1, w1 ^ -0x80000000


@triton.jit
def column_keys(rng_ptr, site, column):
    """C of columns `column`, int32 in its shape."""
    tag = (tl.to_tensor(site) * 2 + 1).to(tl.uint32)
    zero = tl.to_tensor(0).to(tl.uint32)
    w0, _ = _philox(rng_ptr, column, zero, zero, tag)
    return w0 | 1


@triton.jit
def keep(a, b, c, threshold):
    """True where the element is kept; a, b from `row_keys`, c from `column_keys`, broadcast against each other."""
    return a * c + b >= threshold


@triton.jit
def drop_rows(x, rng_ptr, site, sequence, position, column, threshold, scale):
    """dropout(x), float32 [rows, columns], of rows (sequence, position) of a stream; column from `column_keys`."""
    a, b = row_keys(rng_ptr, site, sequence, 0, position)
    return tl.where(keep(a[:, None], b[:, None], column[None, :], threshold), x * scale, 0.0)


@triton.jit
def load_stream(ptr, sequence, position, stride_b, stride_l, offs_d, mask):
    """Rows (sequence, position) of a stream [B, L, D] as float32, 0 outside the mask."""
    offs = sequence.to(tl.int64) * stride_b + position.to(tl.int64) * stride_l
    return tl.load(ptr + offs[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)


# ---------------------------------------------------------------- blocks of rows, each a tuple of parts of the width


@triton.constexpr_function
def start_of(D, i):
    """First column of part i of a width, or the end of part i - 1."""
    return sum(D[:i])


@triton.jit
def load_rows(rows, offs, end, D: tl.constexpr, WIDTH: tl.constexpr, ROWS_MASKED: tl.constexpr = True, real=None):
    """Rows `offs`: a part i is [rows, D[i]], 0 from column WIDTH on, from row `end` on (ROWS_MASKED) and in rows that
    are not `real`, if given."""
    parts = ()
    for i in tl.static_range(len(D)):
        d = start_of(D, i) + tl.arange(0, D[i])
        ptrs = rows[0] + offs[:, None] * rows[1] + d[None, :]
        if real is not None:
            x = tl.load(ptrs, mask=real[:, None] & (d[None, :] < WIDTH), other=0.0)
        elif start_of(D, i + 1) > WIDTH:
            if ROWS_MASKED:
                x = tl.load(ptrs, mask=(offs[:, None] < end) & (d[None, :] < WIDTH), other=0.0)
            else:
                x = tl.load(ptrs, mask=d[None, :] < WIDTH, other=0.0)
        elif ROWS_MASKED:
            x = tl.load(ptrs, mask=offs[:, None] < end, other=0.0)
        else:
            x = tl.load(ptrs)
        parts += (x,)
    return parts


@triton.jit
def store_rows(rows, x, factor, offs, end, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `offs` below `end`: x times `factor` (a scalar or [rows, 1]), converted to the pointer's type."""
    for i in tl.static_range(len(D)):
        d = start_of(D, i) + tl.arange(0, D[i])
        ptrs = rows[0] + offs[:, None] * rows[1] + d[None, :]
        y = (x[i] * factor).to(rows[0].dtype.element_ty)
        if start_of(D, i + 1) > WIDTH:
            tl.store(ptrs, y, mask=(offs[:, None] < end) & (d[None, :] < WIDTH))
        else:
            tl.store(ptrs, y, mask=offs[:, None] < end)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D: tl.constexpr):
    """float32 accumulators of a block of rows."""
    parts = ()
    for i in tl.static_range(len(D)):
        parts += (tl.zeros([ROWS, D[i]], tl.float32),)
    return parts


@triton.jit
def product_over_width(x, y, PRECISION: tl.constexpr):
    """X Y^T [rows of X, rows of Y] of two blocks of rows."""
    s = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(x)):
        s = tl.dot(x[i], tl.trans(y[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(acc, x, y, PRECISION: tl.constexpr):
    """acc + x Y: x [M, N], Y a block of N rows."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts += (tl.dot(x, y[i], acc[i], input_precision=PRECISION),)
    return parts


@triton.jit
def multiplied(x, factor):
    """A block of rows times `factor`."""
    parts = ()
    for i in tl.static_range(len(x)):
        parts += (x[i] * factor,)
    return parts


# ---------------------------------------------------------------- partial sums


@triton.jit(do_not_specialize=["n", "splits", "row", "out_row"])
def _sum_partials_kernel(parts_ptr, out_ptr, n, splits, row, out_row, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., in this order; parts float32 [splits, n], n / row rows of `row`
    elements, which begin `out_row` elements apart in out."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * n + offs, mask=offs < n, other=0.0)
    out = out_ptr + offs // row * out_row + offs % row
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=offs < n)
