"""Attention in chunks of heads that stay in the last-level cache; SDPA of the library on CUDA.

On a CPU the library's fused attention does not take dropout, and without dropout it is slower than this. Forward of 32
heads of 921 x 921 x 64 in bfloat16, one core of an EPYC with AVX-512: 83 ms, 491 with dropout; these chunks 38 and 54.
"""

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import Dropout, SiteKeys, keep_words, mask_, pack_keys, site_keys, unpack_keys
from kernels.packed import unpacked
from kernels.portable.products import bmm, matmul
from kernels.reference import causal_valid, key_padding, without_padding, zeros_of
from kernels.validation import once_differentiable

_log = logging.getLogger("kernels")

# Scores of one chunk: two heads of 921 x 921, one for each core. The passes over them run at the same speed from 0.1 to
# 2 million scores (they live in the second- or third-level cache) and at a third of it from memory.
CHUNK_SCORES = 1 << 21
# Added to scores of keys that are not seen. Finite, so that a row that sees none has no NaN in it.
UNSEEN = -1e30


def _eager_cpu(x: Tensor) -> bool:
    """True where a host may look at values: a real CPU tensor, nothing traced."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


class _Mask:
    """Which keys a query sees: a bias, and which rows see any.

    valid: bool [B or 1, M or 1, N]. Row r of the chunks belongs to sequence r // heads.
    """

    def __init__(self, valid: Tensor, heads: int, dtype: torch.dtype):
        self.heads = heads
        # float16 ends at 65504; half of it, so that a low score added to it is still finite
        limit = max(UNSEEN, torch.finfo(dtype).min / 2)
        self.bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, limit)
        alive = valid.any(-1, keepdim=True)
        self.alive: Tensor | None = alive.to(dtype)
        if _eager_cpu(alive) and bool(alive.all()):
            self.alive = None

    def _of(self, x: Tensor, chunk: slice) -> Tensor:
        if x.shape[0] == 1:
            return x
        return x[torch.arange(chunk.start, chunk.stop, device=x.device) // self.heads]

    def probabilities(self, scores: Tensor, chunk: slice) -> Tensor:
        """softmax of scores [rows of the chunk, M, N], in place."""
        p = _softmax_(scores.add_(self._of(self.bias, chunk)))
        return p if self.alive is None else p.mul_(self._of(self.alive, chunk))


def _softmax_(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, out=scores)


def _chunks(rows: int, size: int) -> list[slice]:
    step = max(1, CHUNK_SCORES // max(1, size))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of a [n, M, K] and b [n or 1, N, K]. A bank shared by all rows is one product, no copy for each row."""
    if b.shape[0] == a.shape[0]:
        return bmm(a, b.transpose(1, 2))
    return matmul(a.flatten(0, 1), b[0].T).unflatten(0, a.shape[:2])


def _mixed(p: Tensor, b: Tensor) -> Tensor:
    """p b of p [n, M, N] and b [n or 1, N, K]."""
    if b.shape[0] == p.shape[0]:
        return bmm(p, b)
    return matmul(p.flatten(0, 1), b[0]).unflatten(0, p.shape[:2])


def _collect(total: Tensor, p: Tensor, a: Tensor, chunk: slice) -> None:
    """p^T a of p [n, M, N] and a [n, M, K] into the chunk's rows of total [R, N, K], or added to total [1, N, K]."""
    if total.shape[0] > 1:
        total[chunk] = bmm(p.transpose(1, 2), a)
    else:
        total[0] += matmul(p.flatten(0, 1).T, a.flatten(0, 1))


def _of(x: Tensor, chunk: slice) -> slice:
    return chunk if x.shape[0] > 1 else slice(0, 1)


