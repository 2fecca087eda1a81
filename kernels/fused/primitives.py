"""What two or more operators share on the device: the dropout contract of kernels.dropout, the sum of partial sums.

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
