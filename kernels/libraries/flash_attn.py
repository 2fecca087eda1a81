"""attention by flash-attn 2 (Dao, 2023), where it applies.

It has no per-sequence key padding with a backward on padded layouts, no head widths above 256 or other than multiples
of 8, and its causal mask is aligned to the last key; such calls are refused by name. Its dropout is drawn from the
library's own generator: the masks are not those of kernels.dropout, and differ between micro-batches.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from kernels.dispatch import ImplementationError
from kernels.dropout import Dropout
from kernels.packed import unpacked

INSTALL = (
    "install it with `pip install flash-attn --no-build-isolation` (it compiles against the CUDA toolkit), or use "
    "impl='triton'"
)


def library() -> ModuleType:
    """The module `flash_attn`; ImplementationError where it is missing or something else."""
    try:
        module = importlib.import_module("flash_attn")
    except ImportError as error:
        raise ImplementationError(f"attention: impl='flash_attn' is not installed ({error}); {INSTALL}") from error
    if not hasattr(module, "flash_attn_func"):
        raise ImplementationError(
            f"attention: the module flash_attn at {getattr(module, '__file__', None)} has no flash_attn_func; {INSTALL}"
        )
    return module


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ImplementationError(
            f"attention: impl='flash_attn' needs {expected}, got {got}; use impl='triton' for this call"
        )


@unpacked
def attention(
    q: Tensor, k: Tensor, v: Tensor, *second: Tensor, scale: float, causal: bool, key_lengths: Tensor | None,
    key_mask: Tensor | None, dropout: Dropout | None,
) -> Tensor:  # fmt: skip
    """Contract in kernels.api.attention, except for the dropout's generator."""
    flash = library()
    _require(not second, "one segment of keys", "two")
    _require(q.dtype in (torch.float16, torch.bfloat16), "float16 or bfloat16", q.dtype)
    _require(key_lengths is None and key_mask is None, "keys without padding", "key_lengths or key_mask")
    _require(q.shape[3] == v.shape[3], "values as wide as keys", f"{q.shape[3]} and {v.shape[3]}")
    _require(q.shape[3] <= 256 and q.shape[3] % 8 == 0, "a head width that is a multiple of 8 up to 256", q.shape[3])
    _require(
        not causal or q.shape[1] == k.shape[1],
        "as many queries as keys where causal (its mask is aligned to the last key)",
        f"{q.shape[1]} and {k.shape[1]}",
    )
    if q.numel() == 0 or k.shape[1] == 0:
        return (q * 0) + (k.sum() + v.sum()) * 0
    k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
    p = dropout.p if dropout is not None else 0.0
    return flash.flash_attn_func(q, k, v, dropout_p=p, softmax_scale=scale, causal=causal)
