"""Rows as the fused kernels read them: 16 bytes a load.

Rows that start elsewhere than at multiples of 16 bytes are read 2, 4 or 8 bytes at a time. That takes as many more
instructions and pointers, and the kernels with products spill for lack of the registers (attention's dQ at K 49: 161;
glu at D 365: 24; cross entropy at D 942: 14). They are copied instead, filled up with zeros, which add nothing to a
product. A model that fills up its weights has no such rows (`kernels.head_width`, `kernels.row_width`).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.packed import aligned_width


def in_vectors(x: Tensor) -> Tensor:
    """`x`, copied only if its rows (the last dimension) cannot be read 16 bytes at a time: an innermost stride other
    than 1, or rows that start elsewhere than at multiples of 16 bytes."""
    starts = [x.storage_offset(), *(s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)]
    if x.stride(-1) == 1 and all(start * x.element_size() % 16 == 0 for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def filled(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros in further columns, up to `aligned_width`, where rows of their width could never be read
    16 bytes at a time. Differentiable, and a function of the last dimension alone: torch.compile sees no guard."""
    missing = [aligned_width(x.shape[-1], x.element_size()) - x.shape[-1] for x in tensors]
    return tuple(pad(x, (0, n)) if n else x for x, n in zip(tensors, missing, strict=True))
