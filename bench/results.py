"""What a session measured, and what it did not with the reason: for the terminal and for the JSON file."""

from dataclasses import dataclass, field
from typing import Any

from bench.tables import duration, mebibytes, percent, rate

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
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results.kernels:
        lines.setdefault((f"{row['operator']} {row['shape']}", row["implementation"]), {})[row["direction"]] = row
    wholes = {key: by.get("both") or next(iter(by.values())) for key, by in lines.items()}
    return [
        {
            "operator and shape": call,
            "by": name,
            **{d: duration(by[d]["median"] if d in by else None) for d in ("forward", "backward", "both")},
            "20% .. 80%": f"{duration(whole['p20'])} .. {duration(whole['p80'])}",
            "TFLOP/s": rate(whole["tflops"]),
            "GB/s": rate(whole["gbs"]),
            "peak": percent(whole["share_of_peak"]),
            "first call": duration(whole["first_call"]),
            "kept MiB": mebibytes(whole["kept_bytes"], 1),
        }
        for ((call, name), by), whole in zip(lines.items(), wholes.values(), strict=True)
    ]


def experiment_table(results: Results) -> list[dict[str, str]]:
    return [
        {
            "experiment": row["experiment"],
            "by": row["implementation"],
            "per step": duration(row["median"]),
            "tokens/s": f"{row['tokens_per_second']:.0f}",
            "times Baseline's time": f"{row['ratio']:.2f} [{row['ratio_low']:.2f} .. {row['ratio_high']:.2f}]",
            "kept MiB": mebibytes(row["kept_bytes"]),
            "peak MiB": mebibytes(row["peak_bytes"]),
        }
        for row in results.experiments
    ]
