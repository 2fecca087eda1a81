"""What a session did not measure, with the reason: for the terminal and for the JSON file."""

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass
class Results:
    """without: rows that have a reason in place of a time; left_out: what only --full runs."""

    without: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def absent(self, reason: str, **what: str) -> None:
        """Notes that `what` has no time, once."""
        # the seam's errors begin with the operator, which the row names already
        row = {**what, "reason": " ".join(reason.split()).removeprefix(f"{what.get('operator')}: ")}
        if row not in self.without:
            self.without.append(row)

    def to_dict(self) -> dict[str, Any]:
        return {"without": self.without, "left_out": self.left_out}
