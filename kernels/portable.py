"""The fast portable path, in plain torch operations: what a CPU runs, and the fair rival of the fused kernels.

No [B, H, Lq, Lk] tensor outlives one chunk of heads, logits exist in chunks, masks are drawn again in backward. The
dropout masks are those of kernels.dropout, so the numbers are `reference`'s.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import (
    SEGMENT_COLUMNS,
    Dropout,
    column_keys,
    keep_from_keys,
    keep_scale,
    row_keys,
    stream_keep_mask,
)
from kernels.reference import at_least_float32, causal_valid, key_padding

# Scores of one chunk: 8 MiB of float32 stay in a core's share of the last-level cache.
CHUNK_SCORES = 1 << 21
# Logits of one chunk: 256 tokens of a 30,000 vocabulary are 29 MiB in float32.
CHUNK_LOGITS = 1 << 23


class _Keep:
    """The keep mask of attention probabilities over one or two key segments, one (sequence, head) range at a time."""

    def __init__(self, dropout: Dropout, batch: int, heads: int, queries: int, segments: tuple[int, ...]):
        self.p = dropout.p
        a, b = row_keys(dropout, batch, heads, queries)
        self.a, self.b = a.flatten(0, 1), b.flatten(0, 1)
        offsets = (0, SEGMENT_COLUMNS)
        self.c = torch.cat([column_keys(dropout, n, offset) for n, offset in zip(segments, offsets, strict=False)])

    def multiplier(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """keep / keep probability as `dtype`, [rows, queries, keys]."""
        keep = keep_from_keys(self.a[rows], self.b[rows], self.c, self.p)
        return keep.to(dtype).mul_(keep_scale(self.p))


class _Attention(torch.autograd.Function):
    """softmax attention over q [R, M, K], k [R, N, K], v [R, N, Kv], R = batch * heads rows, in chunks of rows.

    invalid: bool, broadcastable to [R, M, N] in its first dimension by row_of (None: all keys valid). Saves q, k, v, O
    and the log-sum-exp; backward recomputes the probabilities of a chunk (Dao et al., 2022).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, keep: _Keep | None):
        rows, queries, _ = q.shape
        wide = at_least_float32(q.dtype)
        out = q.new_empty(rows, queries, v.shape[2])
        lse = torch.empty(rows, queries, dtype=wide, device=q.device)
        for chunk in _chunks(rows, queries * k.shape[1]):
            scores = _scores(q[chunk], k[chunk], scale, bias, chunk, wide)
            top = scores.amax(-1, keepdim=True)
            top = top.masked_fill_(top.isinf(), 0.0)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            # a row that sees no key: zeros, and a log-sum-exp of +inf makes its probabilities 0 in backward
            lse[chunk] = torch.where(total == 0, torch.inf, top + total.log()).squeeze(-1)
            if keep is not None:
                weights.mul_(keep.multiplier(chunk, wide))
            out[chunk] = torch.bmm(weights.to(v.dtype), v[chunk]) / total.masked_fill(total == 0, 1.0).to(v.dtype)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.scale, ctx.keep = scale, keep
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor):  # type: ignore[override]
        q, k, v, out, lse, bias = ctx.saved_tensors
        wide, keep = lse.dtype, ctx.keep
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        delta = (d_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        for chunk in _chunks(q.shape[0], q.shape[1] * k.shape[1]):
            scores = _scores(q[chunk], k[chunk], ctx.scale, bias, chunk, wide)
            p = scores.sub_(lse[chunk].unsqueeze(-1)).exp_()
            dp = torch.bmm(d_out[chunk], v[chunk].transpose(1, 2)).to(wide)
            dropped = p
            if keep is not None:
                multiplier = keep.multiplier(chunk, wide)
                dropped = p * multiplier
                dp.mul_(multiplier)
            dv[chunk] = torch.bmm(dropped.to(v.dtype).transpose(1, 2), d_out[chunk])
            ds = dp.sub_(delta[chunk]).mul_(p).mul_(ctx.scale).to(q.dtype)
            dq[chunk] = torch.bmm(ds, k[chunk])
            dk[chunk] = torch.bmm(ds.transpose(1, 2), q[chunk])
        return dq, dk, dv, None, None, None


def _chunks(rows: int, size: int) -> list[slice]:
    step = max(1, CHUNK_SCORES // max(1, size))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, chunk: slice, wide: torch.dtype) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2)).to(wide)
    if scale != 1.0:
        scores.mul_(scale)
    if bias is not None:
        scores.add_(bias if bias.shape[0] == 1 else bias[chunk])
    return scores


def _bias(valid: Tensor, heads: int, dtype: torch.dtype) -> Tensor | None:
    """0 where valid, -inf elsewhere: [1, M or 1, N] of a mask shared by the batch, else [batch * heads, M or 1, N]."""
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, float("-inf"))
    if bias.shape[0] == 1:
        return bias
    return bias.repeat_interleave(heads, dim=0)


def _rows(x: Tensor, batch: int, heads: int) -> Tensor:
    """[B or 1, L, G, K] as [batch * heads, L, K]."""
    x = x.expand(batch, -1, -1, -1).transpose(1, 2)
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    return x.reshape(batch * heads, x.shape[2], x.shape[3])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.attention."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    if keys == 0 or queries == 0 or batch == 0:
        return (q[..., :1] * 0).expand(*q.shape[:3], v.shape[3]) + (k.sum() + v.sum()) * 0
    wide = at_least_float32(q.dtype)
    bias = None
    if key_lengths is not None or key_mask is not None:
        valid = key_padding(batch, keys, key_lengths, key_mask, q.device)[:, None]
        if causal:
            valid = valid & causal_valid(queries, keys, q.device)
        bias = _bias(valid, heads, wide)
    elif causal:
        bias = _bias(causal_valid(queries, keys, q.device)[None], heads, wide)
    keep = None if dropout is None else _Keep(dropout, batch, heads, queries, (keys,))
    out = _Attention.apply(_rows(q, batch, heads), _rows(k, batch, heads), _rows(v, batch, heads), scale, bias, keep)
    return out.view(batch, heads, queries, -1).transpose(1, 2)


def unified_attention(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_other: Tensor,
    v_other: Tensor,
    *,
    scale: float,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.unified_attention."""
    batch, queries, heads, _ = q.shape
    own, other = k_own.shape[1], k_other.shape[1]
    if queries == 0 or batch == 0:
        return q.new_zeros(batch, queries, heads, v_own.shape[3])
    padding = key_padding(batch, other, key_lengths, key_mask, q.device)[:, None]
    if key_lengths is None and key_mask is None:
        padding = padding[:1]
    causal = causal_valid(queries, own, q.device)[None].expand(padding.shape[0], -1, -1)
    bias = _bias(torch.cat([causal, padding.expand(-1, queries, -1)], -1), heads, at_least_float32(q.dtype))
    keep = None if dropout is None else _Keep(dropout, batch, heads, queries, (own, other))
    k = torch.cat([_rows(k_own, batch, heads), _rows(k_other, batch, heads)], dim=1)
    v = torch.cat([_rows(v_own, batch, heads), _rows(v_other, batch, heads)], dim=1)
    out = _Attention.apply(_rows(q, batch, heads), k, v, scale, bias, keep)
    return out.view(batch, heads, queries, -1).transpose(1, 2)


class _Drop(torch.autograd.Function):
    """dropout(x) of a stream [B, L, D]; backward draws the mask again instead of saving it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout) -> Tensor:
        ctx.dropout = dropout
        return _dropped(x, dropout)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor):  # type: ignore[override]
        return _dropped(d_out, ctx.dropout), None


