"""PTX with a fault in it: each mutant is caught, or a reason says why nothing changes: mutants.py, judge.py.

The full set takes minutes and is in docs/kernels/emulator_mutants.md, which MUTANTS=write writes.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from judge import Judge
from mutants import RUNS, SYNCHRONISATION, VALUES, launches, mutants

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "kernels" / "emulator_mutants.md"
KERNELS = {
    name
    for path in (ROOT / "kernels" / "fused").glob("*.py")
    for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
}
# of the quick set, 4 s: kernels by case. Products, copies and barriers of the first, rows of the others
QUICK = {
    "linear_cross_entropy chunks": ("_linear_cross_entropy_fwd_kernel",),
    "residual_norm": ("_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel"),
}

Outcomes = Counter[tuple[str, str, bool, str]]  # kernel, kind, caught, by what or why not


def _outcomes(names: list[str], most: int, values: int, only: set[str] = KERNELS) -> Outcomes:
    found: Outcomes = Counter()
    for launch in [launch for launch in launches(names) if launch.name in only]:
        judge = Judge(launch)
        for mutant in mutants(launch, most, values):
            found[launch.name, mutant.kind, *judge.outcome(mutant)] += 1
    return found


def _table(rows: dict[str, Counter], columns: list[str], first: str) -> list[str]:
    lines = [f"| {first} | mutants | {' | '.join(columns)} |", "|---|" + "--:|" * (1 + len(columns))]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.total()} | {' | '.join(str(row[column] or '') for column in columns)} |")
    return lines


def _document(found: Outcomes) -> str:
    def column(caught: bool, by: str) -> str:
        return (by if by in ("results", "never ends", "refused") else "finding") if caught else "nothing changes"

    columns = ["finding", "results", "never ends", "refused", "nothing changes"]
    by_kernel: dict[str, Counter] = {name: Counter() for name in sorted(KERNELS)}
    by_kind: dict[str, Counter] = {name: Counter() for name in (*SYNCHRONISATION, *VALUES)}
    reasons: Counter = Counter()
    for (kernel, kind, caught, by), n in found.items():
        by_kernel[kernel][column(caught, by)] += n
        by_kind[kind][column(caught, by)] += n
        if not caught:
            reasons[kind, by] += n
    order = list(by_kind)
    listed = sorted(reasons.items(), key=lambda item: (order.index(item[0][0]), -item[1], item[0][1]))
    total = sum((row for row in by_kernel.values()), Counter())
    return "\n".join([
        "# Mutants of the kernels' PTX, and what the emulator says of them",
        "",
        "One line of a kernel's PTX is changed at a time (`tests/emulator/mutants.py`: every barrier, wait and",
        "commit; two of each other kind for each program), and the program is executed on the same arguments.",
        "Written by `MUTANTS=write python -m pytest tests/emulator/test_mutants.py -m slow`, for sm_86.",
        "",
        f"{total.total()} mutants: {total['finding']} give a finding, {total['results']} other results, "
        f"{total['never ends']} never end, {total['refused']} have no rule, {total['nothing changes']} change nothing.",
        "Of barriers, waits and commits a plain model that follows each byte of shared memory (`byte_model.py`) says",
        "the same as the emulator, for every one.",
        "", "## By kernel", "", *_table(by_kernel, columns, "kernel"),
        "", "## By kind", "", *_table(by_kind, columns, "kind"),
        "", "## Why the others change nothing", "", "| kind | reason | mutants |", "|---|---|--:|",
        *(f"| {kind} | {reason} | {n} |" for (kind, reason), n in listed), "",
    ])  # fmt: skip


def test_a_few_mutants_of_each_kind():
    found = _outcomes(list(QUICK), 1, 1, {kernel for kernels in QUICK.values() for kernel in kernels})
    kinds = {kind for _, kind, caught, _ in found if caught}
    assert kinds >= {"barrier dropped", "wait_group dropped", "guard inverted", "comparison changed", "constant + 1"}
    caught = sum(n for (_, _, caught, _), n in found.items() if caught)
    assert caught > 0.7 * found.total(), found


@pytest.mark.slow
@pytest.mark.timeout(0)  # a quarter of an hour of a core that does nothing else
def test_mutants_of_every_kernel():
    found = _outcomes(list(RUNS), 1000, 2)
    assert {kernel for kernel, *_ in found} == KERNELS
    assert found.total() >= 200
    text = _document(found)
    if os.environ.get("MUTANTS") == "write":
        TABLE.write_text(text)

    def synchronisation(document: str) -> list[str]:
        starts = tuple(f"| {kind} |" for kind in SYNCHRONISATION)
        return [line for line in document.split("\n") if line.startswith(starts)]

    assert synchronisation(TABLE.read_text()) == synchronisation(text), "write the table anew: MUTANTS=write"
