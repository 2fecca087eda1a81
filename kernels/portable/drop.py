"""Dropout of a stream [B, L, D], by the contract: its keys, and its mask as a factor that is applied in place."""

import torch
from torch import Tensor

from kernels.dropout import Dropout, SiteKeys, keep_words, mask_, site_keys


def stream_keys(dropout: Dropout | None, x: Tensor) -> SiteKeys | None:
    """Keys of a site on x [B, L, D], or None."""
    if dropout is None or x.numel() == 0:
        return None
    batch, length, width = x.shape
    return site_keys(dropout, batch, 1, length, (width,))


def apply_(x: Tensor, keys: SiteKeys | None) -> Tensor:
    """x [B, L, D] with dropped elements 0, in place and unscaled: the caller folds `keys.scale` into a later pass."""
    return x if keys is None else mask_(x, keep_words(keys.a, keys.b, keys.c, keys.p))


def scale_of(*all_keys: SiteKeys | None) -> float:
    """The product of the sites' 1 / keep probability."""
    product = 1.0
    for keys in all_keys:
        if keys is not None:
            product *= keys.scale
    return product


def add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """x + scale y in a new tensor. torch rounds `alpha` to 16 bits with such tensors: 10/9 is 0.2% off in bfloat16."""
    if x.element_size() > 2 or scale in (0.5, 1.0):
        return torch.add(x, y, alpha=scale)
    return (y * scale).add_(x)
