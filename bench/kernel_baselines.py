"""Everything that computes an operator and may be timed: our implementations, and libraries as baselines.

An implementation is a function with the operator's arguments. A baseline that is not installed, or does not do what a
call asks, says why by ImplementationError; that text stands in the table in place of a time. Baselines draw dropout
from their own generators, so they are compared with the formula without dropout, and timed with it.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.activations import activation_of
from kernels.dispatch import ImplementationError, choice
from kernels.dropout import Dropout

Function = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """name: in the tables. load: returns the function, ImplementationError where it is not here. ours: a wrong one
    fails the run. contract_dropout: its masks are the contract's. slow: compiles for seconds, so only with --full.
    note: of its rows."""

    name: str
    load: Callable[[], Function]
    ours: bool = False
    contract_dropout: bool = False
    slow: bool = False
    note: str = ""


def _installed(module: str, install: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImplementationError(f"not installed; {install}")


def _needs(condition: bool, what: str) -> None:
    if not condition:
        raise ImplementationError(what)


# ---------------------------------------------------------------- ours


def _ours(operator: str, name: str) -> Implementation:
    def load() -> Function:
        if name == "triton" and not torch.cuda.is_available():
            raise ImplementationError(
                "no CUDA device here; in Triton's interpreter it runs, but at a speed that says nothing of the kernel"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        choice(operator, name, device)
        return functools.partial(getattr(kernels, operator), impl=name)

    # on CUDA the portable path leaves attention's dropout to the library's generator
    library = name == "torch" and torch.cuda.is_available() and "attention" in operator
    return Implementation(name, load, ours=True, contract_dropout=not library)


def _library(operator: str, name: str) -> Implementation:
    def load() -> Function:
        module = importlib.import_module(f"kernels.libraries.{name}")
        module.library()
        _needs(torch.cuda.is_available(), "needs a CUDA device")
        return functools.partial(getattr(kernels, operator), impl={operator: name})

    return Implementation(name, load)


# ---------------------------------------------------------------- plain PyTorch: eager, and compiled


def _p(dropout: Dropout | None) -> float:
    return 0.0 if dropout is None else dropout.p


def _heads_first(*tensors: Tensor, batch: int, heads: int) -> list[Tensor]:
    """[B or 1, L, H or 1, K] as [B, H, L, K]."""
    return [x.expand(batch, -1, -1, -1).transpose(1, 2).expand(-1, heads, -1, -1) for x in tensors]


def _later(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


def _joined(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, both segments' keys and values as one, heads first, and the mask of what is seen, None for all."""
    seen = ~_later(q.shape[1], k.shape[1], q.device) if causal else None
    if k2 is not None and v2 is not None:
        assert seen is not None
        k, v = torch.cat([k, k2], 1), torch.cat([v, v2], 1)
        seen = torch.cat([seen, seen.new_ones(q.shape[1], k2.shape[1])], 1)
    return *_heads_first(q, k, v, batch=q.shape[0], heads=q.shape[2]), seen  # type: ignore[return-value]


def eager_attention(q, k, v, k2=None, v2=None, *, scale=1.0, causal=False, dropout=None):
    q, k, v, seen = _joined(q, k, v, k2, v2, causal)
    scores = q @ k.transpose(-1, -2) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return (F.dropout(torch.softmax(scores, -1), _p(dropout)) @ v).transpose(1, 2)


def eager_glu(x, weight, *, kind="gated", activation="relu", factor=1.0, dropout=None, gate_dropout=None):
    product = F.linear(x, weight)
    if kind == "plain":
        return F.dropout(activation_of(activation).formula(product), _p(dropout))
    gate, up = product.chunk(2, -1)
    if kind == "gated":
        return F.dropout(activation_of(activation).formula(gate) * up, _p(dropout))
    return F.dropout((F.dropout(torch.sigmoid(gate), _p(gate_dropout)) + torch.relu(up)) * factor, _p(dropout))


def _stream(x: Tensor | None, s: Tensor | None, dropout: Dropout | None) -> Tensor:
    if s is None:
        assert x is not None
        return x
    dropped = F.dropout(s, _p(dropout))
    return dropped if x is None else x + dropped


def eager_residual_norm(x, s, gain, *, dropout=None, eps=1e-6):
    y = _stream(x, s, dropout)
    # statistics in float32, as Hugging Face's T5 has them: in bfloat16 the check refuses it
    return y, gain * (y * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + eps)).to(gain.dtype)


def eager_linear_cross_entropy(h, weight, labels, *, scale=1.0):
    return F.cross_entropy(F.linear(h * scale, weight).flatten(0, 1).float(), labels.flatten())


def eager_embedding(ids, table, positions, *, combine="average", dropout=None, position_dropout=None):
    places = positions[: ids.shape[1]].expand(*ids.shape, -1)
    total = F.dropout(F.embedding(ids, table), _p(dropout)) + F.dropout(places, _p(position_dropout))
    return total / 2 if combine == "average" else total


EAGER: dict[str, Function] = {
    "attention": eager_attention,
    "glu": eager_glu,
    "residual_norm": eager_residual_norm,
    "linear_cross_entropy": eager_linear_cross_entropy,
    "embedding": eager_embedding,
}


