"""Compiles fused kernels for a GPU that is not there, through the launch code a GPU run uses, and reads the result.

`recording` is the door: within it, fused operators called on meta tensors record and compile their launches. Section 5
of the specification is checked on the compiled programs by `report`.
"""

from kernels.compile_only.record import ARCHITECTURES, Argument, Launch, launches, recording

__all__ = ["ARCHITECTURES", "Argument", "Launch", "launches", "recording"]
