"""Every operator at the experiments' shapes, by every implementation that runs here: forward, backward, both.

Correctness first: outputs and gradients are compared with the float64 formula (bench.checking), and what disagrees gets
no time. Ours then fails the run; a baseline is listed with the reason.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import kernel_baselines, kernel_calls, machine, timing
from bench.checking import Oracle
from bench.kernel_baselines import Implementation
from bench.kernel_calls import DIRECTIONS, Call
from bench.results import Results
from kernels.dispatch import ImplementationError
from kernels.portable import product_dtype
from march import experiments as catalog

# one of each kind of change: heads, feedforward, bank, joined attention, odd widths
DEFAULT = ("Baseline", "GELUGatedLinearUnit", "Database", "UnifiedAttention", "BigHeads")
CHECKED_SEQUENCES = 2
SECONDS = {"smoke": 0.0, "default": 0.12, "full": 0.5}


def dtype_of(call: Call, experiments: dict[str, int]) -> torch.dtype:
    """What the operator meets in a training step here. On a CPU a bf16 configuration multiplies in the faster of
    bfloat16 and float32, and looks up in its float32 tables."""
    own = {"bf16": torch.bfloat16, "fp32": torch.float32}[catalog.configuration(next(iter(experiments))).precision]
    if machine.kind() == machine.GPU_TIME or own == torch.float32:
        return own
    return torch.float32 if call.operator == "embedding" else product_dtype()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" not in metafunc.fixturenames:
        return
    from bench.conftest import RESULTS, sizes_of

    config = metafunc.config
    full, results, sizes = config.getoption("--full"), config.stash[RESULTS], sizes_of(config)
    names = (
        [n for n in catalog.names() if not n.endswith("AsPublished")]
        if full
        else [DEFAULT[0]]
        if config.getoption("--smoke")
        else list(DEFAULT)
    )
    calls = kernel_calls.distinct(names, sizes)
    if not full:
        results.left_out.append(f"shapes of other experiments; timed: of {', '.join(names)}")
    parameters, slow = [], set()
    for call, experiments in calls:
        for one in kernel_baselines.implementations(call.operator):
            if one.slow and not full:
                slow.add(one.name)
                continue
            try:
                one.load()
            except (ImplementationError, ImportError) as error:
                results.absent(str(error), operator=call.operator, implementation=one.name)
                continue
            for direction in DIRECTIONS:
                name = f"{call.operator} {kernel_calls.shape_name(call)}-{one.name}-{direction}"
                parameters.append(pytest.param(call, experiments, one, direction, id=name))
    if slow:
        results.left_out.append(f"{', '.join(sorted(slow))}, which compile for seconds at every shape")
    metafunc.parametrize(("call", "experiments", "implementation", "direction"), parameters)


class Checks:
    """Verdicts of the session, each found once; one call's oracles are kept, since its implementations follow."""

    def __init__(self) -> None:
        self.oracles: dict[tuple, Oracle] = {}
        self.verdicts: dict[tuple, str] = {}

    def oracle(self, call: Call, dtype: torch.dtype, dropout: bool) -> Oracle:
        key = (repr(call), dtype, dropout)
        if key not in self.oracles:
            self.oracles = {k: v for k, v in self.oracles.items() if k[0] == key[0]}
            few = kernel_calls.with_batch(call, min(CHECKED_SEQUENCES, call.dims["batch"]))
            device = machine.device()
            inputs = few.inputs(device=device)
            self.oracles[key] = Oracle(call.operator, inputs, kernel_calls.arguments(few, device, dropout), dtype)
        return self.oracles[key]

    def verdict(self, call: Call, implementation: Implementation, dtype: torch.dtype) -> str:
        """ "" where it may be timed, else why not."""
        key = (repr(call), implementation.name, dtype)
        if key not in self.verdicts:
            try:
                function = implementation.load()
                problems = self.oracle(call, dtype, implementation.contract_dropout).problems(function)
                if not implementation.contract_dropout and not problems:
                    Prepared(kernel_calls.with_batch(call, 1), function, dtype).function()  # it may take no dropout
                self.verdicts[key] = (
                    "refused, it disagrees with the formula: " + "; ".join(problems) if problems else ""
                )
            except Exception as error:  # whatever a library or a compiler raises is the reason
                text = str(error).strip().splitlines() or [type(error).__name__]
                self.verdicts[key] = f"does not do this: {text[0]}"
        return self.verdicts[key]


