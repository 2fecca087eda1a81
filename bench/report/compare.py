"""Two benchmark files beside each other, with a threshold that fails."""

from typing import Any

import pandas as pd

from bench.report.load import Benchmark, ReportError
from bench.tables import markdown, table


def threshold(text: str) -> float:
    """A share from "5%" or "0.05"; ValueError otherwise."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if value < 0:
        raise ValueError(text)
    return value


def _conditions(one: Benchmark) -> dict[str, Any]:
    """What must be equal for two times to be of one thing."""
    versions = {
        f"{name} version": v for name, v in one.facts.get("versions", {}).items() if name in ("torch", "triton")
    }
    threads, sizes = one.facts.get("threads"), one.run.get("sizes")
    return {"kind": one.kind, "device": one.device, "threads": threads, "sizes": sizes} | versions


def compare(a: Benchmark, b: Benchmark, limit: float, other_machine: bool) -> tuple[str, bool]:
    """(medians of what both have, whether anything became slower by more than `limit`). ReportError where
    the machines, threads or sizes differ, unless `other_machine`, and where nothing is in both."""
    first, second = _conditions(a), _conditions(b)
    names = [name for name in first | second if first.get(name) != second.get(name)]
    differing = [f"{name}: {first.get(name)} and {second.get(name)}" for name in names]
    if differing and not other_machine:
        raise ReportError(
            f"{a.path} and {b.path} were not measured under the same conditions ({'; '.join(differing)}): their times "
            "are of different things; --other-machine compares them all the same"
        )
    medians = pd.DataFrame(
        {
            side: pd.Series({row["fullname"]: row["stats"]["median"] for row in one.rows}, dtype=float)
            for side, one in (("before", a), ("after", b))
        }
    )
    both = medians[(medians.before > 0) & medians.after.notna()]
    if both.empty:
        raise ReportError(
            f"{a.path} and {b.path}: expected benchmarks that both have, found none; compare the same suites"
        )
    both = both.assign(change=both.after / both.before - 1).sort_values("change", ascending=False, kind="stable")
    slower = int((both.change > limit).sum())
    both = both.assign(name=both.index.str.split("::").str[-1], slower=["SLOWER" * (x > limit) for x in both.change])
    rows = table(
        "benchmark |  | before | after | change",
        "{name} | {slower} | {before:time} | {after:time} | {change:+.1%}",
        both.to_dict("records"),
    )
    lines = [f"before: {a.path}: {a.describe()}", f"after:  {b.path}: {b.describe()}"]
    lines += [f"conditions differ: {text}" for text in differing]
    lines += ["medians:", markdown(rows), ""]
    only_before, only_after = medians.after.isna().sum(), medians.before.isna().sum()
    if only_before or only_after:
        lines.append(f"only before: {only_before}, only after: {only_after}")
    lines.append(f"{slower} of {len(both)} slower by more than {limit:.1%}")
    return "\n".join(lines), bool(slower)
