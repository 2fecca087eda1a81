"""The report of a comparison: one page (HTML, Markdown), its pictures (PNG), and its numbers (JSON, CSV)."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from march.compare import plots, statistics
from march.compare.analysis import Row, values
from march.compare.cell import ENDED, FINISHED, Cell
from march.compare.plan import mean_loss
from march.console import UsageError, print_table
from march.training.files import write_text
from march.training.metrics import short_number

# heading, what it says, numeric
COLUMNS = (
    ("experiment", "", False),
    ("control", "", False),
    ("verdict", "", False),
    ("difference", "loss minus the control's, with its interval; p: paired by seed, u: not paired; and seeds", True),
    ("loss", "nats per label token of the test split, mean over seeds; read once, when a run has finished", True),
    ("bits/byte", "of label text, as if its tokens were as long as the test split's", True),
    ("shows", "the smallest true difference that this many seeds show", True),
    ("seeds needed", "more than there are, to show a difference of the margin", True),
    ("spread", "standard deviation of the loss over seeds", True),
    ("roughness", "of the training loss around its trend in the second half (second differences), median", True),
    ("change", "what differs from Baseline, or from the experiment named first", False),
    ("parameters", "", True),
    ("FLOPs", "of the forward and backward passes of a run", True),
    ("s/step", "median over steps of all runs; of this machine as it was", True),
    ("claim", "what the verdict says about the published sentence", False),
    ("beware", "budgets that do not match, runs that are missing", False),
)
PICTURES = {
    "differences.png": "Difference of the test loss to the control",
    "curves.png": "Validation loss over steps beside the control's (grey), mean and standard deviation over seeds; the "
    "axis is that of the later steps",
    "over_steps.png": "Difference of the validation loss to the control over steps, with its "
    f"{1 - statistics.ALPHA:.0%} interval",
    "pareto.png": "Loss against what it cost; the line joins what nothing cheaper beats",
}


def cells(row: Row) -> list[str]:
    """A row of the table as text, in the order of COLUMNS."""
    d, v = row.difference, row.verdict
    needed = _number(row.seeds_needed, "d")
    if d and d.spread is not None and row.seeds_needed is None:
        needed = f"over {statistics.MOST_SEEDS}"
    return [
        row.label,
        row.control,
        "" if v is None else v.name + (f" ({v.why})" if v.why else ""),
        _difference(row),
        _number(row.loss, ".4f"),
        _number(row.bits_per_byte, ".3f"),
        _number(row.detectable, ".4f"),
        needed,
        _number(row.spread, ".4f"),
        _number(row.roughness, ".4f"),
        row.change,
        f"{row.setting.parameters:,}",
        short_number(row.setting.flops / 1e12) + " T",
        _number(row.seconds, ".3g"),
        row.claim,
        "; ".join(row.flags),
    ]


def _number(value: float | None, style: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, style)


def _difference(row: Row) -> str:
    d = row.difference
    if d is None or d.mean is None:
        return ""
    interval = f" [{d.low:+.4f}, {d.high:+.4f}]" if d.low is not None else ""
    return f"{d.mean:+.4f}{interval} {'p' if d.paired else 'u'}{d.pairs}"


def write(
    rows: Sequence[Row],
    folder: Path,
    *,
    margin: float,
    grid: Mapping[str, Mapping[tuple[str, ...], Sequence[Cell]]],
    origins: Mapping[str, Sequence[str]],
    published: Mapping[str, pd.DataFrame],
    command: str,
    reach: Sequence[str] = (),
) -> Path:
    """Write everything into `folder`; returns the page's path. An experiment without a run that ended is a name in a
    note, and a row of the numbers only. reach: sentences on what may be concluded.

    Raises:
        UsageError: the folder cannot be written to.
    """
    records = [values(row) for row in rows]
    metrics = pd.concat([row.history for row in rows], ignore_index=True).round(5)
    shown = [row for row in rows if _ended(row)] or rows
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in PICTURES:
            (folder / old).unlink(missing_ok=True)
        pictures = plots.draw(rows, folder, margin, published)
        content: dict[str, Any] = {
            "title": f"{rows[0].label} and {len(rows) - 1} others"
            if len(rows) > 2
            else " and ".join(r.label for r in rows),
            "when": datetime.now(UTC).isoformat(timespec="minutes"),
            "command": command,
            "setting": _setting(rows, origins["measured precisions"]),
            "rule": rule(margin),
            "columns": COLUMNS,
            "rows": [cells(row) for row in shown],
            "kinds": [_kind(row) for row in shown],
            "counts": _counts(shown),
            "grid": _grid(grid, rows),
            "notes": _notes(rows, origins),
            "reach": reach,
            "pictures": [(name, PICTURES[name]) for name in pictures],
        }
        numbers = {"when": content["when"], "margin": margin, "alpha": statistics.ALPHA, "rows": records}
        write_text(folder / "report.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
        pd.DataFrame(records).drop(columns="losses").to_csv(folder / "rows.csv", index=False)
        metrics.to_csv(folder / "metrics.csv.gz", index=False, compression={"method": "gzip", "mtime": 1})
        content["data"] = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in pictures}
        for kind in ("md", "html"):
            environment = jinja2.Environment(autoescape=kind == "html", trim_blocks=True, lstrip_blocks=True)
            environment.filters["breakable"] = lambda name: Markup(re.sub("(?<=[a-z])(?=[A-Z])", "<wbr>", escape(name)))
            template = Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")
            write_text(folder / f"report.{kind}", environment.from_string(template).render(**content) + "\n")
    except OSError as error:
        raise UsageError(
            f"expected to write a report into {folder}, got {error.strerror}; give another --out"
        ) from error
    return folder / "report.html"


def rule(margin: float) -> list[str]:
    """The rule of the verdicts, in sentences."""
    same = statistics.no_difference(margin)
    return [
        f"A difference of {margin:g} nats or more matters. “Better” and “worse”: a two-sided t-test rejects equal "
        f"means. “{same[0].upper()}{same[1:]}”: two one-sided tests reject a difference of that size, and the first "
        "does not. Else “undecided”.",
        f"Both are corrected over the table by Holm's step-down at {statistics.ALPHA:.0%}; the intervals are "
        f"{1 - statistics.ALPHA:.0%} each, not corrected. Runs of one seed have the same text, initial values and "
        "masks wherever two experiments agree, and are compared in pairs; where seeds do not pair, Welch's test is "
        "used.",
        f"“Shows” and “seeds needed” are for a chance of {statistics.POWER:.0%} at the correction's first step.",
    ]


def _setting(rows: Sequence[Row], measured: Sequence[str]) -> str:
    """What the runs have in common; where they differ, all the values."""

    def said(style: Callable[[Any], str]) -> str:
        return " or ".join(sorted({style(row.setting) for row in rows}))

    return ", ".join(
        map(
            said,
            (
                lambda s: f"{s.steps} steps of {s.sequences} sequences of {s.length} tokens",
                lambda s: f"{short_number(s.tokens)} tokens in all",
                lambda s: f"learning rate {s.learning_rate:g}",
                lambda s: " and ".join(measured) if measured and s.precision == "fastest" else s.precision,
                lambda s: f"text: {s.text}",
            ),
        )
    )


def _kind(row: Row) -> str:
    if row.verdict is None:
        return "control"
    name = row.verdict.name
    return name if name in (statistics.BETTER, statistics.WORSE, statistics.UNDECIDED) else "same"


def _counts(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    judged = [row for row in rows if row.verdict]
    names = {_kind(row): row.verdict.name for row in judged if row.verdict}
    order = [kind for kind in ("better", "worse", "same", "undecided") if kind in names]
    return [(kind, names[kind], sum(_kind(row) == kind for row in judged)) for kind in order]


def _grid(
    grid: Mapping[str, Mapping[tuple[str, ...], Sequence[Cell]]], rows: Sequence[Row]
) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Each experiment's values and the mean validation loss over the seeds that chose."""
    chosen = {row.name: row.variant.chosen for row in rows}
    return [
        (
            name,
            [
                (" ".join(point), _number(mean_loss(runs), ".4f") or "not finished", point == chosen[name])
                for point, runs in points.items()
            ],
        )
        for name, points in grid.items()
    ]