@pytest.fixture(scope="session")
def checks() -> Checks:
    return Checks()


class Prepared:
    """One call of one implementation on fresh tensors: functions to time."""

    def __init__(self, call: Call, function: Callable, dtype: torch.dtype):
        device = machine.device()
        inputs = call.inputs(dtype=dtype, device=device)
        self.leaves = {
            n: x.requires_grad_() if x is not None and x.dtype.is_floating_point else x for n, x in inputs.items()
        }
        self.wanted = [x for x in self.leaves.values() if x is not None and x.requires_grad]
        self.function = functools.partial(function, **self.leaves, **kernel_calls.arguments(call, device))

    def outputs(self) -> tuple[Tensor, ...]:
        out = self.function()
        return tuple(x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad)

    def run(self, direction: str) -> Callable[[], Any]:
        """What is timed. Forward is training's: it keeps what backward needs."""
        if direction == "forward":
            return self.function
        kept = self.outputs()
        upstream = [torch.ones_like(x) for x in kept]
        if direction == "backward":
            return lambda: torch.autograd.grad(kept, self.wanted, upstream, retain_graph=True)
        return lambda: torch.autograd.grad(self.outputs(), self.wanted, upstream)

    def kept_bytes(self) -> int:
        """Bytes that forward keeps for backward beyond the operator's inputs, each storage once."""
        return timing.kept_bytes(self.function, [x for x in self.leaves.values() if x is not None])


def share_of_peak(flops: int, size: int, seconds: float, dtype: torch.dtype) -> float | None:
    """The shortest time that the data sheet allows over `seconds`; None for a device that is not listed."""
    device = machine.listed()
    if device is None:
        return None
    peak = device.peak("fp32" if dtype == torch.float32 else "bf16")
    return max(flops / peak, size / device.bandwidth) / seconds


def time_call(
    benchmark, call: Call, implementation: Implementation, direction: str, dtype: torch.dtype, seconds: float
):
    """Times one direction and records it; returns its row."""
    prepared = Prepared(call, implementation.load(), dtype)
    kept = prepared.kept_bytes()
    samples = timing.measure(prepared.run(direction), seconds)
    timing.record(benchmark, samples.seconds)
    flops, size = kernel_calls.flops(call, direction), kernel_calls.least_bytes(call, direction, dtype)
    return {
        "operator": call.operator,
        "shape": kernel_calls.shape_name(call),
        "implementation": implementation.name,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "note": implementation.note,
        "flops": flops,
        "bytes": size,
        **samples.quantiles(),
        "tflops": flops / samples.median / 1e12 if flops else None,
        "gbs": size / samples.median / 1e9,
        "share_of_peak": share_of_peak(flops, size, samples.median, dtype),
        "first_call": samples.first,
        "peak_bytes": samples.peak,
        "kept_bytes": kept,
        "checked": f"{min(CHECKED_SEQUENCES, call.dims['batch'])} sequences, "
        + ("with dropout" if implementation.contract_dropout else "without dropout, its masks are its own"),
    }


def test_kernel(benchmark, call, experiments, implementation, direction, checks, results: Results, sizes, request):
    config, dtype = request.config, dtype_of(call, experiments)
    what = {"operator": call.operator, "shape": kernel_calls.shape_name(call), "implementation": implementation.name}
    reason = checks.verdict(call, implementation, dtype)
    if reason:
        results.absent(reason, **what)
        if implementation.ours:
            pytest.fail(f"{what}: {reason}", pytrace=False)
        pytest.skip(reason)
    benchmark.group = f"{call.operator} {what['shape']}, {direction}, {machine.kind()}"
    if benchmark.disabled:
        benchmark.pedantic(Prepared(call, implementation.load(), dtype).run(direction))
        return
    budget = SECONDS["smoke" if config.getoption("--smoke") else "full" if config.getoption("--full") else "default"]
    try:
        row = time_call(benchmark, call, implementation, direction, dtype, budget)
    except Exception as error:
        reason = f"{type(error).__name__} while it was timed: {(str(error).splitlines() or [''])[0]}"
        results.absent(reason, **what)
        if implementation.ours and not isinstance(error, torch.OutOfMemoryError):
            raise
        pytest.skip(reason)
    benchmark.extra_info.update(row, suite="kernels", kind=machine.kind(), sizes=sizes.label, experiments=experiments)
