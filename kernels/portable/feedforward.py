"""The hidden layer of a feedforward with its first product, backward written out."""

from typing import Any

import torch
from torch import Tensor

from kernels.activations import activation_of
from kernels.dropout import Dropout, SiteKeys, pack_keys, unpack_keys
from kernels.portable.drop import add_scaled, apply_, scale_of, stream_keys
from kernels.portable.products import linear
from kernels.validation import once_differentiable

_aten = torch.ops.aten


class _ReLU(torch.autograd.Function):
    """dropout(relu(product)): saves only what it returns, whose positive elements are the active and kept ones."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, keys: SiteKeys | None) -> Tensor:
        hidden = apply_(torch.relu(product), keys)
        ctx.scale = scale_of(keys)
        if keys is not None:
            hidden.mul_(ctx.scale)
        ctx.save_for_backward(hidden)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor):  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        d_product = _aten.threshold_backward(d_hidden, hidden, 0)
        return d_product if ctx.scale == 1.0 else d_product.mul_(ctx.scale), None


class _Hidden(torch.autograd.Function):
    """The other kinds: saves the product, recomputes the activations.

    plain: act(product); gated: act(gate) up; mixed: factor (gate_dropout(sigmoid(slow)) + relu(fast)).
    """

    @staticmethod
    def forward(
        ctx: Any, product: Tensor, kind: str, activation: str, factor: float, keys: SiteKeys | None,
        gate_keys: SiteKeys | None,
    ) -> Tensor:  # fmt: skip
        if kind == "plain":
            hidden = activation_of(activation).formula(product)
            hidden = hidden.clone() if hidden is product else hidden
        elif kind == "gated":
            gate, up = product.chunk(2, dim=-1)
            hidden = activation_of(activation).formula(gate) * up
        else:
            slow, fast = product.chunk(2, dim=-1)
            hidden = add_scaled(torch.relu(fast), _slow(slow, gate_keys), scale_of(gate_keys))
        scale = factor * scale_of(keys)
        hidden = apply_(hidden, keys)
        if scale != 1.0:
            hidden.mul_(scale)
        ctx.save_for_backward(product, *pack_keys(keys, gate_keys))
        ctx.kind, ctx.activation, ctx.scale = kind, activation, scale
        ctx.p, ctx.gate_p = (None if k is None else k.p for k in (keys, gate_keys))
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor):  # type: ignore[override]
        product, *drawn = ctx.saved_tensors
        keys, gate_keys = unpack_keys(drawn, ctx.p, ctx.gate_p)
        d = apply_(d_hidden * ctx.scale, keys)
        if ctx.kind == "plain":
            return activation_of(ctx.activation).backward(d, product), *(None,) * 5
        gate, up = product.chunk(2, dim=-1)
        d_product = torch.empty_like(product)
        d_gate, d_up = d_product.chunk(2, dim=-1)
        if ctx.kind == "gated":
            active = activation_of(ctx.activation).formula(gate)
            if torch.compiler.is_compiling():  # which knows no `out` that is part of a tensor, and fuses the copy
                d_up.copy_(d * active)
            else:
                torch.mul(d, active, out=d_up)
            d_gate.copy_(activation_of(ctx.activation).backward(d.mul_(up), gate))
        else:
            d_up.copy_(_aten.threshold_backward(d, up, 0))
            d_slow = apply_(d.mul_(scale_of(gate_keys)), gate_keys)
            d_gate.copy_(_aten.sigmoid_backward(d_slow, torch.sigmoid(gate)))
        return d_product, *(None,) * 5


def _slow(slow: Tensor, keys: SiteKeys | None) -> Tensor:
    return apply_(torch.sigmoid(slow).contiguous(), keys)


def glu(
    x: Tensor, weight: Tensor, *, kind: str, activation: str, factor: float, dropout: Dropout | None,
    gate_dropout: Dropout | None,
) -> Tensor:  # fmt: skip
    """Contract in kernels.api.glu."""
    product = linear(x, weight)
    width = product if kind == "plain" else product[..., : weight.shape[0] // 2]
    keys, gate_keys = stream_keys(dropout, width), stream_keys(gate_dropout, width)
    if kind == "plain" and activation == "relu":
        return _ReLU.apply(product, keys)
    return _Hidden.apply(product, kind, activation, factor, keys, gate_keys)