def _dropped(x: Tensor, dropout: Dropout) -> Tensor:
    return (x * stream_keep_mask(dropout, x)).mul_(keep_scale(dropout.p))


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """dropout(x) of a stream x [B, L, D]."""
    return x if dropout is None or x.numel() == 0 else _Drop.apply(x, dropout)


_ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid, "identity": lambda x: x}


def glu(
    x: Tensor,
    weight: Tensor,
    *,
    kind: str,
    activation: str,
    factor: float,
    dropout: Dropout | None,
    gate_dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.glu."""
    product = F.linear(x, weight)
    if kind == "plain":
        return drop(_ACTIVATIONS[activation](product), dropout)
    gate, up = product.chunk(2, dim=-1)
    if kind == "gated":
        return drop(_ACTIVATIONS[activation](gate) * up, dropout)
    hidden = drop(torch.sigmoid(gate), gate_dropout) + torch.relu(up)
    return drop(hidden if factor == 1.0 else hidden * factor, dropout)


def residual_norm(
    x: Tensor | None, s: Tensor | None, gain: Tensor, *, dropout: Dropout | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Contract in kernels.api.residual_norm."""
    if s is None:
        assert x is not None
        y = x
    else:
        dropped = drop(s, dropout)
        y = dropped if x is None else x + dropped
    wide = at_least_float32(y.dtype)
    z = F.rms_norm(y.to(wide), gain.shape, gain.to(wide), eps).to(y.dtype)
    return y, z


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of (h scale) E^T in chunks of tokens; dh and dE are computed in the forward pass.

    The gradients are linear in the incoming one, a scalar, so backward only scales them, and no logits are kept or
    computed twice. Tokens [T, D], labels [T]. dE is accumulated in float32.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, scale: float, ignore_index: int):
        wide = at_least_float32(h.dtype)
        valid = labels != ignore_index
        count = valid.sum().clamp(min=1)
        losses = torch.empty(labels.shape, dtype=wide, device=h.device)
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if needs_h else None
        dw = torch.zeros(weight.shape, dtype=wide, device=h.device) if needs_weight else None
        step = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, labels.shape[0], step):
            chunk = slice(start, start + step)
            scaled = h[chunk] * scale
            logits = (scaled @ weight.T).to(wide)
            lse = logits.logsumexp(-1, keepdim=True)
            target = labels[chunk].masked_fill(~valid[chunk], 0)[:, None]
            losses[chunk] = torch.where(valid[chunk], (lse - logits.gather(1, target)).squeeze(1), 0.0)
            if dh is None and dw is None:
                continue
            d_logits = logits.sub_(lse).exp_()
            d_logits.scatter_add_(1, target, torch.full_like(lse, -1.0))
            d_logits.mul_((valid[chunk].to(wide) / count)[:, None])
            d_logits = d_logits.to(h.dtype)
            if dh is not None:
                dh[chunk] = (d_logits @ weight).mul_(scale)
            if dw is not None:
                dw += (d_logits.T @ scaled).to(wide)
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype))
        loss = losses.sum() / count
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor | None):  # type: ignore[override]
        dh, dw = ctx.saved_tensors
        return (
            None if dh is None else dh * d_loss.to(dh.dtype),
            None if dw is None else dw * d_loss.to(dw.dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, *, scale: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Contract in kernels.api.linear_cross_entropy."""
    loss, losses = _LinearCrossEntropy.apply(h.flatten(0, 1), weight, labels.flatten(), scale, ignore_index)
    return loss, losses.view(labels.shape)


def embedding(
    ids: Tensor,
    table: Tensor,
    positions: Tensor,
    *,
    combine: str,
    dropout: Dropout | None,
    position_dropout: Dropout | None,
) -> Tensor:
    """Contract in kernels.api.embedding."""
    tokens = drop(F.embedding(ids, table), dropout)
    places = positions[: ids.shape[1]]
    if position_dropout is None:
        total = tokens + places
    else:
        total = tokens + drop(places.expand(ids.shape[0], -1, -1), position_dropout)
    return total / 2 if combine == "average" else total
