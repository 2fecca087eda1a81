"""Packed attention: what a model has after one product for Wq, Wk and Wv.

q may hold queries, keys and values [B, L, 3, H, K]; k, or k2 of a second segment, keys and values [B, L, 2, G, K].
Taken whole, their gradients are tensors of the same layout, which an implementation can write at once; split outside,
autograd copies them together. An implementation that takes none whole is `unpacked`.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def unpack(*sources: Tensor | None) -> tuple[Tensor, ...]:
    """Views [B, L, H, K] of every part of packed [B, L, n, H, K] and plain [B, L, H, K] tensors, in their order."""
    return tuple(x for one in sources if one is not None for x in (one.unbind(2) if one.dim() == 5 else (one,)))


def unpacked(plain: Callable) -> Callable:
    """`plain`, attention of q, k, v and perhaps k2, v2, of packed tensors too; autograd adds up and packs the
    gradients."""

    @functools.wraps(plain)
    def attention(q: Tensor, *keys: Tensor | None, return_kv: bool = False, **arguments: Any) -> Any:
        kv = None
        if q.dim() == 5:
            # handed on as one view, so that its gradient is one tensor; q apart from it: of a slice's gradient
            # autograd makes a tensor of the whole
            q, kv = q.split((1, 2), 2)
            q = q.squeeze(2)
        named = [arguments.pop(name, None) for name in ("k", "v", "k2", "v2")]
        out = plain(*unpack(q, kv, *keys, *named), **arguments)
        return (out, kv) if return_kv else out

    return attention


def aligned_width(width: int, element_size: int) -> int:
    """`width`, rounded up to a multiple of 16 where rows of it would not start at multiples of 16 bytes."""
    return width if width * element_size % 16 == 0 else -(-width // 16) * 16


def head_stride(width: int) -> int:
    """The width that the fused kernels want heads filled with zeros to: a multiple of 16.

    A head stride of 380 bytes allows loads of 4 bytes only, and as many pointers: dK and dV at 190 spill hundreds of
    registers, dQ at 49 spills 161. Products have steps of 16 in any case, and a whole last step needs no mask, which at
    40, 104 and 120 costs the one to five registers that are missing. The zeros change no product.
    """
    return -(-width // 16) * 16