def _keep_buffers() -> None:
    """The timed backward runs several times over one graph."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False


def _compiled(operator: str) -> Implementation:
    def load() -> Function:
        _keep_buffers()
        return torch.compile(EAGER[operator], dynamic=False)

    note = "dropout of compiled code is suspect in torch 2.13 (pytorch#198333): repeated masks"
    return Implementation("torch.compile", load, slow=True, note=note)


# ---------------------------------------------------------------- libraries


def _backend(name: str, function: Function) -> Callable[[], Function]:
    def load() -> Function:
        cuda = torch.cuda.is_available()
        _needs(cuda or name != "FLASH_ATTENTION", "torch's flash attention takes no dropout on a CPU")
        _needs(cuda or name in ("FLASH_ATTENTION", "MATH"), "needs a CUDA device")
        return function

    return load


def _sdpa(backend: str) -> Implementation:
    def attention(q, k, v, k2=None, v2=None, *, scale=1.0, causal=False, dropout=None):
        two = k2 is not None
        _needs(not two or backend in ("EFFICIENT_ATTENTION", "MATH"), "two segments want a mask that it does not take")
        q, k, v, seen = _joined(q, k, v, k2, v2, causal and two)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, dropout_p=_p(dropout), is_causal=causal and not two, scale=scale
            )
        return out.transpose(1, 2)

    return Implementation(f"SDPA {backend.lower().removesuffix('_attention')}", _backend(backend, attention))


def _flex() -> Implementation:
    def load() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)

        @functools.cache
        def mask(queries: int, keys: int, device: torch.device):
            return create_block_mask(lambda b, h, i, j: i >= j, None, None, queries, keys, device=device)

        def attention(q, k, v, k2=None, v2=None, *, scale=1.0, causal=False, dropout=None):
            _needs(k2 is None, "written here for one segment of keys")
            q, k, v = _heads_first(q, k, v, batch=q.shape[0], heads=q.shape[2])
            seen = mask(q.shape[2], k.shape[2], q.device) if causal else None
            return compiled(q, k, v, scale=scale, block_mask=seen).transpose(1, 2)

        _keep_buffers()
        return attention

    return Implementation("FlexAttention", load, slow=True, note="it has no dropout: timed without")


def _rms_norm() -> Implementation:
    def residual_norm(x, s, gain, *, dropout=None, eps=1e-6):
        y = _stream(x, s, dropout)
        return y, F.rms_norm(y, gain.shape, gain, eps)

    return Implementation("F.rms_norm", lambda: residual_norm)


def _linear_cross_entropy() -> Implementation:
    def load() -> Function:
        _needs(hasattr(F, "linear_cross_entropy"), f"torch {torch.__version__} has none; 2.13 does")

        def linear_cross_entropy(h, weight, labels, *, scale=1.0):
            return F.linear_cross_entropy((h * scale).flatten(0, 1), weight, labels.flatten())

        return linear_cross_entropy

    return Implementation("F.linear_cross_entropy", load)


def _liger(operator: str) -> Implementation:
    def load() -> Function:
        _installed("liger_kernel", "pip install liger-kernel")
        _needs(torch.cuda.is_available(), "its Triton kernels need a CUDA device")
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def glu(x, weight, *, kind="gated", activation="relu", factor=1.0, dropout=None, gate_dropout=None):
            own = {"silu": LigerSiLUMulFunction, "gelu": LigerGELUMulFunction}
            _needs(kind == "gated" and activation in own, f"has gated silu and gelu, not {kind} {activation}")
            gate, up = F.linear(x, weight).chunk(2, -1)
            return F.dropout(own[activation].apply(gate.contiguous(), up.contiguous()), _p(dropout))

        def residual_norm(x, s, gain, *, dropout=None, eps=1e-6):
            y = _stream(x, s, dropout)
            # not in place: y is an output too
            return y, LigerRMSNormFunction.apply(y, gain, eps, 0.0, "llama", False)

        def linear_cross_entropy(h, weight, labels, *, scale=1.0):
            found = LigerFusedLinearCrossEntropyFunction.apply((h * scale).flatten(0, 1), weight, labels.flatten())
            return found[0] if isinstance(found, tuple) else found

        return {"glu": glu, "residual_norm": residual_norm, "linear_cross_entropy": linear_cross_entropy}[operator]

    return Implementation("Liger-Kernel", load)


BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def implementations(operator: str) -> list[Implementation]:
    """All that may be timed for `operator`, ours first."""
    found = [_ours(operator, name) for name in ("triton", "torch", "reference")]
    found.append(Implementation("eager PyTorch", lambda: EAGER[operator]))
    found.append(_compiled(operator))
    if operator == "attention":
        found += [_library(operator, "flash_attn"), *(_sdpa(backend) for backend in BACKENDS), _flex()]
    elif operator == "residual_norm":
        found += [_library(operator, "apex"), _rms_norm(), _liger(operator)]
    elif operator == "linear_cross_entropy":
        found += [_linear_cross_entropy(), _liger(operator)]
    elif operator == "glu":
        found.append(_liger(operator))
    return found
