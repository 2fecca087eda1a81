"""Dropout, residual and RMSNorm as one autograd function with its backward written out."""

from typing import Any

import torch
from torch import Tensor

from kernels.dropout import Dropout, SiteKeys, pack_keys, unpack_keys
from kernels.portable.drop import add_scaled, apply_, scale_of, stream_keys
from kernels.reference import at_least_float32
from kernels.validation import once_differentiable


class _ResidualNorm(torch.autograd.Function):
    """y = x + dropout(s), z = y rsqrt(mean(y^2) + eps) gain; saves y, the rows' factor and the gain.

    With n = y r and r the row's factor, dy = r (g - n mean(g n)), g = dz gain, and dgain = sum of dz n over rows.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor | None, s: Tensor | None, gain: Tensor, keys: SiteKeys | None, eps: float, features: int
    ) -> tuple[Tensor, Tensor]:
        scale = scale_of(keys)
        if s is None:
            assert x is not None
            y = x
        elif keys is None:
            y = s if x is None else x + s
        else:
            dropped = apply_(s.clone(memory_format=torch.contiguous_format), keys)
            y = dropped.mul_(scale) if x is None else add_scaled(x, dropped, scale)
        wide = y.to(at_least_float32(y.dtype))
        factor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(features).add_(eps).rsqrt_()
        z = (wide * factor).mul_(gain).to(y.dtype)
        ctx.save_for_backward(y, factor, gain, *pack_keys(keys))
        ctx.p, ctx.given, ctx.features = None if keys is None else keys.p, (x is not None, s is not None), features
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None):  # type: ignore[override]
        y, factor, gain, *drawn = ctx.saved_tensors
        (keys,) = unpack_keys(drawn, ctx.p)
        d_gain = None
        dx = dy
        if dz is not None:
            wide = factor.dtype
            normalised = y * factor
            weighted = dz * normalised
            d_gain = weighted.sum((0, 1)).to(gain.dtype)
            mean = (weighted @ gain.to(wide)).div_(ctx.features).unsqueeze(-1)
            total = (dz * gain).to(wide).sub_(normalised.mul_(mean)).mul_(factor)
            dx = (total if dy is None else total.add_(dy)).to(y.dtype)
        ds = dx
        if keys is not None and dx is not None:
            ds = apply_(dx * keys.scale, keys)
        has_x, has_s = ctx.given
        return dx if has_x else None, ds if has_s else None, d_gain, None, None, None


def residual_norm(
    x: Tensor | None, s: Tensor | None, gain: Tensor, *, dropout: Dropout | None, eps: float,
    features: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contract in kernels.api.residual_norm."""
    keys = None if s is None else stream_keys(dropout, s)
    y, z = _ResidualNorm.apply(x, s, gain, keys, eps, features or gain.shape[0])
    # without a sublayer the stream is itself
    return (y if x is None or s is not None else x), z
