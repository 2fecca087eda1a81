"""Compiles fused kernels for a GPU that is not there, through the launch code a GPU run uses, and reads the result.

`recording` is the door: within it, fused operators called on meta tensors record and compile their launches. `reports`
judges the compiled programs by limits.py.
"""

from kernels.compile_only.front_end import front_end_only
from kernels.compile_only.record import ARCHITECTURES, Argument, Launch, architecture, launches, recording, watching
from kernels.compile_only.report import Report, report, reports, save, table

__all__ = [
    "ARCHITECTURES",
    "Argument",
    "Launch",
    "Report",
    "architecture",
    "front_end_only",
    "launches",
    "recording",
    "report",
    "reports",
    "save",
    "table",
    "watching",
]
