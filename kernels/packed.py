"""Packed forms of the attention operators: what a model has after one product for Wq, Wk and Wv.

qkv [B, L, 3, H, K] holds queries, keys and values, kv [B, L, 2, G, K] keys and values. Taken whole, their gradients are
tensors of the same layout, which an implementation can write at once; split outside, autograd copies them together.
A form is chosen, loaded and checked as its operator is. An implementation that has none of its own gets `split`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FORMS: dict[str, tuple[str, ...]] = {
    "attention": ("self_attention", "cross_attention"),
    "unified_attention": ("packed_unified_attention",),
}
_OPERATOR = {form: operator for operator, forms in FORMS.items() for form in forms}
# arguments of a form: how many of the operator's arguments each holds
_ARGUMENTS: dict[str, dict[str, int]] = {
    "self_attention": {"qkv": 3},
    "cross_attention": {"q": 1, "kv": 2},
    "packed_unified_attention": {"qkv": 3, "kv_other": 2},
}


def operator_of(name: str) -> str:
    """The operator that `name` is a form of, or `name` itself."""
    return _OPERATOR.get(name, name)


def unpack(*sources: Tensor) -> tuple[Tensor, ...]:
    """Views [B, L, H, K] of every part of packed [B, L, n, H, K] and plain [B, L, H, K] tensors, in their order."""
    return tuple(x for one in sources for x in (one.unbind(2) if one.dim() == 5 else (one,)))


def pack(form: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arguments of `form` from those of its operator, copied."""
    parts, packed = iter(inputs.values()), {}
    for name, count in _ARGUMENTS[form].items():
        some = [next(parts) for _ in range(count)]
        packed[name] = torch.stack(some, 2) if count > 1 else some[0]
    return packed


def split(form: str, plain: Callable) -> Callable:
    """`form` by its operator's function on views; autograd adds up and packs the gradients."""

    def self_attention(qkv: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        # handed on as one view, so that its gradient is one tensor; q apart from it: of a slice's gradient autograd
        # makes a tensor of the whole
        q, kv = qkv.split((1, 2), 2)
        return plain(q.squeeze(2), *kv.unbind(2), **arguments), kv

    def cross_attention(q: Tensor, kv: Tensor, **arguments: Any) -> Tensor:
        return plain(q, *kv.unbind(2), **arguments)

    def packed_unified_attention(qkv: Tensor, kv_other: Tensor, **arguments: Any) -> Tensor:
        return plain(*unpack(qkv, kv_other), **arguments)

    forms = (self_attention, cross_attention, packed_unified_attention)
    return next(one for one in forms if one.__name__ == form)


def resolve(name: str, module: Any) -> Callable:
    """The function of `module` that computes an operator or a form of it."""
    own = getattr(module, name, None)
    return own if own is not None else split(name, getattr(module, operator_of(name)))


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
