"""Matrix products on a CPU: which library and which type, chosen by one measurement each and kept for the process.

Two choices, both made at first use in 0.1 s. The library of float32 products: torch's own, or oneDNN, which
is twice as fast where torch's BLAS leaves half of the vector unit idle. The type of a float32 model's products when
its configuration asks for bf16: bfloat16 where the processor multiplies it faster, else float32.
"""

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.validation import once_differentiable

_log = logging.getLogger("kernels")

# A choice must gain this much: closer calls could fall differently from run to run, and with them the numbers.
CLEAR_GAIN = 1.2
# tokens, features in, features out of the measured product: a feedforward's, 3 to 6 ms in one thread
MEASURED = (512, 512, 1024)


def _ratio(slow: Callable[[], Any], fast: Callable[[], Any], repetitions: int = 7) -> float:
    """CPU time of `slow` over that of `fast`: best of interleaved repetitions in one thread.

    One thread and its own clock, because wall time with all threads said 0.6 instead of 3.8 on a busy machine.
    """
    threads = torch.get_num_threads()
    best = [float("inf"), float("inf")]
    try:
        torch.set_num_threads(1)
        for repetition in range(repetitions):
            for i, function in enumerate((slow, fast)):
                start = time.thread_time()
                function()
                if repetition:  # the first is the warm-up
                    best[i] = min(best[i], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best[0] / best[1]


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by oneDNN; x [T, D], weight [F, D] of any strides, float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tokens, inputs, outputs = MEASURED
    return torch.ones(tokens, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)


_fixed: dict[str, bool] = {}


def fix_float32_library(name: str | None = None) -> str:
    """Have every float32 product of this process go through "oneDNN" or "torch", where oneDNN is there; None: through
    what is measured faster. Returns the one that is used.

    The two differ in the last bits: a run that is continued, and all processes of one, take the same.
    """
    if name is not None:
        _fixed["onednn"] = name == "oneDNN" and _has_onednn()
    return "oneDNN" if onednn_float32() else "torch"


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_float32() -> bool:
    """True where float32 products go through oneDNN: as fixed, else as measured."""
    return _fixed["onednn"] if _fixed else _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    """True where oneDNN's float32 products are clearly faster than torch's own; measured once."""
    if not _has_onednn():
        return False
    with torch.no_grad():
        x, weight = _operands(torch.float32)
        return _ratio(lambda: F.linear(x, weight), lambda: _onednn(x, weight)) > CLEAR_GAIN


@cache
def _gain_of_bfloat16() -> float:
    """How many times faster bfloat16 products are than the best float32 ones; measured once."""
    with torch.no_grad():
        x, weight = _operands(torch.float32)
        x16, weight16 = _operands(torch.bfloat16)
        return _ratio(lambda: _float32_linear(x, weight), lambda: F.linear(x16, weight16))


@cache
def product_dtype(device_type: str = "cpu") -> torch.dtype:
    """The type in which a float32 model trains fastest on this device, bfloat16 or float32; measured once, and said.

    Elsewhere than on a CPU: float32, the parameters' own type; there the precision is the trainer's to choose.
    """
    if device_type != "cpu":
        return torch.float32
    faster = _gain_of_bfloat16() > CLEAR_GAIN
    _log.warning(describe_products())
    return torch.bfloat16 if faster else torch.float32


def describe_products() -> str:
    """What was chosen and why, for a run's first line; measures at first use."""
    gain, library = _gain_of_bfloat16(), "oneDNN" if onednn_float32() else "torch's BLAS"
    chosen = "bfloat16" if gain > CLEAR_GAIN else "float32"
    return (
        f"CPU products of a bf16 configuration run in {chosen}: bfloat16 measured {gain:.1f} times as fast as float32 "
        f"(which runs through {library}); precision=fp32 keeps float32 throughout"
    )


def _float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    return _onednn(x, weight) if onednn_float32() else F.linear(x, weight)


def _through_onednn(*tensors: Tensor) -> bool:
    """Real float32 CPU tensors; what a compiler traces or meta tensors count stays with torch's own operators."""
    return (
        all(
            x.dtype == torch.float32 and x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
            for x in tensors
        )
        and not torch.compiler.is_compiling()
        and onednn_float32()
    )


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N]."""
    return _onednn(a, b.T) if _through_onednn(a, b) else a @ b


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [R, M, K] @ b [R, K, N]."""
    if not _through_onednn(a, b):
        return torch.bmm(a, b)
    # one product a head: 0.6 ms at 921 x 921 x 64 where torch.bmm takes 1.26 (one thread)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for i in range(a.shape[0]):
        out[i] = _onednn(a[i], b[i].T)
    return out


class _Linear(torch.autograd.Function):
    """x W^T of x [T, D], through oneDNN in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = matmul(d_out, weight) if ctx.needs_input_grad[0] else None
        dw = matmul(d_out.T, x) if ctx.needs_input_grad[1] else None
        return dx, dw


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; contract in kernels.api.linear."""
    if x.numel() and _through_onednn(x, weight):
        return _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return F.linear(x, weight)