def _ended(row: Row) -> bool:
    return any(status in ENDED for status in row.statuses.values())


def _notes(rows: Sequence[Row], origins: Mapping[str, Sequence[str]]) -> list[str]:
    notes = []
    statuses = [status for row in rows for status in row.statuses.values()]
    done = statuses.count(FINISHED)
    if done < len(statuses):
        names = [row.label for row in rows if not _ended(row)]
        waiting = f"{len(names)} of {len(rows)} experiments" if len(names) > 8 else ", ".join(names)
        notes.append(
            f"A partial table: {done} of {len(statuses)} runs have finished; the same command continues."
            + (f" None yet of {waiting}." if waiting else "")
        )
    for what, found in origins.items():
        if len(found) > 1:
            notes.append(f"The runs come from different {what}: {', '.join(found)}.")
    if any(len(row.finite) < 2 for row in rows if _ended(row)):
        notes.append("An experiment with fewer than two finished seeds gets no verdict: one seed shows no spread.")
    return notes


def print_rows(rows: Sequence[Row]) -> None:
    """The verdicts on stdout."""
    shown = ("experiment", "control", "loss", "difference", "shows", "verdict", "beware")
    numeric = {name: numeric for name, _, numeric in COLUMNS}
    places = [list(numeric).index(name) for name in shown]
    texts = map(cells, rows)
    print_table({name: numeric[name] for name in shown}, ([row[place] for place in places] for row in texts), width=220)
