"""The plain formulas, in any float type up to float64: the oracle of every test.

B batch, Lq/Lk query and key positions, H heads, G key/value heads, K head width, D stream width, F hidden width,
V vocabulary. Nothing here is fast, nothing is chunked, everything is materialised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import activation_of
from kernels.dropout import SEGMENT_COLUMNS, Dropout, keep_mask, keep_scale, stream_keep_mask
from kernels.packed import unpacked


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Statistics, softmax and loss are float32, or float64 of float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """dropout(x) of a stream x [B, L, D]."""
    if dropout is None or dropout.p == 0:
        return x
    return torch.where(stream_keep_mask(dropout, x), x * keep_scale(dropout.p), 0.0).to(x.dtype)


def key_padding(
    batch: int, length: int, key_lengths: Tensor | None, key_mask: Tensor | None, device: torch.device
) -> Tensor:
    """bool [batch, length], True where a key may be attended to."""
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    if key_lengths is not None:
        valid = valid & (torch.arange(length, device=device)[None] < key_lengths[:, None])
    if key_mask is not None:
        valid = valid & key_mask
    return valid


def causal_valid(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: key j is seen by query i when j <= i."""
    return torch.arange(keys, device=device)[None] <= torch.arange(queries, device=device)[:, None]


def masked_softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """softmax over the last dimension among valid entries; a row with none gives zeros."""
    scores = scores.masked_fill(~valid, float("-inf"))
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - top.masked_fill(top.isinf(), 0.0))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def zeros_of(shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
    """Zeros that are a function of `inputs`: the result of an operator without anything to compute has a graph."""
    return sum((x.flatten()[:0].sum() for x in inputs), inputs[0].new_zeros(shape))


def without_padding(x: Tensor, batch: int, padding: Tensor) -> Tensor:
    """x [B or 1, Lk, G, K] with zeros where padding [batch, Lk] is False: whatever stood there reaches nothing, while
    0 times NaN would."""
    return x.expand(batch, -1, -1, -1).masked_fill(~padding[..., None, None], 0.0)


def _per_head(x: Tensor, batch: int, heads: int) -> Tensor:
    """Broadcasts keys or values [B or 1, Lk, G, K] to [batch, heads, Lk, K]."""
    x = x.expand(batch, -1, -1, -1).transpose(1, 2)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


@unpacked
def attention(
    q: Tensor, k: Tensor, v: Tensor, *second: Tensor, scale: float, causal: bool = False,
    key_lengths: Tensor | None = None, key_mask: Tensor | None = None, dropout: Dropout | None = None,
    as_published: bool = False,
) -> Tensor:  # fmt: skip
    """dropout(softmax(scale Q K^T + mask)) V over one segment of keys or two; contract in kernels.api.attention.

    as_published: the original's mask [padding | causal] over keys [own | other], which lets a query see future
    positions; kept so that its effect can be measured, in this implementation only.
    """
    batch, queries, heads, _ = q.shape
    segments: list[tuple[Tensor, ...]] = [(k, v), second] if second else [(k, v)]
    lengths = [keys.shape[1] for keys, _ in segments]
    if sum(lengths) == 0 or batch == 0:
        return zeros_of((*q.shape[:3], v.shape[3]), q, k, v, *second)
    real = key_padding(batch, lengths[-1], key_lengths, key_mask, q.device)
    if not as_published:
        segments[-1] = tuple(without_padding(x, batch, real) for x in segments[-1])
    # of each segment whether a key may be seen, [B, 1, queries, keys]: causal the first, padding the last
    seen = [torch.ones(batch, 1, queries, n, dtype=torch.bool, device=q.device) for n in lengths]
    seen[-1] &= real[:, None, None]
    if causal:
        seen[0] &= causal_valid(queries, lengths[0], q.device)
    valid = torch.cat(seen[::-1] if as_published else seen, -1)
    keys, values = (torch.cat([_per_head(x, batch, heads) for x in part], 2) for part in zip(*segments, strict=True))
    scores = torch.einsum("bmhk,bhnk->bhmn", q, keys) * scale
    probabilities = masked_softmax(scores.to(at_least_float32(q.dtype)), valid)
    if dropout is not None and dropout.p > 0:
        starts = zip(lengths, (0, SEGMENT_COLUMNS), strict=False)
        keep = torch.cat([keep_mask(dropout, batch, heads, queries, n, offset=start) for n, start in starts], -1)
        probabilities = torch.where(keep, probabilities * keep_scale(dropout.p), 0.0)
    return torch.einsum("bhmn,bhnk->bmhk", probabilities.to(v.dtype), values)


def glu(
    x: Tensor, weight: Tensor, *, kind: str, activation: str = "relu", factor: float = 1.0,
    dropout: Dropout | None = None, gate_dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Hidden layer of a feedforward; contract in kernels.api.glu."""
    product = x @ weight.T
    if kind == "plain":
        hidden = activation_of(activation).formula(product)
    else:
        gate, up = product.chunk(2, dim=-1)
        if kind == "gated":
            hidden = activation_of(activation).formula(gate) * up
        else:
            hidden = (drop(torch.sigmoid(gate), gate_dropout) + torch.relu(up)) * factor
    return drop(hidden, dropout)


def rms_norm(y: Tensor, gain: Tensor, eps: float = 1e-6, features: int | None = None) -> Tensor:
    """y rsqrt(sum(y^2) / features + eps) gain (Zhang and Sennrich, 2019), statistics at least float32."""
    wide = y.to(at_least_float32(y.dtype))
    wide = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / (features or y.shape[-1]) + eps)
    return (wide * gain.to(wide.dtype)).to(y.dtype)


def residual_norm(
    x: Tensor | None, s: Tensor | None, gain: Tensor, *, dropout: Dropout | None = None, eps: float = 1e-6,
    features: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x + dropout(s), z = rms_norm(y) gain; contract in kernels.api.residual_norm."""
    if s is None:
        y = x
    else:
        dropped = drop(s, dropout)
        y = dropped if x is None else x + dropped
    assert y is not None
    return y, rms_norm(y, gain, eps, features)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, *, scale: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """(mean loss, loss of each token [...]) of logits (h scale) weight^T; contract in kernels.api."""
    logits = ((h * scale) @ weight.T).to(at_least_float32(h.dtype))
    unknown = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
    target = labels.masked_fill(labels == ignore_index, -1).masked_fill(unknown, 0)
    per_token = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=-1, reduction="none")
    # a factor, so that the gradients of an unknown label are NaN too
    per_token = per_token.view(labels.shape) * torch.ones_like(logits[..., 0]).masked_fill(unknown, torch.nan)
    count = (labels != ignore_index).sum().clamp(min=1)
    return per_token.sum() / count, per_token


def embedding(
    ids: Tensor, table: Tensor, positions: Tensor, *, combine: str = "average", dropout: Dropout | None = None,
    position_dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """dropout(E[ids]) and dropout(T[:L]), averaged or summed; contract in kernels.api.embedding."""
    unknown = ((ids < 0) | (ids >= table.shape[0]))[..., None]
    tokens = drop(table[ids.masked_fill(unknown[..., 0], 0)], dropout).masked_fill(unknown, torch.nan)
    places = drop(positions[: ids.shape[1]].expand(ids.shape[0], -1, -1), position_dropout)
    total = tokens + places
    return total / 2 if combine == "average" else total
