"""Two benchmark files beside each other, with a threshold that fails."""

from dataclasses import dataclass
from typing import Any

from bench.report.load import Benchmark, ReportError
from bench.results import aligned, duration


@dataclass(frozen=True)
class Difference:
    name: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """Share by which it became slower; negative: faster."""
        return self.after / self.before - 1


def threshold(text: str) -> float:
    """A share from "5%" or "0.05"; ValueError otherwise."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if value < 0:
        raise ValueError(text)
    return value


def _conditions(one: Benchmark) -> dict[str, Any]:
    """What must be equal for two times to be of one thing."""
    info = {"kind": one.kind, "device": one.device, "threads": one.facts.get("threads"), "sizes": one.run.get("sizes")}
    return info | {
        f"{name} version": v for name, v in one.facts.get("versions", {}).items() if name in ("torch", "triton")
    }


def differing_conditions(a: Benchmark, b: Benchmark) -> list[str]:
    """In which conditions the two files differ, as text."""
    first, second = _conditions(a), _conditions(b)
    return [
        f"{name}: {first.get(name)} and {second.get(name)}"
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name)
    ]


def differences(a: Benchmark, b: Benchmark) -> list[Difference]:
    """Medians of the benchmarks that both files have, by name; ReportError where there are none."""
    before = {row["fullname"]: row["stats"]["median"] for row in a.rows}
    found = [
        Difference(row["fullname"].split("::")[-1], before[row["fullname"]], row["stats"]["median"])
        for row in b.rows
        if before.get(row["fullname"])
    ]
    if not found:
        raise ReportError(
            f"{a.path} and {b.path}: expected benchmarks that both have, found none; compare the same suites"
        )
    return found


def compare(a: Benchmark, b: Benchmark, limit: float, other_machine: bool) -> tuple[str, bool]:
    """(text, whether anything became slower by more than `limit`). ReportError where the machines, threads or sizes
    differ, unless `other_machine`."""
    differing = differing_conditions(a, b)
    if differing and not other_machine:
        raise ReportError(
            f"{a.path} and {b.path} were not measured under the same conditions ({'; '.join(differing)}): their times "
            "are of different things; --other-machine compares them all the same"
        )
    found = sorted(differences(a, b), key=lambda d: -d.change)
    slower = [d for d in found if d.change > limit]
    table = aligned(
        ["benchmark", "", "before", "after", "change"],
        [
            [d.name, "SLOWER" if d in slower else "", duration(d.before), duration(d.after), f"{d.change:+.1%}"]
            for d in found
        ],
    )
    names = {row["fullname"] for row in a.rows}, {row["fullname"] for row in b.rows}
    lines = [f"before: {a.path}: {a.describe()}", f"after:  {b.path}: {b.describe()}"]
    lines += [f"conditions differ: {text}" for text in differing]
    lines += ["medians:", *table, ""]
    lines += (
        [f"only before: {len(names[0] - names[1])}, only after: {len(names[1] - names[0])}"]
        if names[0] != names[1]
        else []
    )
    lines.append(f"{len(slower)} of {len(found)} slower by more than {limit:.1%}")
    return "\n".join(lines), bool(slower)
