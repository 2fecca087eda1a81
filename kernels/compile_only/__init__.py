"""Compiles fused kernels for a GPU that is not there, through the launch code a GPU run uses, and reads the result.

`recording` is the door: within it, fused operators called on meta tensors record and compile their launches. The
limits of `limits.py` are checked on the compiled programs by `reports`.
"""

from kernels.compile_only.record import ARCHITECTURES, Argument, Launch, architecture, launches, recording
from kernels.compile_only.report import Report, report, reports, save, table

__all__ = [
    "ARCHITECTURES",
    "Argument",
    "Launch",
    "Report",
    "architecture",
    "launches",
    "recording",
    "report",
    "reports",
    "save",
    "table",
]
