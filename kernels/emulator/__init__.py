"""Executes the PTX that the fused kernels compile to, on CPU tensors and without a GPU, and checks every access.

It shows what Triton's interpreter cannot: bfloat16, the real tiles and layouts, asynchronous copies, barriers,
predicates, specialised arguments; with bounds, initialisation and race checks, and counts. It does not show what ptxas
does (spills, registers), the tensor core's own order of addition, the last bits of approximate functions, or time.
`active` is the door (kernels.emulator.session). From the text to the results: parse, instructions (the white list),
arithmetic, codegen, machine (lanes and control flow), memory (global) and shared (with its shadow), analysis.
"""

from kernels.emulator.machine import Counts, Finding
from kernels.emulator.parse import UnsupportedPtx
from kernels.emulator.session import EmulatedLaunch, EmulationError, Session, active, sample

__all__ = ["Counts", "EmulatedLaunch", "EmulationError", "Finding", "Session", "UnsupportedPtx", "active", "sample"]
