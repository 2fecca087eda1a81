"""One page, Markdown and HTML with pictures, from a benchmark's JSON, the ledger and projections; or two compared.

    python -m bench.report [FILE.json] [--projection FILE.json ...] [--out DIR] [--exp NAME]
    python -m bench.report --compare A.json B.json [--threshold 5%] [--other-machine]

FILE: what `pytest bench/ --benchmark-json` wrote; by default the newest under .benchmarks/. Exit status of --compare:
0, 1 where a median became slower by more than the threshold, 2 where the files cannot be compared.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import pages
from bench.report.compare import compare, threshold
from bench.report.contents import contents
from bench.report.counted import counted
from bench.report.load import Benchmark, Projection, ReportError, Sources, benchmark, newest, projections
from bench.steps import distinct
from march import experiments
from march.config import ConfigError

TEMPLATE = Path(__file__).with_name("report.md")


def build(given: Benchmark, found: Sequence[Projection], out: Path, experiment: str) -> list[Path]:
    """Writes report.md, report.html and the pictures into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    sources = Sources(given, {name: counted(name) for name in dict.fromkeys([experiment, *distinct()])}, found, out)
    return pages.write(out, "report", pages.render(TEMPLATE, **contents(sources, experiment)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("file", nargs="?", type=Path, help="JSON of `pytest bench/`; default the newest in .benchmarks/")
    add("--projection", nargs="+", type=Path, default=[], metavar="FILE", help="of python -m bench.projection")
    add("--out", type=Path, default=Path("report"), metavar="DIR", help="where the page goes (report)")
    add("--exp", default="Baseline", help="the experiment whose operators stand under the roof")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two files instead of a page")
    add("--threshold", default="5%", help="with --compare: by how much a median may grow (5%%)")
    add("--other-machine", action="store_true", help="compare files of different machines all the same")
    given = parser.parse_args(arguments)
    try:
        given.threshold = threshold(given.threshold)
    except ValueError:
        parser.error(f"--threshold: expected a share such as 5% or 0.05, got {given.threshold!r}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    try:
        if given.compare:
            text, slower = compare(*map(benchmark, given.compare), given.threshold, given.other_machine)
            print(text)
            return int(slower)
        experiment = experiments.get(given.exp).name
        source = benchmark(given.file or newest())
        for path in build(source, projections(given.projection), given.out, experiment):
            print(f"wrote {path}")
    except (ReportError, ConfigError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
