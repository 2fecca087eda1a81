"""A GPU owner's first hour: everything that has to hold on this device, in order, and one page of what did.

    python -m bench.gpu [--out gpu_report] [--only PART,...] [--again] [--quick] [--projection FILE.json ...]

Kernel tests on the device, the self-test, the tuner, `pytest bench/`, 20 steps of Baseline through `deepspeed`.
A part that fails does not stop the others. The page is written anew after each; a part that held on this device and
these sources is not run again unless --again says so, so an interrupted hour goes on. Without a GPU what can run does,
on the CPU, and says so. Exit status 1 where a part failed, 130 after Ctrl-C.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench import machine, pages, self_test
from bench.beside_projection import beside_the_projection, projected_here
from bench.projection import Projection
from bench.report.load import ReportError, benchmark

ROOT = Path(__file__).resolve().parents[1]
HOLDS, FAILED, SKIPPED, INTERRUPTED = "holds", "failed", "skipped", "interrupted"
STEPS, CPU_STEPS = 20, 3
# row-wise kernels: a minute in the interpreter, where all of them take a quarter of an hour on two cores
INTERPRETED_TESTS = ("tests/kernels/test_residual_norm.py", "tests/kernels/test_embedding.py")
QUICK_TESTS = ("tests/kernels/test_residual_norm.py::test_refusals",)


@dataclass
class Outcome:
    """What became of a part. where: "device" or what took its place; lines: what the page says of it."""

    status: str
    where: str
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    command: str = ""
    fingerprint: str = ""

    @classmethod
    def of(cls, holds: bool, where: str, lines: list[str], command: Sequence[str]) -> "Outcome":
        return cls(HOLDS if holds else FAILED, where, lines, command=" ".join(command))


@dataclass(frozen=True)
class Context:
    """out: the folder of logs and of the page. quick: tiny shapes everywhere, to try the command itself."""

    out: Path
    cuda: bool
    quick: bool

    @property
    def where(self) -> str:
        return machine.device_name() if self.cuda else f"CPU ({machine.processor()})"

    def run(self, key: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        """(exit status, output) of a command, shown as it comes and kept in KEY.log; Ctrl-C ends it first."""
        tools = Path(sys.executable).parent
        path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        given = {**os.environ, "PATH": path, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **(environment or {})}
        with (self.out / f"{key}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            kept = []
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    kept.append(line)
                    print(line, end="", flush=True)
                return process.wait(), "".join(kept)
            except KeyboardInterrupt:
                # its own handling of Ctrl-C keeps what was measured, and may take a while to say so
                for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                    os.killpg(process.pid, how)
                    try:
                        log.write(process.communicate(timeout=60)[0])
                        break
                    except subprocess.TimeoutExpired:
                        continue
                raise


def _last(text: str, count: int = 1) -> list[str]:
    return [line for line in text.strip().splitlines() if line.strip()][-count:]


# ---------------------------------------------------------------- the parts


def kernel_tests(given: Context) -> Outcome:
    tests = ["tests/kernels"] if given.cuda else list(QUICK_TESTS if given.quick else INTERPRETED_TESTS)
    environment = {"KERNEL_TEST_DEVICE": "cuda"} if given.cuda else {}
    marks = ["-m", "slow or not slow"] if given.cuda else []
    command = [sys.executable, "-m", "pytest", *tests, *marks, "-q", "-p", "no:cacheprovider"]
    status, output = given.run("kernel_tests", command, environment)
    wrong = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    lines = [*_last(output), *wrong[:20]]
    where = given.where
    if not given.cuda:
        where = (
            f"Triton's interpreter on the CPU, float32 and float16, {' '.join(tests)} only: no kernel ran on a device"
        )
    return Outcome.of(status == 0, where, lines, command)


def kernels_self_test(given: Context) -> Outcome:
    """Every operator in every dtype in a process of its own kind: under the interpreter where there is no GPU."""
    environment = {} if given.cuda else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.self_test", *(["--quick"] if given.quick else [])]
    status, output = given.run("self_test", command, environment)
    lines = [line for line in output.splitlines() if line.startswith(self_test.MARK)]
    where = given.where if given.cuda else "Triton's interpreter on the CPU, float32: no kernel ran on a device"
    return Outcome.of(status == 0, where, [x.removeprefix(self_test.MARK) for x in lines], command)


def tuner(given: Context) -> Outcome:
    if not given.cuda:
        return Outcome(SKIPPED, given.where, ["tiles are measured on the GPU that they are for; there is none"])
    command = [sys.executable, "-m", "kernels.tune"]
    status, output = given.run("tuner", command)
    changed = [line for line in output.splitlines() if " -> " in line or line.startswith("wrote")]
    return Outcome.of(status == 0, given.where, changed or _last(output, 3), command)


def benchmarks(given: Context) -> Outcome:
    results = given.out / "bench.json"
    command = [sys.executable, "-m", "pytest", "bench/", "-q", "-p", "no:cacheprovider", f"--benchmark-json={results}"]
    command += ["--smoke"] if given.quick else []
    status, output = given.run("bench", command)
    lines = _last(output)
    try:
        measured = benchmark(results)
    except ReportError as error:
        return Outcome.of(False, given.where, [*lines, str(error)], command)
    lines.append(f"{len(measured.rows)} benchmarks in {results.name}; `python -m bench.report {results}` draws them")
    lines += [
        " ".join(str(value) for value in row.values())
        for row in measured.run.get("without", [])
        if "refused" in row["reason"]
    ]
    where = given.where + (", tiny shapes: its times say nothing" if given.quick else "")
    return Outcome.of(status == 0, where, lines, command)


def training(given: Context) -> Outcome:
    run = given.out / "run"
    shutil.rmtree(run, ignore_errors=True)
    steps = STEPS if given.cuda else 1 if given.quick else CPU_STEPS
    # the excerpt needs no network and no preparation; the paper's budget has its shapes
    recipe = ["--recipe", "paper", "--source", "excerpt"] if given.cuda else ["--recipe", "demo"]
    command = ["deepspeed", "train.py", "--exp", "Baseline", *recipe, "--steps", str(steps), "--run-dir", str(run)]
    status, output = given.run("training", command)
    rows = (
        [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        if (run / "metrics.jsonl").exists()
        else []
    )
    lines = _last(output, 2)
    if rows:
        seconds = sorted(row["seconds"] for row in rows[len(rows) // 2 :])
        lines = [
            f"{len(rows)} of {steps} steps, loss {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}",
            f"{seconds[len(seconds) // 2]:.3f} s a step (median of the later half), "
            f"{rows[-1]['tokens_per_second']:.0f} tokens/s in the last",
        ]
    falls = len(rows) == steps and (steps == 1 or rows[-1]["loss"] < rows[0]["loss"])
    if rows and not falls:
        lines.append("expected every step and a loss that falls")
    where = (
        given.where
        if given.cuda
        else f"{given.where}, {steps} steps of the demo recipe in place of {STEPS} of the paper's"
    )
    return Outcome.of(status == 0 and falls, where, lines, command)


PARTS: dict[str, tuple[str, Callable[[Context], Outcome]]] = {
    "tests": ("The kernel tests", kernel_tests),
    "self-test": ("The self-test", kernels_self_test),
    "tuner": ("The tuner", tuner),
    "bench": ("`pytest bench/`", benchmarks),
    "training": ("Baseline through deepspeed", training),
}


# ---------------------------------------------------------------- the hour


def fingerprint(quick: bool) -> str:
    """Sources, device and versions: where it is the same, a part that held need not run again."""
    from kernels.selftest import fingerprint as kernel_fingerprint

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{commit} | {kernel_fingerprint(machine.device())} | quick {quick}"


def write_page(given: Context, outcomes: Mapping[str, Outcome], found: Sequence[Projection]) -> None:
    parts = [
        {"title": title, **asdict(outcomes.get(key) or Outcome("not run yet", ""))} for key, (title, _) in PARTS.items()
    ]
    for part in parts:
        part |= {"first": (part["lines"] or [""])[0], "took": part["seconds"] or None}
    compared, nothing = beside_the_projection(given.out / "bench.json", given.cuda, found)
    text = pages.render(
        Path(__file__).with_name("gpu.md"),
        name=torch.cuda.get_device_name() if given.cuda else "a machine without a GPU",
        where=given.where,
        cuda=given.cuda,
        versions=", ".join(f"{name} {version}" for name, version in machine.versions().items()),
        now=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        parts=parts,
        held=[part["title"] for part in parts if part["status"] == HOLDS],
        wrong=[f"{part['title']} ({part['status']})" for part in parts if part["status"] in (FAILED, INTERRUPTED)],
        skipped=[f"{part['title']}: {part['first']}" for part in parts if part["status"] == SKIPPED],
        compared=compared,
        nothing=nothing,
    )
    pages.write(given.out, "page", text)


def load_state(path: Path) -> dict[str, Outcome]:
    """Outcomes of an earlier call; none where the file is damaged."""
    try:
        return {key: Outcome(**value) for key, value in json.loads(path.read_text()).items() if key in PARTS}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_report"), metavar="DIR", help="page and logs (gpu_report)"
    )
    parser.add_argument("--only", default="", metavar="PARTS", help=f"of {','.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="run parts again that held here before")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one step: does the command itself work?")
    parser.add_argument(
        "--projection", nargs="+", type=Path, default=[], metavar="FILE", help="instead of bench.projection's"
    )
    given = parser.parse_args(arguments)
    given.only = given.only.split(",") if given.only else list(PARTS)
    unknown = [name for name in given.only if name not in PARTS]
    if unknown:
        parser.error(f"--only: expected parts among {', '.join(PARTS)}, got {unknown[0]!r}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    context = Context(given.out.resolve(), torch.cuda.is_available(), given.quick)
    context.out.mkdir(parents=True, exist_ok=True)
    state, mark = context.out / "state.json", fingerprint(given.quick)
    outcomes = load_state(state)
    try:
        found = projected_here(given.projection)
    except ReportError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2

    def keep() -> None:
        state.write_text(json.dumps({key: asdict(one) for key, one in outcomes.items()}, indent=1))
        write_page(context, outcomes, found)

    for key in (name for name in PARTS if name in given.only):
        title, part = PARTS[key]
        before = outcomes.get(key)
        if before is not None and before.status == HOLDS and before.fingerprint == mark and not given.again:
            print(f"== {title}: held here before, not run again (--again does)")
            continue
        print(f"== {title}", flush=True)
        start = time.perf_counter()
        try:
            outcome = part(context)
        except KeyboardInterrupt:
            outcomes[key] = Outcome(INTERRUPTED, context.where, ["Ctrl-C"], time.perf_counter() - start)
            keep()
            print(f"interrupted; the page is {context.out / 'page.md'}, the same command goes on")
            return 130
        except Exception as error:  # a part that cannot even start is a result of the hour, not its end
            outcome = Outcome(FAILED, context.where, [f"{type(error).__name__}: {error}"])
        outcome.seconds, outcome.fingerprint = time.perf_counter() - start, mark
        outcomes[key] = outcome
        keep()
    keep()
    for key, one in outcomes.items():
        print(f"{PARTS[key][0]}: {one.status}; {one.where}")
    print(f"the page: {context.out / 'page.md'}")
    return int(any(one.status in (FAILED, INTERRUPTED) for one in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
