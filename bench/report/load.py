"""What a report is made from: a benchmark's JSON file, projections, counts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bench.projection import Projection
from bench.report.counted import REFERENCE, Counted
from bench.tables import joined
from march.cost import find_device

OURS = ("triton", "torch")
STORAGE = Path(".benchmarks")
_PROJECTIONS = TypeAdapter(list[Projection])


class ReportError(Exception):
    """A file cannot be used; one line: expected, got, fix."""


@dataclass(frozen=True)
class Benchmark:
    """One file of pytest-benchmark. rows: its benchmarks; facts: of the machine; run: what the session noted."""

    path: Path
    rows: list[dict[str, Any]]
    facts: dict[str, Any]
    run: dict[str, Any]
    commit: str
    date: str

    def suite(self, name: str, **wanted: str) -> list[dict[str, Any]]:
        """The `extra_info` of the rows of one suite (kernels, experiments, machine) with the values that are wanted."""
        rows = [row["extra_info"] for row in self.rows if row.get("extra_info", {}).get("suite") == name]
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

    @property
    def kind(self) -> str:
        return self.facts.get("kind", "time of an unknown device")

    @property
    def device(self) -> str:
        return self.facts.get("device", "unknown")

    def describe(self) -> str:
        """One line: what, where, when, under which load."""
        versions, load = self.facts.get("versions", {}), self.run.get("load")
        return joined(
            "; ",
            f"{self.kind} on {self.device}",
            f"threads: {self.facts.get('threads', '?')}" if self.kind == "CPU time" else "",
            ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("torch", "triton")),
            f"{self.date[:16].replace('T', ' ')} UTC, commit {self.commit}",
            f"load average {load} at the end" if load is not None else "",
        )


def _read(path: Path, what: str) -> str:
    if not path.exists():
        raise ReportError(
            f"{path}: expected {what}, found no such file; `pytest bench/ --benchmark-json={path}` writes one"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ReportError(f"{path}: expected {what}, got an empty file; was the run killed? run it again")
    return text


def benchmark(path: Path) -> Benchmark:
    """Reads what `pytest bench/ --benchmark-json` or its autosave wrote; ReportError says what is wrong."""
    what = "pytest-benchmark's JSON"
    try:
        data = json.loads(_read(path, what))
    except ValueError as error:
        raise ReportError(f"{path}: expected {what}, got text that is not JSON ({error}); give another file") from error
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list) or "machine_info" not in data:
        raise ReportError(
            f"{path}: expected {what}, with benchmarks and machine_info, got other JSON; give another file"
        )
    rows = [row for row in data["benchmarks"] if isinstance(row, dict) and "stats" in row and "fullname" in row]
    if not rows:
        raise ReportError(f"{path}: expected at least one benchmark, got none; run `pytest bench/` to its first result")
    info, commit = data["machine_info"], data.get("commit_info") or {}
    facts = info.get("march") or {"device": (info.get("cpu") or {}).get("brand_raw") or info.get("node", "unknown")}
    identity = str(commit.get("id", "unknown"))[:10] + (" with changes" if commit.get("dirty") else "")
    return Benchmark(path, rows, facts, data.get("march", {}), identity, str(data.get("datetime", "?")))


def newest() -> Path:
    """The last file that `pytest bench/` saved by itself."""
    found = sorted(STORAGE.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ReportError(
            f"expected a benchmark's JSON file, or one under {STORAGE}/, found none; run `pytest bench/` first"
        )
    return found[-1]


def projections(paths: Sequence[Path]) -> list[Projection]:
    """Entries of files that bench.projection wrote; each is a list of objects."""
    return [one for path in paths for one in read_projections(_read(path, "a projection's JSON"), path)]


def read_projections(text: str, source: object) -> list[Projection]:
    """From JSON of `source`, which errors name."""
    try:
        return _PROJECTIONS.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise ReportError(
            f"{source}: expected a list of projections with {', '.join(Projection.__dataclass_fields__)}, got at "
            f"{list(first['loc'])}: {first['msg']}; see docs/bench.md"
        ) from error


@dataclass(frozen=True)
class Sources:
    """Everything that the sections are made from; out: where their pictures go."""

    benchmark: Benchmark
    counted: Mapping[str, Counted]
    projections: Sequence[Projection]
    out: Path

    @property
    def ours(self) -> str:
        """Which of our implementations was measured."""
        names = {row["implementation"] for suite in ("kernels", "experiments") for row in self.benchmark.suite(suite)}
        return next((name for name in OURS if name in names), OURS[0])

    def projected(self, impl: str) -> dict[str, Projection]:
        """Projections on the reference device, by experiment."""
        return {p.experiment: p for p in self.projections if p.impl == impl and find_device(p.device) == REFERENCE}

    @property
    def sizes(self) -> str:
        """Of the measured steps; "" where none was."""
        return next((row.get("sizes", "") for row in self.benchmark.suite("experiments")), "")