class _Attention(torch.autograd.Function):
    """softmax attention over q [R, M, K], k [R or 1, N, K], v [R or 1, N, Kv], R = batch * heads rows, in chunks.

    Saves its inputs and the dropout keys; backward recomputes the probabilities of a chunk (Dao et al., 2022).
    1 / keep probability is applied to the output and to its gradient, which are 14 times smaller than the scores.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: _Mask | None, keys: SiteKeys | None
    ) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for chunk in _chunks(q.shape[0], q.shape[1] * k.shape[1]):
            p = _probabilities(q, k, scale, mask, chunk)
            if keys is not None:
                mask_(p, _words(keys, chunk))
            out[chunk] = _mixed(p, v[_of(v, chunk)])
        if keys is not None:
            out *= keys.scale
        ctx.save_for_backward(q, k, v, *pack_keys(keys))
        ctx.scale, ctx.mask, ctx.p = scale, mask, None if keys is None else keys.p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor):  # type: ignore[override]
        q, k, v, *drawn = ctx.saved_tensors
        (keys,) = unpack_keys(drawn, ctx.p)
        dq = torch.empty_like(q)
        # a bank shared by all rows: its gradient is summed over chunks
        dk, dv = (torch.empty_like(x) if x.shape[0] > 1 else torch.zeros_like(x) for x in (k, v))
        scaled = d_out.new_empty(d_out.shape)
        torch.mul(d_out, 1.0 if keys is None else keys.scale, out=scaled)
        for chunk in _chunks(q.shape[0], q.shape[1] * k.shape[1]):
            p = _probabilities(q, k, ctx.scale, ctx.mask, chunk)
            dp = _scores(scaled[chunk], v[_of(v, chunk)])
            dropped = p
            if keys is not None:
                dropped = p.clone()
                words = _words(keys, chunk)
                words = words.to(torch.int16) if p.element_size() == 2 else words
                mask_(dropped, words)
                mask_(dp, words)
            _collect(dv, dropped, scaled[chunk], chunk)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            if ctx.scale != 1.0:
                ds.mul_(ctx.scale)
            dq[chunk] = _mixed(ds, k[_of(k, chunk)])
            _collect(dk, ds, q[chunk], chunk)
        return dq, dk, dv, None, None, None


def _words(keys: SiteKeys, chunk: slice) -> Tensor:
    return keep_words(keys.a[chunk], keys.b[chunk], keys.c, keys.p)


def _probabilities(q: Tensor, k: Tensor, scale: float, mask: _Mask | None, chunk: slice) -> Tensor:
    scores = _scores(q[chunk], k[_of(k, chunk)])
    if scale != 1.0:
        scores.mul_(scale)
    return _softmax_(scores) if mask is None else mask.probabilities(scores, chunk)


def _rows(x: Tensor, batch: int, heads: int, shared: bool = True) -> Tensor:
    """[B or 1, L, G, K] as [batch * heads, L, K]; shared: one row [1, L, K] of keys or values that all heads share."""
    if shared and x.shape[0] == 1 and x.shape[2] == 1:
        return x[:, :, 0]
    x = _grouped(x, batch, heads).transpose(1, 2)
    return x.reshape(batch * heads, x.shape[2], x.shape[3])


def _grouped(x: Tensor, batch: int, heads: int) -> Tensor:
    """[B or 1, L, G, K] as [batch, L, heads, K]."""
    x = x.expand(batch, -1, -1, -1)
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


@unpacked
def attention(
    q: Tensor, k: Tensor, v: Tensor, *second: Tensor, scale: float, causal: bool, key_lengths: Tensor | None,
    key_mask: Tensor | None, dropout: Dropout | None,
) -> Tensor:  # fmt: skip
    """Contract in kernels.api.attention."""
    batch, queries, heads, _ = q.shape
    segments: list[tuple[Tensor, ...]] = [(k, v), second] if second else [(k, v)]
    lengths = tuple(keys.shape[1] for keys, _ in segments)
    if sum(lengths) == 0 or queries == 0 or batch == 0:
        return zeros_of((*q.shape[:3], v.shape[3]), q, k, v, *second)
    padding = None
    if key_lengths is not None or key_mask is not None:
        padding = key_padding(batch, lengths[-1], key_lengths, key_mask, q.device)
        # a batch without padding, as packed text has, needs no mask
        if _eager_cpu(padding) and bool(padding.all()):
            padding = None
        else:
            segments[-1] = tuple(without_padding(x, batch, padding) for x in segments[-1])
    cuda, valid = q.device.type == "cuda", None
    if second or (not cuda and (causal or padding is not None)):
        sequences, rows = (1 if padding is None else batch), (queries if causal or second else 1)
        seen = [torch.ones(sequences, rows, n, dtype=torch.bool, device=q.device) for n in lengths]
        if padding is not None:
            seen[-1] &= padding[:, None]
        if causal:
            seen[0] &= causal_valid(queries, lengths[0], q.device)
        valid = torch.cat(seen, -1)
    parts = list(zip(*segments, strict=True))
    if cuda and second:
        k, v = (torch.cat([_grouped(x, batch, heads) for x in part], 1) for part in parts)
        return _library(q, k, v, scale, False, None, valid, dropout)
    if cuda:
        return _library(q, *segments[0], scale, causal, padding, None, dropout)
    if second:
        k, v = (torch.cat([_rows(x, batch, heads, shared=False) for x in part], 1) for part in parts)
    else:
        k, v = (_rows(x, batch, heads) for x in segments[0])
    mask = None if valid is None else _Mask(valid, heads, q.dtype)
    keys = None if dropout is None else site_keys(dropout, batch, heads, queries, lengths)
    out = _Attention.apply(_rows(q, batch, heads), k, v, scale, mask, keys)
    return out.view(batch, heads, queries, -1).transpose(1, 2)


@cache
def _say_library_dropout() -> None:
    _log.warning(
        "impl='torch' on CUDA: attention dropout is drawn from torch's generator, not by the dropout contract "
        "(the other sites keep it); impl='triton' or 'reference' keeps the contract everywhere"
    )


def _library(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, padding: Tensor | None, valid: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention. padding: bool [B, N] of real keys; valid: bool [B or 1, M, N], instead of both.

    No [L, L] tensor without `valid`, which two segments and padding under a causal mask need: one without heads.
    """
    if dropout is not None:
        _say_library_dropout()
    batch, queries, heads, _ = q.shape
    if causal and padding is not None:
        valid, causal = causal_valid(queries, k.shape[1], q.device) & padding[:, None], False
    elif padding is not None:
        valid = padding[:, None]
    alive = None
    if valid is not None:
        # a row that sees no key would be NaN in some backends: it sees all of them, and its output is cut
        alive = valid.any(-1, keepdim=True)[:, :, None]
        valid = (valid | ~valid.any(-1, keepdim=True))[:, None]
    elif causal and queries != k.shape[1]:
        valid, causal = causal_valid(queries, k.shape[1], q.device)[None, None], False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.expand(batch, -1, -1, -1).transpose(1, 2),
        v.expand(batch, -1, -1, -1).transpose(1, 2),
        attn_mask=valid,
        dropout_p=0.0 if dropout is None else dropout.p,
        is_causal=causal,
        scale=scale,
        enable_gqa=k.shape[2] != heads,
    ).transpose(1, 2)
    return out if alive is None else torch.where(alive, out, 0.0)
