"""How the tables of bench/ are written: rows of {column: text} from a line of columns and a line of formats."""

import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, str]


def is_numeric(rows: Sequence[Row], column: str) -> bool:
    """Whether every cell is a number or starts with one; never of the first column, which names the row."""
    cells = [row[column] for row in rows if row[column] not in ("", "-")]
    return column != next(iter(rows[0])) and all(cell[0].isdigit() or cell[0] in "+-" for cell in cells)


def markdown(rows: Sequence[Row], padded: bool = True) -> str:
    """A Markdown table, numbers to the right; padded for a terminal."""
    columns = list(rows[0])
    right = [is_numeric(rows, column) for column in columns]
    texts = [columns, *([row[column].replace("|", "\\|") for column in columns] for row in rows)]
    widths = [max(3, *map(len, cells)) if padded else 0 for cells in zip(*texts, strict=True)]
    rule = [
        "-" * (max(w, 3) - 1) + ":" if r else ":" + "-" * (max(w, 3) - 1) for w, r in zip(widths, right, strict=True)
    ]
    lines = [
        [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        for line in texts
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def joined(separator: str, *parts: str) -> str:
    """The parts that say something."""
    return separator.join(filter(None, parts))


def duration(seconds: float | None) -> str:
    """Three digits with a unit."""
    if seconds is None:
        return "-"
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


UNITS = {"MiB": 2**20, "GiB": 2**30, "GB": 1e9, "TFLOP": 1e12, "M": 1e6, "ms": 1e-3}


class _Formatter(string.Formatter):
    """str.format with units: "{x:.2GiB}" of bytes, "{x:.1ms}" of seconds; "{x:time}" is a duration; None, NaN: "-"."""

    def format_field(self, value: Any, format_spec: str) -> str:
        unit = next((unit for unit in UNITS if format_spec.endswith(unit)), "")
        if value is None or value != value:
            return "-"
        if format_spec == "time":
            return duration(value)
        return format(value / UNITS[unit], f"{format_spec.removesuffix(unit)}f") if unit else format(value, format_spec)


def table(columns: str, cells: str, items: Iterable[Any]) -> list[Row]:
    """A row an item: "a | b" names the columns, "{x} | {y:.2f}" formats the item's values for them, {0} itself."""
    names, formats, formatter = columns.split(" | "), cells.split(" | "), _Formatter()

    def row(item: Any) -> list[str]:
        values = item if isinstance(item, Mapping) else {}
        return [formatter.vformat(text, (item,), values) for text in formats]

    return [dict(zip(names, row(item), strict=True)) for item in items]
