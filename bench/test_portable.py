"""One training step through `torch`, eager PyTorch and two libraries: `pytest bench/ -k portable`.

Prints a table of ratios with their spreads, memory and what was chosen. All in one process and in turn, so that a
ratio's two sides met the same machine; no speed is printed of a step whose loss is wrong.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import kernels
from bench import machine, steps
from bench import portable_step as bench
from bench.baselines import LIBRARIES
from bench.portable_step import BF16, EAGER, FP32

# on a busy machine a step of two threads takes ten times its time
pytestmark = pytest.mark.timeout(3600)
ROOT = Path(__file__).resolve().parents[1]
BASELINE_REPETITIONS, LIBRARY_REPETITIONS, REPETITIONS = 5, 3, 2


DISTINCT = {name: alike for name, alike in steps.distinct(precision="bf16").items() if name != "Best"}


@pytest.fixture(scope="session")
def described(report) -> None:
    torch.set_num_threads(bench.THREADS)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kinds = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    report += [
        f"processor: {machine.processor()} ({' '.join(kinds)}); torch {torch.__version__}, {bench.THREADS} threads",
        f"step: forward, backward, AdamW(fused); {bench.SIZES}, dropout on",
        kernels.portable.describe_products(),
        "attention: own chunks of heads (the library's fused CPU attention takes no dropout)",
    ]


def check(experiment: str) -> None:
    for name in (BF16, FP32):
        problem = steps.loss_problem(
            experiment=experiment, sizes=bench.SIZES, device=bench.CPU, **bench.arguments(name)
        )
        assert not problem, f"{name}: {problem}"


def line(name: str, seconds: pd.DataFrame, label: str = "") -> str:
    ratios, median = seconds[EAGER] / seconds[name], seconds[name].median()
    return (
        f"{label or name:45s} {median:7.3f} s {bench.SIZES.tokens / median:8.0f} tokens/s   "
        f"{ratios.median():5.2f} x eager [{ratios.min():.2f} .. {ratios.max():.2f}]"
    )


def installed() -> list[str]:
    return [name for name in LIBRARIES if importlib.util.find_spec(steps.library_of(name))]


def test_portable_baseline(described, report, benchmark):
    check("Baseline")
    runs = {name: bench.training_step(name, "Baseline") for name in (EAGER, BF16, FP32)}
    times = bench.interleaved(runs, BASELINE_REPETITIONS)
    report += ["", f"Baseline, median of {BASELINE_REPETITIONS} interleaved repetitions [spread of the ratio]"]
    report += [line(name, times) for name in runs]
    benchmark.pedantic(runs[BF16], rounds=3, iterations=1)
    gains = times.rdiv(times[EAGER], axis=0).median().to_dict()
    benchmark.extra_info["times as fast as eager"] = gains
    if kernels.portable.product_dtype() == torch.bfloat16:
        assert gains[BF16] >= 2.2, gains
    assert gains[FP32] >= 1.3, gains


def test_portable_libraries(described, report):
    """Ahead of each library in its best setting."""
    if not installed():
        report += ["", "libraries: not installed; pip install -e '.[bench]' adds them"]
        pytest.skip("neither transformers nor x-transformers is installed")
    names = [BF16, EAGER, *installed()]
    times = bench.interleaved({name: bench.training_step(name, "Baseline") for name in names}, LIBRARY_REPETITIONS)
    report += [
        "",
        f"libraries at Baseline's widths and depths, median of {LIBRARY_REPETITIONS} interleaved repetitions",
    ]
    report += [line(name, times) for name in names]
    gains = times[installed()].div(times[BF16], axis=0).median()
    closest = gains.idxmin()
    report.append(f"torch in bf16 is {gains[closest]:.2f} times as fast as the best of them, {closest}")
    assert gains[closest] > 1, gains.to_dict()


@pytest.mark.parametrize("experiment", [name for name in DISTINCT if name != "Baseline"])
def test_portable_experiment(experiment, described, report):
    check(experiment)
    runs = {name: bench.training_step(name, experiment) for name in (EAGER, BF16)}
    times = bench.interleaved(runs, REPETITIONS)
    if not any(text.startswith("every experiment") for text in report):
        report += ["", f"every experiment but Best, torch in bf16, median of {REPETITIONS} interleaved repetitions"]
    alike = DISTINCT[experiment][1:]
    report.append(line(BF16, times, experiment) + (f"   also {', '.join(alike)}" if alike else ""))
    gain = (times[EAGER] / times[BF16]).median()
    if kernels.portable.product_dtype() == torch.bfloat16:
        assert gain >= 1.8, gain


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_portable_memory(described, report):
    peaks = {}
    for name in (EAGER, BF16, FP32):
        command = [sys.executable, "-m", "bench.portable_step", "memory", name]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        peaks[name] = int(done.stdout)
    report += ["", "Baseline, peak resident memory above parameters, gradients and optimizer state, one process each"]
    report += [
        f"{name:45s} {peak / 2**20:6.0f} MiB   {peak / peaks[EAGER]:.2f} x eager" for name, peak in peaks.items()
    ]
    assert peaks[BF16] <= peaks[EAGER] / 2, peaks
