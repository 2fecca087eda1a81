"""Kernels for the tests of roles: pointers carried through loops, chosen by branches, turned into numbers."""

import triton
import triton.language as tl


@triton.jit
def walk(source_ptr, target_ptr, both_ptr, unused_ptr, n, m):
    p = source_ptr
    q = both_ptr
    for _ in range(n):
        x = tl.load(p)
        p += 5
        if x > 3:
            q = both_ptr + 7
        else:
            q = both_ptr
        j = m
        while j > 0:
            q += 1
            j -= 1
        tl.store(q, tl.load(q) + 1.0)
        tl.store(target_ptr, x)


@triton.jit
def either(a_ptr, b_ptr, out_ptr, n):
    p = a_ptr
    if n > 3:
        p = b_ptr
    tl.store(out_ptr, tl.load(p))


@triton.jit
def escapes(a_ptr, out_ptr):
    tl.store(out_ptr, a_ptr.to(tl.int64).to(tl.float32))
