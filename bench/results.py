"""What a session measured, and what it did not with the reason: for the terminal and for the JSON file."""

from dataclasses import dataclass, field
from typing import Any

from bench.kernel_calls import DIRECTIONS
from bench.tables import table

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


def kernel_table(results: Results) -> list[dict[str, str]]:
    """One line an implementation of a call: its directions side by side, rates of forward and backward together."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in results.kernels:
        line = lines.setdefault((f"{row['operator']} {row['shape']}", row["implementation"]), dict.fromkeys(DIRECTIONS))
        line[row["direction"]] = row["median"]
        if "operator" not in line or row["direction"] == "both":
            line |= row
    return table(
        "operator and shape | by | forward | backward | both | 20% .. 80% | TFLOP/s | GB/s | peak | first call | "
        "kept MiB",
        "{operator} {shape} | {implementation} | {forward:time} | {backward:time} | {both:time} | "
        "{p20:time} .. {p80:time} | {tflops:.3g} | {gbs:.3g} | {share_of_peak:.0%} | "
        "{first_call:time} | {kept_bytes:.1MiB}",
        lines.values(),
    )


def experiment_table(results: Results) -> list[dict[str, str]]:
    return table(
        "experiment | by | per step | tokens/s | times Baseline's time | kept MiB | peak MiB",
        "{experiment} | {implementation} | {median:time} | {tokens_per_second:.0f} | "
        "{ratio:.2f} [{ratio_low:.2f} .. {ratio_high:.2f}] | {kept_bytes:.0MiB} | {peak_bytes:.0MiB}",
        results.experiments,
    )
