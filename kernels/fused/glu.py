"""The hidden layer of a feedforward in one kernel: products, activation, gating, dropout (docs/kernels/glu.md).

Legend: B batch, L positions, D inner width, F hidden width, P products (1: plain, 2: gated, mixed), N = F rounded up
to 16: rows of the hidden layer start at multiples of N, since F = 1365 would mean stores of 2 bytes.

Backward of a plain relu is two products of our own that stop the gradient by the bits which forward kept: the gradient
of the product before the relu exists nowhere. For the other activations and for two products it does ("d_product"),
from one elementwise pass, or with the products where they were not kept; d_x and d_weight are then the library's
products: a prologue that evaluates an activation costs more than the pass (docs/kernels/glu.md).
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dropout import Dropout, keep_scale
from kernels.fused import tiles_glu as tiles
from kernels.fused.activation_code import activation_key
from kernels.fused.glu_gradients import _glu_dw_kernel, _glu_dx_kernel
from kernels.fused.glu_kernels import _glu_backward_kernel, _glu_forward_kernel, _glu_recompute_kernel
from kernels.fused.launch import (
    alignment,
    architecture,
    check_supported,
    drop_arguments,
    filled,
    in_rows,
    in_vectors,
    launches,
    needs_backward,
    operator,
)
from kernels.fused.primitives import _sum_partials_kernel, signed_threshold

COLUMN_UNIT = 16
SUM_BLOCK = 1024


def _padded(width: int) -> int:
    return -(-width // COLUMN_UNIT) * COLUMN_UNIT


def _units(name: str, *strides: int) -> dict[str, int]:
    """Arguments of a kernel: the strides in units of their alignment, which is a constant."""
    unit = alignment(strides)
    return {f"{name.upper()}_UNIT": unit} | {
        f"stride_{name}{dim}": s // unit for dim, s in zip("bl" if len(strides) == 2 else "r", strides, strict=True)
    }


def _inner(x: Tensor, weight: Tensor) -> dict[str, Any]:
    return {"D": x.shape[2], **_units("x", *x.stride()[:2]), **_units("w", weight.stride(0))}


def _dropouts(p: float, site: int, gate_p: float, gate_site: int) -> dict[str, Any]:
    return {
        "site": site,
        "threshold": signed_threshold(p),
        "scale": keep_scale(p),
        "gate_site": gate_site,
        "gate_threshold": signed_threshold(gate_p),
        "gate_scale": keep_scale(gate_p),
        "DROPOUT": p > 0,
        "GATE_DROPOUT": gate_p > 0,
    }


@operator("march::glu", vectors=("x", "weight"))
def _forward_op(
    x: Tensor, weight: Tensor, rng: Tensor | None, gate_rng: Tensor | None, kind: str, activation: str, factor: float,
    p: float, site: int, gate_p: float, gate_site: int, save: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(hidden [B, L, F] with rows N apart, saved); save: "product" [B L, P N], "bits" int32 [F / 32, B L], "" [0]."""
    batch, length, _ = x.shape
    halves = 1 if kind == "plain" else 2
    width = weight.shape[0] // halves
    padded, rows = _padded(width), batch * length
    hidden = torch.empty((batch, length, padded), dtype=x.dtype, device=x.device)
    if save == "bits":
        saved = torch.empty((-(-width // 32), rows), dtype=torch.int32, device=x.device)
    else:
        saved = torch.empty((rows, halves * padded) if save else (0,), dtype=x.dtype, device=x.device)
    if launches(x) and rows and width:
        tile = tiles.product_tile(architecture(x), halves == 2, 8 * x.element_size())
        grid = (triton.cdiv(rows, tile.m) * triton.cdiv(padded, tile.n),)
        _glu_forward_kernel[grid](
            x, weight, hidden, saved, rng, gate_rng, rows, length, width, padded, triton.cdiv(x.shape[2], tile.k),
            factor=factor, KIND=kind, ACTIVATION=activation_key(activation), SAVE=save,
            **_inner(x, weight), **_dropouts(p, site, gate_p, gate_site), **tile.options(),
        )  # fmt: skip
    return hidden[..., :width], saved


@operator("march::glu_backward", vectors=("x", "weight"), rows=("d_hidden",))
def _backward_op(
    d_hidden: Tensor, saved: Tensor, x: Tensor, weight: Tensor, rng: Tensor | None, gate_rng: Tensor | None,
    kind: str, activation: str, factor: float, p: float, site: int, gate_p: float, gate_site: int, source: str,
) -> Tensor:  # fmt: skip
    """d_product [B L, P N]; source of the products: "product" (in `saved`) or "x"."""
    batch, length, width = d_hidden.shape
    halves = 1 if kind == "plain" else 2
    padded, rows = _padded(width), batch * length
    d_product = torch.empty((rows, halves * padded), dtype=x.dtype, device=x.device)
    if not (launches(x) and rows and width):
        return d_product
    common = {
        "M": rows, "L": length, "F": width, "N": padded, "factor": factor, "KIND": kind,
        "ACTIVATION": activation_key(activation),
        **_units("d", *d_hidden.stride()[:2]), **_dropouts(p, site, gate_p, gate_site),
    }  # fmt: skip
    tensors = (d_hidden, d_product, rng, gate_rng)
    if source == "x":
        tile = tiles.product_tile(architecture(x), halves == 2, 8 * x.element_size())
        grid = (triton.cdiv(rows, tile.m) * triton.cdiv(padded, tile.n),)
        blocks = triton.cdiv(x.shape[2], tile.k)
        _glu_recompute_kernel[grid](
            x, weight, *tensors, inner_blocks=blocks, **common, **_inner(x, weight), **tile.options()
        )
    else:
        block_m, block_n, warps = tiles.ELEMENTWISE
        grid = (triton.cdiv(rows, block_m) * triton.cdiv(padded, block_n),)
        _glu_backward_kernel[grid](saved, *tensors, **common, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps)
    return d_product


@operator("march::glu_relu_backward", vectors=("x", "weight"), rows=("d_hidden",))
def _relu_op(
    d_hidden: Tensor, bits: Tensor, x: Tensor, weight: Tensor, p: float, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """(d_x, d_weight) of a plain relu from the bits of what it let through; empty where not needed."""
    (rows, width), depth = (x.shape[0] * x.shape[1], d_hidden.shape[2]), x.shape[2]
    d_x = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    d_weight = torch.empty(weight.shape if needs_weight else (0,), dtype=weight.dtype, device=x.device)
    if not (rows and width and depth):
        return d_x.zero_(), d_weight.zero_()
    if not launches(x):
        return d_x, d_weight
    d_hidden, x = in_rows(d_hidden.flatten(0, 1)), in_vectors(x.flatten(0, 1))
    arch, bits_of = architecture(x), 8 * x.element_size()
    common = {"scale": keep_scale(p), "D": depth}
    if needs_x:
        align = alignment((d_hidden.stride(0), weight.stride(0)))
        tile = tiles.gradient_tile(arch, "dx", bits_of, align)
        blocks = triton.cdiv(width, tile.k)
        _glu_dx_kernel[(triton.cdiv(rows, tile.m) * triton.cdiv(depth, tile.n),)](
            d_hidden, weight, bits, d_x, rows, width, blocks, d_hidden.stride(0), weight.stride(0), **common,
            EVEN=width % tile.k == depth % tile.n == 0, ALIGN=align,
            **tile.options(),
        )  # fmt: skip
    if needs_weight:
        align = alignment((d_hidden.stride(0), x.stride(0)))
        tile = tiles.gradient_tile(arch, "dw", bits_of, align)
        programs = triton.cdiv(width, tile.m) * triton.cdiv(depth, tile.n)
        splits, share = tiles.splits(programs, rows, tile.k)
        # also of one split: another dtype would be another program for each number of rows
        parts = torch.empty((splits, *weight.shape), dtype=torch.float32, device=x.device)
        _glu_dw_kernel[(programs * splits,)](
            d_hidden, x, bits, parts, rows, width, share, d_hidden.stride(0), x.stride(0), **common,
            EVEN=width % tile.m == depth % tile.n == 0, ALIGN=align,
            **tile.options(),
        )  # fmt: skip
        count = d_weight.numel()
        grid = (triton.cdiv(count, SUM_BLOCK),)
        _sum_partials_kernel[grid](parts, d_weight, count, splits, count, count, BLOCK=SUM_BLOCK)
    return d_x, d_weight


@register_flop_formula(torch.ops.march.glu)
def _forward_flops(x_shape: Any, weight_shape: Any, *arguments: Any, **_: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.march.glu_backward)
def _backward_flops(d_shape: Any, saved: Any, x_shape: Any, weight_shape: Any, *arguments: Any, **_: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0] if arguments[-1] == "x" else 0


@register_flop_formula(torch.ops.march.glu_relu_backward)
def _relu_flops(d_shape: Any, bits: Any, x_shape: Any, weight_shape: Any, *arguments: Any, **_: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0] * sum(arguments[1:3])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, rng, gate_rng, *settings, save = inputs
    _, saved = output
    ctx.settings = settings
    ctx.source = save or "x"
    ctx.save_for_backward(x, weight, rng, gate_rng, saved if save else None)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_hidden: Tensor | None, _: Tensor | None) -> tuple:
    x, weight, rng, gate_rng, saved = ctx.saved_tensors
    unused = (None,) * 10
    if d_hidden is None:
        return None, None, *unused
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    if ctx.source == "bits":
        p = ctx.settings[3]
        d_x, d_weight = _relu_op(d_hidden, saved, x, weight, p, needs_x, needs_weight)
        return d_x if needs_x else None, d_weight if needs_weight else None, *unused
    if saved is None:
        saved = x.new_empty(0)
    d_product = _backward_op(d_hidden, saved, x, weight, rng, gate_rng, *ctx.settings, ctx.source)
    halves = 1 if ctx.settings[0] == "plain" else 2
    width = weight.shape[0] // halves
    padded, depth = _padded(width), weight.shape[1]
    d_x = d_weight = None
    if needs_x:
        if padded != width:
            # columns beyond F are zero in d_product, so any finite rows would do; a copy of 3 MB at F 1365
            weight = torch.nn.functional.pad(weight.view(halves, width, depth), (0, 0, 0, padded - width)).flatten(0, 1)
        d_x = (d_product @ weight).view(x.shape)
    if needs_weight:
        d_weight = d_product.T @ x.reshape(-1, depth)
        if padded != width:
            d_weight = d_weight.view(halves, padded, depth)[:, :width].reshape(-1, depth)
    return d_x, d_weight, *unused


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def glu(
    x: Tensor, weight: Tensor, *, kind: str, activation: str, factor: float, dropout: Dropout | None,
    gate_dropout: Dropout | None, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """Contract in kernels.api.glu. float16, bfloat16 or float32, else ValueError.

    Keeps for backward x, weight and the products [B L, P N], of a plain relu one bit an element instead; with
    `recompute` neither, and backward computes the products again. The result is a view of rows N apart. Rows of x and
    weight that cannot be read 16 bytes at a time are copied (kernels.fused.launch).
    """
    check_supported("glu", x, weight)
    x, weight = filled(x, weight)
    save = ""
    if needs_backward(x, weight) and not recompute:
        save = "bits" if kind == "plain" and activation == "relu" else "product"
    rng, p, site = drop_arguments(dropout)
    gate_rng, gate_p, gate_site = drop_arguments(gate_dropout)
    drops = (p, site, gate_p, gate_site)
    return _forward_op(x, weight, rng, gate_rng, kind, activation, factor, *drops, save)[0]
