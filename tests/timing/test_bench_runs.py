"""`pytest bench/` itself, at sizes that say nothing of speed: it times, it refuses, it survives Ctrl-C."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report.load import benchmark

ROOT = Path(__file__).resolve().parents[2]


def pytest_bench(tmp_path: Path, *arguments: str, spoil: str = "nothing") -> tuple[int, str, Path]:
    """(exit status, output, JSON file) of a run in a process of its own, Triton not interpreted."""
    results = tmp_path / "results.json"
    environment = {**os.environ, "SPOIL": spoil, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests/timing")))}
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-p", "spoilers", "-p", "no:cacheprovider", "-q", "--smoke"]
    command += [f"--benchmark-json={results}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout + done.stderr, results


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A few rows of every suite."""
    chosen = "machine or norm or (test_step and Baseline)"
    return pytest_bench(tmp_path_factory.mktemp("smoke"), "bench/", "-k", chosen)


def test_it_times_by_itself(smoke):
    status, output, results = smoke
    assert status == 0, output
    found = benchmark(results)
    assert {row["extra_info"]["suite"] for row in found.rows} == {"kernels", "experiments", "machine"}
    assert all(row["stats"]["rounds"] >= 2 and row["stats"]["min"] > 0 for row in found.rows)
    assert "left out; `pytest bench/ --full` runs it" in output


def test_a_row_says_what_its_time_is(smoke):
    rows = benchmark(smoke[2]).suite("kernels")
    assert {row["implementation"] for row in rows} >= {"torch", "reference", "eager PyTorch", "F.rms_norm"}
    assert {row["direction"] for row in rows} == {"forward", "backward", "both"}
    for row in rows:
        assert row["kind"] in ("CPU time", "GPU time")
        assert row["p20"] <= row["median"] <= row["p80"]
        assert row["gbs"] == pytest.approx(row["bytes"] / row["median"] / 1e9)
        assert row["checked"]


def test_what_is_absent_has_a_reason(smoke):
    without = {row["implementation"]: row["reason"] for row in benchmark(smoke[2]).run["without"]}
    if benchmark(smoke[2]).kind == "CPU time":
        assert "interpreter" in without["triton"]
    assert all(len(reason) > 10 for reason in without.values())


def test_a_step_is_held_against_baseline(smoke):
    rows = benchmark(smoke[2]).suite("experiments")
    ours = next(row for row in rows if row["experiment"] == "Baseline" and row["implementation"] in ("torch", "triton"))
    assert ours["ratio"] == 1.0
    assert ours["tokens_per_second"] == pytest.approx(34 / ours["median"])
    assert ours["kept_bytes"] > 0


def test_a_wrong_gradient_gets_no_time(tmp_path):
    """1.01 times a gradient, in the type that steps use: the row is refused and the run fails."""
    status, output, results = pytest_bench(
        tmp_path, "bench/test_kernels.py", "-k", "residual_norm and both", spoil="gradient"
    )
    assert status == 1, output
    found = benchmark(results)
    timed = {row["implementation"] for row in found.suite("kernels")}
    assert "reference" in timed
    assert "torch" not in timed
    reasons = [row["reason"] for row in found.run["without"] if row["implementation"] == "torch"]
    assert reasons
    assert all("refused" in reason and "dgain" in reason for reason in reasons)


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    status, output, results = pytest_bench(tmp_path, "bench/test_kernels.py", "-k", "residual_norm", spoil="interrupt")
    assert status == 2, output
    rows = json.loads(results.read_text())["benchmarks"]
    assert len(rows) == 2
    assert all(row["stats"]["data"] for row in rows)


def test_benchmarks_can_still_be_disabled(tmp_path):
    chosen = ("-k", "F.rms_norm", "--benchmark-disable")
    status, output, results = pytest_bench(tmp_path, "bench/test_kernels.py", *chosen)
    assert status == 0, output
    assert " passed" in output
    assert not results.exists() or not results.read_text()


def test_a_plain_run_leaves_the_long_ones_out_and_k_portable_asks_for_them():
    def collected(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "bench/test_portable.py", "--collect-only", "-q", *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "::test_portable_memory" not in collected()
    assert "::test_portable_memory" in collected("-k", "portable")
