"""The two ways a run ends badly that a user can do something about; both print one line and no traceback.

`report` says whether this process prints it; None: rank 0 does, because every rank raised the same.
"""

from march.console import UsageError

__all__ = ["RunError", "UsageError"]


class RunError(RuntimeError):
    """The run had to stop (non-finite loss, full disk, memory): what, where, what to do. Exit code 1."""

    report: bool | None = None
