"""One training step of each experiment, and of models at Baseline's widths and depths: forward, backward, optimiser.

A step and Baseline's are timed in turn, so that the ratio's two sides met the same machine. The loss is compared with
eager PyTorch's before anything is timed, dropout off; the libraries' models are others of the same widths and depths,
so theirs is not.
"""

import importlib.util
import statistics

import pytest
import torch

from bench import machine, steps, timing
from bench.test_kernels import DEFAULT
from kernels.dispatch import ImplementationError

pytestmark = pytest.mark.timeout(3600)
# libraries in the settings that docs/portable.md found fastest
COMPARED = (steps.EAGER, "Hugging Face T5, eager, bfloat16", "x-transformers, autocast")
ROUNDS = {"smoke": 2, "default": 4, "full": 10}
# 686M parameters: 14 GB of states, no step of a CPU's minutes
LEFT_OUT = {"Best": "686M parameters do not fit these machines' time"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from bench.conftest import RESULTS

    config = metafunc.config
    full, smoke, results = config.getoption("--full"), config.getoption("--smoke"), config.stash[RESULTS]
    if "experiment" in metafunc.fixturenames:
        every = steps.distinct(**({"precision": "bf16"} if machine.kind() == machine.CPU_TIME else {}))
        chosen = list(every) if full else list(DEFAULT[:2] if smoke else DEFAULT)
        if machine.kind() == machine.CPU_TIME:
            chosen = [name for name in chosen if name not in LEFT_OUT]
        if len(chosen) < len(every):
            results.left_out.append(
                f"steps of {len(every) - len(chosen)} of {len(every)} distinct experiments; timed: {', '.join(chosen)}"
                + (f" ({'; '.join(f'{n} never on a CPU: {why}' for n, why in LEFT_OUT.items())})" if full else "")
            )
        metafunc.parametrize(("experiment", "alike"), [pytest.param(n, every.get(n, [n])[1:], id=n) for n in chosen])
    if "compared" in metafunc.fixturenames:
        chosen = []
        for name in steps.baseline_names():
            module = steps.library_of(name)
            if module is not None and importlib.util.find_spec(module) is None:
                results.absent("not installed; pip install -e '.[bench]'", experiment="Baseline", implementation=name)
            elif full or name == steps.EAGER or (not smoke and (name in COMPARED or torch.cuda.is_available())):
                chosen.append(name)
        metafunc.parametrize("compared", chosen)


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    return ROUNDS[
        "smoke" if pytestconfig.getoption("--smoke") else "full" if pytestconfig.getoption("--full") else "default"
    ]


@pytest.fixture(scope="session")
def baseline(sizes) -> steps.Step:
    """Baseline's step by our implementation, warmed up."""
    step = steps.Step(steps.ours(), "Baseline", sizes)
    step()
    return step


def measure(benchmark, results, sizes, rounds, baseline: steps.Step, name: str, experiment: str, **info) -> None:
    if name in (*steps.OURS, steps.EAGER) and name != steps.EAGER:
        problem = steps.loss_problem(name, experiment, sizes)
        if problem:
            results.absent(f"refused: {problem}", experiment=experiment, implementation=name)
            pytest.fail(f"{experiment} by {name}: {problem}", pytrace=False)
    same = name == steps.ours() and experiment == "Baseline"
    try:
        step = baseline if same else steps.Step(name, experiment, sizes)
        step()
    except (ImplementationError, torch.OutOfMemoryError) as error:
        results.absent(str(error).splitlines()[0], experiment=experiment, implementation=name)
        pytest.skip(str(error).splitlines()[0])
    if benchmark.disabled:
        benchmark.pedantic(step)
        return
    seconds, ratios = [], []
    for _ in range(rounds):
        other = steps.timed(baseline)
        seconds.append(steps.timed(step))
        ratios.append(1.0 if same else seconds[-1] / other)
    benchmark.group = f"training step, {machine.kind()}, {sizes.label}"
    timing.record(benchmark, seconds)
    samples = timing.Samples(seconds, 0.0, step.peak_bytes())
    row = {
        "experiment": experiment,
        "implementation": name,
        **samples.quantiles(),
        "tokens_per_second": sizes.tokens / samples.median,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "kept_bytes": step.kept_bytes(),
        "peak_bytes": samples.peak,
    }
    benchmark.extra_info.update(
        row, suite="experiments", kind=machine.kind(), sizes=str(sizes), label=sizes.label, **info
    )


def test_step(experiment, alike, benchmark, results, sizes, rounds, baseline):
    measure(benchmark, results, sizes, rounds, baseline, steps.ours(), experiment, alike=alike)


def test_comparison_step(compared, benchmark, results, sizes, rounds, baseline):
    measure(benchmark, results, sizes, rounds, baseline, compared, "Baseline")
