"""Baseline's step on sm_86 compiles to what docs/kernels/sm_86_baseline.md says: its rows are the limits.

Where a change is meant: BASELINE=write python -m pytest tests/kernels/test_baseline_table.py writes the page anew.
"""

import os
import re

import pytest
from compiling import ROOT, compiled

PAGE = ROOT / "docs/kernels/sm_86_baseline.md"
BLOCK = re.compile(r"(?<=```\n).*?(?=```)", re.S)
SESSION = """
import contextlib, io, json
from bench import compiled
with contextlib.redirect_stdout(io.StringIO()) as out:
    status = compiled.main(["--exp", "Baseline", "--arch", "sm_86"])
print(json.dumps([status, out.getvalue()]))
"""
EXACT = ("STL/LDL", "blk/SM", "warps/SM", "HMMA loop", "atomics")
NEAR = ("regs", "smem", "slots/HMMA", "smem/tensor")  # within 3%: better ones are written down too


def rows_of(text: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The table's rows by kernel, configuration and type."""
    header, *rows = [re.split(r"  +", line.strip()) for line in text.split("\n\n")[0].splitlines()[1:]]
    found = {tuple(row[:3]): dict(zip(header, row, strict=True)) for row in rows}
    assert len(found) == len(rows) > 20
    return found


def differences(known: dict[tuple[str, ...], dict[str, str]], now: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    """What is not as the page says."""
    found = [f"{'gone' if key in known else 'new'}: {' '.join(key)}" for key in known.keys() ^ now.keys()]
    for key in known.keys() & now.keys():
        for column in (*EXACT, *NEAR):
            was, is_ = known[key][column], now[key][column]
            if column in NEAR and was.count(",") == is_.count(",") and "-" not in (was, is_):
                pairs = zip(map(float, was.split(",")), map(float, is_.split(",")), strict=True)
                same = all(abs(a - b) <= 0.03 * a for a, b in pairs)
            else:
                same = was == is_
            if not same:
                found.append(f"{key[0]}: expected {column} {was}, got {is_} ({key[1]})")
    return found


@pytest.fixture(scope="module")
def now():
    status, text = compiled(SESSION)
    return status, text


def test_baseline_compiles_to_what_the_page_says(now):
    status, text = now
    assert status == 0, text[-2000:]
    if os.environ.get("BASELINE") == "write":
        PAGE.write_text(BLOCK.sub(lambda _: text, PAGE.read_text()))
    found = differences(rows_of(BLOCK.search(PAGE.read_text())[0]), rows_of(text))
    assert not found, "\n".join([*found, "if this is meant, write the page anew: BASELINE=write"])


@pytest.mark.parametrize(
    ("column", "was", "is_"),
    [
        ("regs", "248", "256"),
        ("smem", "24704", "32768"),
        ("slots/HMMA", "8.75,9.88", "8.75,10.20"),
        ("slots/HMMA", "8.75,9.88", "8.75"),
        ("STL/LDL", "0/0", "1/1"),
        ("blk/SM", "2", "1"),
    ],
)
def test_what_is_worse_by_more_than_3_percent_is_found(column, was, is_):
    row = dict.fromkeys((*EXACT, *NEAR), "1")
    known, changed = ({("kernel", "", ""): row | {column: value}} for value in (was, is_))
    assert differences(known, known) == []
    assert len(differences(known, changed)) == 1
