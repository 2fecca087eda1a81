"""FLOPs of the fused kernels' products, two for each multiply-add, from the shapes of a launch.

As torch counts its own attention: scores in full, whether or not a causal or padding mask lets a kernel skip blocks;
softmax, dropout and activations are not counted. Products that backward computes again count, they are executed.
"""

from collections.abc import Callable
from typing import Any

from kernels.compile_only.record import Argument, Launch
from kernels.operators import OPERATORS


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


# kernel -> FLOPs, from the operators' records
FORMULAS: dict[str, Callable[[Kernel], int]] = {
    name: kernel.flops for record in OPERATORS.values() for name, kernel in record.kernels.items() if kernel.flops
}


def launch_flops(launch: Launch) -> int:
    """FLOPs of a recorded launch; 0 of a kernel without products."""
    return FORMULAS[launch.kernel](Kernel(launch)) if launch.kernel in FORMULAS else 0
