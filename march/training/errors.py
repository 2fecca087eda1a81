"""The two ways a run ends badly that a user can do something about; both print one line and no traceback.

`report` says whether this process prints it; None: rank 0 does, because every rank raised the same.
"""

from march.console import UsageError

__all__ = ["RunError", "UsageError"]


class RunError(RuntimeError):
    """The run had to stop (non-finite loss, full disk, memory): what, where, what to do. Exit code 1."""

    report: bool | None = None


class NonFiniteError(RunError):
    """A loss or gradient that is not finite. facts: failed_step, and the indices of its training sequences."""

    facts: dict[str, object] = {}  # noqa: RUF012 replaced, never changed
