"""What a report is made from: a benchmark's JSON file, projections, and the repository's own numbers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from march.training.published import PUBLISHED

STORAGE = Path(".benchmarks")


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

    def suite(self, name: str) -> list[dict[str, Any]]:
        """The `extra_info` of the rows of one suite: kernels, experiments, machine."""
        return [row["extra_info"] for row in self.rows if row.get("extra_info", {}).get("suite") == name]

    @property
    def kind(self) -> str:
        return self.facts.get("kind", "time of an unknown device")

    @property
    def device(self) -> str:
        return self.facts.get("device", "unknown")

    def describe(self) -> str:
        """One line: what, where, when, under which load."""
        versions = self.facts.get("versions", {})
        load = self.run.get("load")
        parts = [
            f"{self.kind} on {self.device}",
            f"threads: {self.facts.get('threads', '?')}" if self.kind == "CPU time" else "",
            ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("torch", "triton")),
            f"{self.date[:16].replace('T', ' ')} UTC, commit {self.commit}",
            f"load average {load} at the end" if load is not None else "",
        ]
        return "; ".join(part for part in parts if part)


def _json(path: Path, what: str) -> Any:
    if not path.exists():
        raise ReportError(
            f"{path}: expected {what}, found no such file; `pytest bench/ --benchmark-json={path}` writes one"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ReportError(f"{path}: expected {what}, got an empty file; was the run killed? run it again")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path}: expected {what}, got text that is not JSON ({error}); give another file") from error


def benchmark(path: Path) -> Benchmark:
    """Reads what `pytest bench/ --benchmark-json` or its autosave wrote; ReportError says what is wrong."""
    what = "pytest-benchmark's JSON"
    data = _json(path, what)
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


@dataclass(frozen=True)
class Projection:
    """The projected step of one experiment. impl: "eager" or "triton". seconds, low, high: of a step on `gpus` devices
    `device`, with the range that the fit's error implies; by_operator: what adds up to it."""

    experiment: str
    impl: str
    device: str
    gpus: int
    seconds: float
    low: float
    high: float
    by_operator: dict[str, float]
    published_seconds: float | None


def projections(paths: list[Path]) -> list[Projection]:
    """Entries of files that bench.projection wrote; each is a list of objects."""
    found = []
    for path in paths:
        data = _json(path, "a projection's JSON")
        if not isinstance(data, list):
            raise ReportError(f"{path}: expected a list of projections, got {type(data).__name__}; see docs/bench.md")
        for entry in data:
            try:
                found.append(Projection(**{name: entry[name] for name in Projection.__dataclass_fields__}))
            except (KeyError, TypeError) as error:
                raise ReportError(
                    f"{path}: expected {', '.join(Projection.__dataclass_fields__)} in every entry, got one without "
                    f"{error}; see docs/bench.md"
                ) from error
    return found


def published() -> dict[str, float]:
    """Seconds of a step of the published runs on 8 RTX A5000, as far as the repository carries them."""
    return {name: run.seconds_per_step for name, run in PUBLISHED.items() if run.seconds_per_step is not None}
