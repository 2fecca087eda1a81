"""`march runs`: the run folders that are there, as a table."""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from march.compare.cell import FAILED, FINISHED, INTERRUPTED, RUNNING, lock, read_or_empty
from march.config import nearest
from march.console import Parser, UsageError, print_table
from march.training.metrics import read

FIELDS = {
    "folder": "",
    "experiment": "",
    "control": "",
    "seed": "",
    "recipe": "the recipe's name",
    "changes": "fields that this run changed of its experiment",
    "status": "finished, failed, running, interrupted",
    "steps": "",
    "loss": "mean training loss of the last 50 steps, nats per label token",
    "eval_loss": "validation, the last",
    "test_loss": "of a finished run",
    "parameters": "",
    "tokens_per_second": "median",
    "process_seconds": "from its start to its end",
    "device": "",
    "started": "",
}
SHOWN = (
    "folder",
    "experiment",
    "seed",
    "recipe",
    "status",
    "steps",
    "loss",
    "eval_loss",
    "test_loss",
    "process_seconds",
)
_COMPARED = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_FILTER = re.compile(r"(\w+)(<=|>=|!=|=|<|>)(.*)", re.DOTALL)


def build_parser() -> Parser:
    names = ", ".join(FIELDS)
    parser = Parser(prog="march runs", description=f"The run folders as a table. Fields: {names}.")
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="DIR", help="where to look, at any depth; default runs"
    )
    parser.add_argument(
        "--filter", action="append", metavar="FIELD=VALUE", help="also != < > <= >=; text: any case; may be repeated"
    )
    parser.add_argument("--sort", metavar="FIELD", help="FIELD:desc: the largest first; default by start")
    parser.add_argument("--fields", metavar="A,B", help=f"or all; default {','.join(SHOWN)}")
    parser.add_argument("--csv", action="store_true", help="all fields")
    parser.add_argument("--json", action="store_true", help="all fields")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw their validation losses")
    parser.add_argument(
        "--published", type=Path, metavar="DIR", help="with --plot: other curves, NAME.csv, step and loss"
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 for a mistake."""
    try:
        return _runs(build_parser().parse_args(sys.argv[1:] if words is None else list(words)))
    except UsageError as error:
        print(f"march runs: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _runs(given: argparse.Namespace) -> int:
    if given.csv and given.json:
        raise UsageError("expected --csv or --json, got both; leave one out")
    if given.published and not given.plot:
        raise UsageError("expected --published with --plot, got it alone; name a picture")
    for folder in given.folders:
        if not folder.is_dir():
            raise UsageError(f"expected a folder, got {folder}; see where your runs are")
    table = select(load(given.folders or [Path("runs")]), given.filter or (), given.sort)
    if given.plot:
        plot(table, given.plot, given.published)
    if given.json:
        print(json.dumps([{k: _plain(v) for k, v in row.items()} for row in table.to_dict("records")], indent=1))
    elif given.csv:
        print(table.to_csv(index=False), end="")
    else:
        shown = list(FIELDS) if given.fields == "all" else (given.fields or ",".join(SHOWN)).split(",")
        for name in shown:
            _known(name)
        show(table[shown])
    return 0


def _plain(value: Any) -> Any:
    """None for what pandas calls missing, Python's own number for its."""
    if value is None or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if hasattr(value, "item") else value


def find(folders: Sequence[Path]) -> Iterator[Path]:
    """Folders with a config.json of a run, each once."""
    seen: set[Path] = set()
    for root in folders:
        for path in sorted(root.rglob("config.json")):
            if path.parent.resolve() not in seen and "checkpoints" not in path.parts:
                seen.add(path.parent.resolve())
                yield path.parent


def load(folders: Sequence[Path]) -> pd.DataFrame:
    """A row for each run, by start, with the columns FIELDS; what a folder does not say is missing."""
    rows = [row for folder in find(folders) if (row := describe(folder))]
    table = pd.DataFrame(rows, columns=list(FIELDS))
    return table.sort_values("started", na_position="first", kind="stable", ignore_index=True)


def describe(folder: Path) -> dict[str, Any] | None:
    """FIELDS of one run; None for a config.json that is no run's."""
    config, summary = read_or_empty(folder / "config.json"), read_or_empty(folder / "summary.json")
    if not isinstance(config.get("experiment"), str):
        return None
    starts = read_or_empty(folder / "environment.json").get("starts")
    first = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
    rows = [] if summary.get("steps") else read(folder / "metrics.jsonl")
    recipe, changed = config.get("recipe"), config.get("difference")
    changes = changed.get("in_this_run") if isinstance(changed, dict) else None
    return {
        "folder": str(folder),
        **{name: config.get(name) for name in ("experiment", "control", "seed", "started")},
        "recipe": recipe.get("name") if isinstance(recipe, dict) else recipe,
        "changes": ", ".join(f"{k} {v[1]}" for k, v in changes.items()) if isinstance(changes, dict) else None,
        "status": status(folder, summary),
        "steps": summary.get("steps") or (rows[-1]["step"] if rows else 0),
        "loss": _finite(summary.get("mean_last_losses") or (rows[-1]["loss"] if rows else None)),
        "eval_loss": _finite(
            summary.get("eval_loss") or next((r["eval_loss"] for r in rows[::-1] if r.get("eval_loss")), None)
        ),
        "test_loss": _finite(summary.get("test_loss")),
        "parameters": summary.get("parameters") or first.get("parameters"),
        "device": summary.get("device") or first.get("device"),
        **{name: _finite(summary.get(name)) for name in ("tokens_per_second", "process_seconds")},
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def status(folder: Path, summary: dict[str, Any]) -> str:
    if summary.get("finished") is True:
        return FINISHED
    with lock(folder / ".lock", create=False) as held:
        if held is None:
            return RUNNING
    return FAILED if "failed" in summary else INTERRUPTED


def _known(name: str) -> str:
    if name not in FIELDS:
        raise UsageError(f"expected a field, got {name!r}; {' or '.join(nearest(name, list(FIELDS))) or 'see --help'}")
    return name


def select(table: pd.DataFrame, filters: Sequence[str], sort: str | None) -> pd.DataFrame:
    """The rows that all filters keep, sorted; what is missing meets no filter but != and comes last.

    Raises:
        UsageError: no such field, or a text where a number is compared.
    """
    for text in filters:
        found = _FILTER.fullmatch(text)
        if not found:
            raise UsageError(f"expected FIELD=VALUE, also != < > <= >=, got {text!r}; quote it from the shell")
        name, sign, value = _known(found[1]), found[2], found[3]
        column = table[name]
        numbers = pd.to_numeric(column, errors="coerce")
        try:
            kept = _COMPARED[sign](numbers, float(value))
        except ValueError:
            if sign not in ("=", "!="):
                raise UsageError(f"expected a number after {name}{sign}, got {value!r}; compare texts with =") from None
            kept = _COMPARED[sign](column.astype("string").str.lower(), value.lower()).fillna(sign == "!=")
        table = table[kept.astype(bool)]
    if sort:
        name = _known(sort.removesuffix(":desc"))
        table = table.sort_values(name, ascending=name == sort, na_position="last", kind="stable")
    return table.reset_index(drop=True)


def show(table: pd.DataFrame) -> None:
    numeric = {name: pd.api.types.is_numeric_dtype(table[name]) for name in table.columns}
    rows = [list(map(_text, table.columns, row)) for row in table.itertuples(index=False)]
    print_table(numeric, rows, width=1000, fold="folder")


def _text(name: str, value: Any) -> str:
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if "loss" in name else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)


def plot(table: pd.DataFrame, path: Path, published: Path | None) -> None:
    """Validation losses over steps of the runs in `table`, one colour an experiment, with other curves dotted.

    Raises:
        UsageError: no run has one, or the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from march.compare.plots import published_curves

    theirs = published_curves(published) if published else {}
    names = list(dict.fromkeys([*table["experiment"], *theirs]))
    shades = {name: pyplot.get_cmap("tab20")(index % 20) for index, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    told: set[str] = set()
    late: list[float] = []

    def line(name: str, steps: Sequence[float], losses: Sequence[float], style: str, label: str) -> None:
        axes.plot(steps, losses, style, color=shades[name], linewidth=1.4, label=None if label in told else label)
        told.add(label)
        late.extend(loss for step, loss in zip(steps, losses, strict=True) if step >= 0.3 * max(steps))

    for folder, name in zip(table["folder"], table["experiment"], strict=True):
        rows = [row for row in read(Path(folder) / "metrics.jsonl") if row.get("eval_loss") is not None]
        if rows:
            line(name, [row["step"] for row in rows], [row["eval_loss"] for row in rows], "-", name)
    for name, frame in theirs.items():
        line(name, frame["step"].tolist(), frame["loss"].tolist(), ":", f"{name}, published")
    if not late:
        raise UsageError("expected runs with a validation loss, got none; change --filter")
    room = 0.05 * (max(late) - min(late)) or 0.01
    axes.set_ylim(min(late) - room, max(late) + room)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(color="#eceff1")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"expected to write the picture {path}, got {error}; give another name") from error
    finally:
        pyplot.close(figure)
