"""Mistakes put into the sources, one at a time (mutants.toml): are they caught?

    python tests/mutants.py [--part glu ...] [--tests REV] [--jobs 2]

Each is put into a copy of the tree, in which the tests of its part run until one fails. --tests REV: those tests as
they were at another revision, to compare two suites. It takes minutes; CI tries those with a `case` in one process
(tests/kernels/test_mutants.py). What was found is in docs/mutants.md.
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTEST = ("-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--no-header")


@dataclass(frozen=True)
class Mutant:
    """One mistake: `old`, which stands once in `file`, becomes `new`. case: of tests/kernels/test_mutants.py."""

    part: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    case: str = ""

    def source(self) -> str:
        """The file's text with the mistake in it."""
        text = (ROOT / self.file).read_text()
        found = text.count(self.old)
        assert found == 1, f"{self.part}, {self.name}: expected {self.old!r} once in {self.file}, got it {found} times"
        return text.replace(self.old, self.new)


def mutants() -> Iterator[Mutant]:
    parts = tomllib.loads((HERE / "mutants.toml").read_text())
    for part, entry in parts.items():
        for fields in entry["mutants"]:
            yield Mutant(part, tests=tuple(entry["tests"]), **fields)


def _copy(folder: Path, revision: str | None) -> Path:
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file() and not (revision and name.startswith("tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if revision:
        archive = subprocess.run(["git", "archive", revision, "tests"], cwd=ROOT, capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tests:
            tests.extractall(folder, filter="data")
    return folder


def judged(mutant: Mutant, tree: Path) -> str:
    """The test that catches it, or what else ends them; "" where all pass."""
    file = tree / mutant.file
    before = file.read_text()
    # no cached bytecode: two mistakes of one length within a second would look the same
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    file.write_text(mutant.source())
    try:
        done = subprocess.run(
            [sys.executable, *PYTEST, *mutant.tests], cwd=tree, env=environment, capture_output=True, text=True
        )
    finally:
        file.write_text(before)
    if done.returncode <= 0:
        return f"signal {-done.returncode} ends the process" if done.returncode else ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", done.stdout, re.M)
    assert failed, done.stdout[-2000:] + done.stderr[-2000:]
    return failed[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="only these parts of mutants.toml")
    parser.add_argument("--tests", metavar="REV", help="the tests of another revision")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    chosen = [one for one in mutants() if not asked.part or one.part in asked.part]
    trees: SimpleQueue[Path] = SimpleQueue()

    def judge(one: Mutant) -> str:
        tree = trees.get()
        try:
            by = judged(one, tree)
        finally:
            trees.put(tree)
        print(f"{one.part} | {one.name} | {by or 'NOT CAUGHT'}", flush=True)
        return by

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.jobs) as pool:
        for number in range(asked.jobs):
            (Path(folder) / str(number)).mkdir()
            trees.put(_copy(Path(folder) / str(number), asked.tests))
        found = list(pool.map(judge, chosen))
    print("\n| part | mistakes | caught |\n|---|--:|--:|")
    for part in dict.fromkeys(one.part for one in chosen):
        results = [by for one, by in zip(chosen, found, strict=True) if one.part == part]
        print(f"| {part} | {len(results)} | {sum(map(bool, results))} |")
    sys.exit(not all(found))


if __name__ == "__main__":
    main()
