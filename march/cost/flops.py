"""FLOPs of the fused kernels' products, two for each multiply-add, from the shapes of a launch.

As torch counts its own attention: scores in full, whether or not a causal or padding mask lets a kernel skip blocks;
softmax, dropout and activations are not counted. Products that backward computes again count, they are executed.
"""

from collections.abc import Callable
from typing import Any

from kernels.compile_only.record import Argument, Launch


class Kernel:
    """A launch's arguments by name."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self.arguments: dict[str, Argument] = {argument.name: argument for argument in launch.arguments}

    def __getitem__(self, name: str) -> Any:
        if name in self.launch.constants:
            return self.launch.constants[name]
        return self.arguments[name].value

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.arguments[name].shape
        assert shape is not None, name
        return shape

    def bytes(self, name: str) -> int:
        return self.arguments[name].bytes

    def element_size(self, name: str) -> int:
        count = 1
        for n, stride in zip(self.shape(name), self.arguments[name].strides or (), strict=True):
            count *= n if stride else 1
        return self.bytes(name) // max(1, count)


def _scores(kernel: Kernel, query: str = "q_ptr") -> int:
    """Scores of a launch, [B, H, Lq, Lk] with all key segments."""
    batch, queries, heads, _ = kernel.shape(query)
    # dK, dV: of one segment; the others read a second one, or None
    keys = kernel["Lk"] + (("k2_ptr" in kernel.arguments and kernel["Lk2"]) or 0)
    return batch * heads * queries * keys


def _dkdv(kernel: Kernel) -> int:
    """Scores again; dV where wanted; dP again and dK where wanted."""
    width = kernel["K"]
    if kernel.arguments["dv_ptr"].is_tensor:
        width += kernel["KV"]
    if kernel.arguments["dk_ptr"].is_tensor:
        width += kernel["KV"] + kernel["K"]
    return 2 * _scores(kernel) * width


def _glu(kernel: Kernel) -> int:
    halves = 1 if kernel["KIND"] == "plain" else 2
    return 2 * kernel["M"] * kernel["F"] * halves * kernel["D"]


# kernel -> FLOPs; K, KV: widths of queries and values
FORMULAS: dict[str, Callable[[Kernel], int]] = {
    "_attention_fwd_kernel": lambda k: 2 * _scores(k) * (k["K"] + k["KV"]),
    # scores again, dP, dQ
    "_attention_bwd_dq_kernel": lambda k: 2 * _scores(k) * (2 * k["K"] + k["KV"]),
    "_attention_bwd_dkdv_kernel": _dkdv,
    "_glu_forward_kernel": _glu,
    "_glu_recompute_kernel": _glu,
    "_glu_dx_kernel": lambda k: 2 * k["M"] * k["F"] * k["D"],
    "_glu_dw_kernel": lambda k: 2 * k["M"] * k["F"] * k["D"],
    # logits again, the gradient
    "_linear_cross_entropy_gradient_kernel": lambda k: 4 * k["own_rows"] * k["other_rows"] * k["D"],
    "_linear_cross_entropy_fwd_kernel": lambda k: 2 * k["tokens"] * k["vocabulary"] * k["width"],
    "_linear_cross_entropy_dlogits_kernel": lambda k: 2 * k["tokens"] * k["columns"] * k["width"],
}


def launch_flops(launch: Launch) -> int:
    """FLOPs of a recorded launch; 0 of a kernel without products."""
    return FORMULAS[launch.kernel](Kernel(launch)) if launch.kernel in FORMULAS else 0
