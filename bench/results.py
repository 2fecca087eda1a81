"""What a session measured, and what it did not with the reason: for the terminal and for the JSON file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass
class Results:
    """kernels: one row an operator call, implementation and direction; without: rows that have a reason in place of a
    time; left_out: what only --full runs."""

    kernels: list[Row] = field(default_factory=list)
    experiments: list[Row] = field(default_factory=list)
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


def duration(seconds: float | None) -> str:
    """Three digits with a unit."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded for a terminal, the first to the left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return [
        "  ".join(x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def kernel_table(results: Results) -> list[str]:
    """One line an implementation of a call: its directions side by side, rates of forward and backward together."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results.kernels:
        lines.setdefault((f"{row['operator']} {row['shape']}", row["implementation"]), {})[row["direction"]] = row
    cells = []
    for (call, name), by in lines.items():
        whole = by.get("both") or next(iter(by.values()))
        share = whole["share_of_peak"]
        cells.append(
            [
                call,
                name,
                *(duration(by[d]["median"] if d in by else None) for d in ("forward", "backward", "both")),
                f"{duration(whole['p20'])} .. {duration(whole['p80'])}",
                rate(whole["tflops"]),
                rate(whole["gbs"]),
                "-" if share is None else f"{share:.0%}",
                duration(whole["first_call"]),
                f"{whole['kept_bytes'] / 2**20:.1f}",
            ]
        )
    header = ["operator and shape", "by", "forward", "backward", "both", "20% .. 80%", "TFLOP/s", "GB/s"]
    return aligned([*header, "peak", "first call", "kept MiB"], cells) if cells else []


def experiment_table(results: Results) -> list[str]:
    cells = []
    for row in results.experiments:
        low, high = row["ratio_low"], row["ratio_high"]
        cells.append(
            [
                row["experiment"],
                row["implementation"],
                duration(row["median"]),
                f"{row['tokens_per_second']:.0f}",
                f"{row['ratio']:.2f} [{low:.2f} .. {high:.2f}]",
                f"{row['kept_bytes'] / 2**20:.0f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            ]
        )
    header = ["experiment", "by", "a step", "tokens/s", "times Baseline's time", "kept MiB", "peak MiB"]
    return aligned(header, cells) if cells else []
