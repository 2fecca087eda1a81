"""Cross entropy of a linear layer's logits, in chunks; both gradients computed in the forward pass."""

from typing import Any

import torch
from torch import Tensor

from kernels.portable.products import matmul
from kernels.reference import at_least_float32
from kernels.validation import once_differentiable

# Logits alive at one time: 1,118 tokens of a 30,000 vocabulary, 67 MB in bfloat16. A step of 4 x 206 labels is one
# chunk, so that dE is one product and is not added up in float32.
CHUNK_LOGITS = 1 << 25
# Logits of one softmax: 34 tokens of a 30,000 vocabulary, 4 MB in float32, stay in the last-level cache.
CACHED_LOGITS = 1 << 20

GAIN = 256.0


def _softmax_loss_(logits: Tensor, target: Tensor, valid: Tensor, needs_gradient: bool) -> Tensor:
    """Loss of each row of logits [T, V] at target [T]; with a gradient, logits become softmax - one-hot in place."""
    wide = at_least_float32(logits.dtype)
    losses = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
    step = max(1, CACHED_LOGITS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        block = logits[rows]
        index = target[rows, None]
        at_target = block.gather(1, index).to(wide)
        if not needs_gradient:
            losses[rows] = (block.to(wide).logsumexp(-1, keepdim=True) - at_target).squeeze(1)
            continue
        # lse from the largest logit and its probability, which is at least 1 / V: two reductions and one fused softmax
        # instead of exp, sum, log and exp again
        top = block.amax(-1, keepdim=True).to(wide)
        p = torch.softmax(block, -1, dtype=wide)
        losses[rows] = (top - p.amax(-1, keepdim=True).log_() - at_target).squeeze(1)
        p.scatter_add_(1, index, torch.full_like(top, -1.0))
        block.copy_(p)
    return losses.masked_fill_(~valid, 0.0)


def _times(x: Tensor | None, factor: Tensor) -> Tensor | None:
    """x times a float32 scalar, rounded to x's type once: a loss scale of 65536 is no float16."""
    if x is None or x.device.type == "cpu":
        return None if x is None else x * factor  # a CPU multiplies by the scalar in float32 as it is, in one pass
    return (x * factor.view(1, 1)).to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of (h scale) E^T; tokens [T, D], labels [T].

    The gradients are linear in the incoming one, a scalar, so backward only scales them, and no logits are kept or
    computed twice. Scalar factors are applied in float32, last. dE of several chunks is accumulated in float32.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, scale: float, ignore_index: int, recorded: bool):
        wide = at_least_float32(h.dtype)
        valid = labels != ignore_index
        count = valid.sum().clamp(min=1)
        unknown = valid & ((labels < 0) | (labels >= weight.shape[0]))
        target = labels.masked_fill(~valid | unknown, 0)
        counted = valid.to(h.dtype).masked_fill_(unknown, torch.nan)[:, None]
        # what a row of h is weighted by in dE: a mean cannot overflow, GAIN keeps a float16 one from vanishing
        row_weight = (valid.to(wide) * GAIN / count).masked_fill_(unknown, torch.nan)[:, None]
        losses = torch.empty(labels.shape, dtype=wide, device=h.device)
        # true of a parameter under no_grad too, where nobody will ask for the gradients
        needs_h, needs_weight = (recorded and needed for needed in ctx.needs_input_grad[:2])
        dh = torch.empty_like(h) if needs_h else None
        dw = None
        step = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, labels.shape[0], step):
            chunk = slice(start, start + step)
            logits = matmul(h[chunk] * scale, weight.T)
            losses[chunk] = _softmax_loss_(logits, target[chunk], valid[chunk], needs_h or needs_weight)
            if dh is not None:
                dh[chunk] = matmul(logits, weight).mul_(counted[chunk])
            if needs_weight:
                part = matmul(logits.T, (h[chunk] * row_weight[chunk]).to(h.dtype))
                if step < labels.shape[0]:
                    dw = part.to(wide) if dw is None else dw.add_(part)
                else:
                    dw = part
        if needs_weight and dw is None:
            dw = torch.zeros_like(weight)
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype), count)
        ctx.scale = scale
        loss = losses.masked_fill_(unknown, torch.nan).sum() / count
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        return loss, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor | None):  # type: ignore[override]
        dh, dw, count = ctx.saved_tensors
        d_loss = d_loss * ctx.scale
        return _times(dh, d_loss / count), _times(dw, d_loss / GAIN), None, None, None, None


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, *, scale: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Contract in kernels.api.linear_cross_entropy."""
    flat = h.flatten(0, 1), weight, labels.flatten()
    loss, losses = _LinearCrossEntropy.apply(*flat, scale, ignore_index, torch.is_grad_enabled())
    return loss, losses.view(labels.shape)
