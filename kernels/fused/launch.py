"""The launch side of every fused kernel: which tensors reach it, with which strides, on which device.

`operator` registers a function that allocates its outputs and launches. Its kernels are told the strides of the
arguments named in `vectors` and `rows`; every other tensor arrives contiguous, whatever a caller or a
saved_tensors_hook handed in. `architecture` and `launches` come from the recorder, which stands in for a device.

Offsets within a sequence, or within a tile of a matrix's rows, are 32 bits; those of sequences and of tiles are 64.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.compile_only.record import architecture, launches
from kernels.dropout import Dropout
from kernels.packed import aligned_width

__all__ = [
    "alignment",
    "architecture",
    "check_supported",
    "differentiable",
    "drop_arguments",
    "filled",
    "in_vectors",
    "launches",
    "needs_backward",
    "operator",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT32 = 1 << 31
# no tile has more rows of a matrix
TILE_ROWS = 256


def check_supported(operator: str, *tensors: Tensor, max_width: int = INT32 // TILE_ROWS) -> None:
    """ValueError for what no fused kernel can do: another dtype, rows of more than `max_width` elements, 2^27 rows."""
    for x in tensors:
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{operator}: expected float16, bfloat16 or float32 for impl='triton', got {x.dtype}; "
                "use impl='torch' or 'reference'"
            )
        if x.shape[-1] > max_width:
            raise ValueError(
                f"{operator}: expected at most {max_width} features for impl='triton', got {x.shape[-1]}; "
                "use impl='torch'"
            )
        if math.prod(x.shape[:-1]) >= INT32 // 8:
            raise ValueError(
                f"{operator}: expected fewer than 2^28 rows for impl='triton', got {math.prod(x.shape[:-1])}; "
                "split the batch"
            )


def drop_arguments(dropout: Dropout | None) -> tuple[Tensor | None, float, int]:
    """(rng, p, site) as the operators take them."""
    return (None, 0.0, 0) if dropout is None else (dropout.rng, dropout.p, dropout.site)


def alignment(strides: Iterable[int]) -> int:
    """Largest power of two up to 16 that divides all strides, in elements: the kernels' ALIGN."""
    return math.gcd(16, *strides)


def in_rows(x: Tensor) -> Tensor:
    """`x`, copied only if the elements of a row (the last dimension) do not lie side by side, or if its rows lie so far
    apart that 32 bits do not hold an offset."""
    reach = sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))
    near = reach < INT32 and (x.dim() > 2 or x.stride(0) < INT32 // TILE_ROWS)
    if x.is_contiguous() or (near and x.stride(-1) == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def in_vectors(x: Tensor) -> Tensor:
    """`in_rows`, copied also if rows start elsewhere than at multiples of 16 bytes.

    Read 2, 4 or 8 bytes at a time, rows take as many more instructions and pointers, and the kernels with products
    spill for lack of the registers (attention's dQ at K 49: 161; glu at D 365: 24; cross entropy at D 942: 14).
    """
    starts = [x.storage_offset(), *(s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)]
    if all(start * x.element_size() % 16 == 0 for start in starts):
        return in_rows(x)
    return x.clone(memory_format=torch.contiguous_format)


def filled(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros in further columns, up to `aligned_width`, where rows of their width could never be read
    16 bytes at a time; the zeros add nothing to a product. Differentiable, and a function of the last dimension alone:
    torch.compile sees no guard. A model that fills up its weights needs none (`kernels.head_width`, `row_width`)."""
    missing = [aligned_width(x.shape[-1], x.element_size()) - x.shape[-1] for x in tensors]
    return tuple(pad(x, (0, n)) if n else x for x, n in zip(tensors, missing, strict=True))


def needs_backward(*inputs: Tensor | None) -> bool:
    """Whether autograd records this call."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def differentiable(function: Any, recorded: bool, *arguments: Any) -> Any:
    """The autograd function, or its forward alone where nothing is recorded: torch.func.functionalize has no rule for
    autograd functions."""
    return function.apply(*arguments) if recorded else function.forward(*arguments)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one, on which Triton launches; elsewhere than on CUDA there is one alone."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _flat(arguments: Sequence[Any]) -> list[Tensor]:
    return [x for one in arguments for x in (one if isinstance(one, list) else (one,)) if isinstance(x, Tensor)]


def require_memory(name: str, *tensors: Tensor) -> None:
    """TypeError for a subclass or a transform's wrapper that only stands for other tensors."""
    for x in tensors:
        keys = torch._C._dispatch_keys(x)
        if any(keys.has(getattr(torch._C.DispatchKey, key)) for key in ("Python", "FuncTorchBatched", "Functionalize")):
            raise TypeError(f"{name}: expected tensors with memory, got {type(x).__name__}; unwrap it first")


def operator(name: str, *, vectors: Sequence[str] = (), rows: Sequence[str] = ()) -> Callable[[Callable], Any]:
    """Registers the decorated function as torch operator `name`, and as its own fake: where shapes alone are traced,
    `launches` keeps it from launching, so that outputs and fake outputs cannot disagree.

    vectors, rows: arguments that reach it as `in_vectors` or `in_rows` gives them; all other tensors are contiguous.
    Raises TypeError for tensors without memory of their own, where it launches.
    """

    def register(function: Callable) -> Any:
        lay_out = [
            in_vectors if n in vectors else in_rows if n in rows else Tensor.contiguous
            for n in inspect.signature(function).parameters
        ]

        def placed(lay: Callable, argument: Any) -> Any:
            if isinstance(argument, list):
                return [lay(x) for x in argument]
            return lay(argument) if isinstance(argument, Tensor) else argument

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            tensors = _flat(arguments)
            if not launches(tensors[0]):
                return function(*arguments)
            require_memory(name, *tensors)
            with on_device(tensors[0]):
                return function(*(placed(lay, x) for lay, x in zip(lay_out, arguments, strict=True)))

        registered = torch.library.custom_op(name, run, mutates_args=())
        registered.register_fake(run)
        return registered

    return register
