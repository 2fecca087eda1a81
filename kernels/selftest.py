"""The self-test on a CUDA device: every program that will run is compared with `reference` before it is used.

The kernels are tested in Triton's interpreter and compiled for their targets without a device, so a device may be the
first that ever runs them. What is compared is an operator's call, forward and backward: outputs and gradients with the
float64 formula. Given a training step, the calls are the step's own, recorded on meta tensors: batch, lengths and
vocabulary are cut as far as the compiled programs stay the same, and a program of the step that no call launched
refuses the run. Without one, an operator is checked at its first use, at one shape. A pass is remembered in a file, by
device, versions, sources, tile tables and programs; a disagreement raises and is never remembered.

Checks run in a thread of their own: what the caller's thread is inside of (inference_mode, no_grad, autocast, fake
tensors, torch.func, a default device) does not reach it.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import reference
from kernels.calls import Call, cases_of, fused_function, generic_calls, results, uncovered
from kernels.operators import OPERATORS

T = TypeVar("T")

# of the formula's own error in the dtype, and absolutely, relative to the largest value; a wrong kernel is off by 1e-2
# or more. Wider than the tests' 2 and 1e-5: one shape is drawn, and refusing a right kernel stops a run.
ERROR_FACTOR, ERROR_FLOOR = 4.0, 1e-4

# ---------------------------------------------------------------- comparing


def evaluate(
    operator: str, function: Callable, inputs: Mapping[str, Any], kwargs: Mapping[str, Any], dtype: torch.dtype,
    call: Call | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Outputs and gradients by name, in float64 on the CPU. call: which of them, and in what layouts; without, all."""

    def leaf(name: str, x: Any) -> Any:
        if x is None or not x.dtype.is_floating_point:
            return x
        layout = call.tensors[name] if call else None
        return x.detach().to(dtype).requires_grad_(layout.differentiable if layout else True)

    leaves = {n: leaf(n, x) for n, x in inputs.items()}
    named = results(operator, function, leaves, kwargs, call.upstream if call else ())
    return {n: x.detach().double().cpu() for n, x in named.items()}


def disagreements(call: Call, function: Callable, device: torch.device) -> list[str]:
    """What of `function`'s outputs and gradients is further from the float64 formula than the call's dtype explains."""
    inputs, kwargs = call.draw(device)
    formula = getattr(reference, call.operator)
    own = {n: x for n, x in kwargs.items() if n not in ("logits", "recompute")}  # how, not what
    oracle = evaluate(call.operator, formula, inputs, own, torch.float64, call)
    plain = evaluate(call.operator, formula, inputs, own, call.dtype, call)
    got = evaluate(call.operator, function, inputs, kwargs, call.dtype, call)
    problems = []
    for name, expected in oracle.items():
        scale = max(expected.abs().max().item(), 1e-30) if expected.numel() else 1.0
        error, own_error = (
            (x[name] - expected).abs().max().item() / scale if expected.numel() else 0.0 for x in (got, plain)
        )
        budget = ERROR_FACTOR * own_error + ERROR_FLOOR
        if not error <= budget:
            problems.append(f"{name}: error {error:.1e}, expected at most {budget:.1e}")
    return problems


# ---------------------------------------------------------------- memory


def cache_file() -> Path:
    """Where passed checks are remembered: $MARCH_CACHE, or the user's cache directory."""
    root = os.environ.get("MARCH_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "march"
    return base / "self_test.json"


def _sources() -> str:
    """Hash of what decides the programs: the kernels' sources, the measured tiles, and a tile that is being tried."""
    from kernels.fused import measured

    digest = hashlib.sha256(json.dumps(measured.tried(), sort_keys=True).encode())
    for path in (*sorted(Path(__file__).parent.rglob("*.py")), *sorted(measured.DIRECTORY.glob("*.json"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(device: torch.device, *what: object) -> str:
    """What a pass is remembered by: device, versions, sources, tile tables and `what` was checked."""
    versions = [f"torch {torch.__version__}", f"cuda {torch.version.cuda}"]
    for package in ("triton", "flash-attn", "apex"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    where = device.type
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)} sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"
    return " | ".join((where, *versions, f"kernels {_sources()}", *map(str, what)))


def _remembered() -> dict[str, float]:
    try:
        data = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: Any) -> None:
    """Replaces the file whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(data, indent=1) + "\n")
    os.replace(file.name, path)


def _checked(key: str, device: torch.device, check: Callable[[], None], what: str) -> str:
    """Runs `check` unless it is remembered; "remembered" or "passed in N s"."""
    from kernels.dispatch import ImplementationError

    if key in _remembered():
        return "remembered"
    if _tracing():
        raise ImplementationError(
            f"{what}: expected kernels that passed the self-test, got their first use inside torch.compile or a CUDA "
            "graph's capture, where nothing can be compared; call kernels.self_test(impl, device, dtype) first"
        )
    start = time.perf_counter()
    _apart(check, device)
    seconds = time.perf_counter() - start
    # a directory that cannot be written costs the check at every start, nothing else
    with contextlib.suppress(OSError):
        write_json(cache_file(), _remembered() | {key: round(seconds, 3)})
    return f"passed in {seconds:.1f} s"


def _tracing() -> bool:
    """Whether torch.compile traces this thread, or its CUDA stream is captured."""
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or captured


def _apart(run: Callable[[], T], device: torch.device) -> T:
    """`run()` in a thread of its own, whose modes are torch's defaults; on `device` where it is a CUDA device."""

    def on_device() -> T:
        if device.type != "cuda":
            return run()
        with torch.cuda.device(device):
            return run()

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(on_device).result()


def _compare(call: Call, name: str, function: Callable, device: torch.device) -> None:
    from kernels.dispatch import ImplementationError

    problems = disagreements(call, function, device)
    if problems:
        raise ImplementationError(
            f"{call.operator}: impl={name!r} disagrees with the reference formula on {device} in {call.dtype} ("
            + "; ".join(problems)
            + f"); its kernel is wrong on this device: use impl={{{call.operator!r}: 'torch'}} and report it"
        )


def verify(operator: str, name: str, function: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """Checks `function` (implementation `name` of `operator`) on `device` unless a pass is remembered.

    Returns "remembered" or "passed in N s"; raises ImplementationError on disagreement, and where torch.compile or a
    CUDA graph's capture surrounds the first use.
    """
    calls = generic_calls(operator, dtype, library=name in OPERATORS[operator].libraries)

    def check() -> None:
        for call in calls:
            _compare(call, name, function, device)

    return _checked(fingerprint(device, operator, name, dtype), device, check, operator)


def verify_step(
    step: Callable[[], object], device: torch.device, run: Callable[[Call], None] | None = None
) -> tuple[str, list[Call]]:
    """Checks every program of fused kernels that `step`, which runs on meta tensors, would launch on `device`.

    Returns "remembered" or "passed in N s", and the calls that cover the step. run: what a call is checked by, in place
    of the comparison. Raises ImplementationError on disagreement, and where a program of the step was not launched.
    """
    from kernels.compile_only import architecture, watching
    from kernels.dispatch import ImplementationError

    cases, programs = _apart(lambda: cases_of(step, architecture(torch.empty(0, device=device))), device)

    def check() -> None:
        with watching() as launched:
            for call in cases:
                run(call) if run else _compare(call, "triton", fused_function(call.operator), device)
        if programs - launched:
            raise ImplementationError(uncovered(programs - launched))

    digest = hashlib.sha256("\n".join(sorted(programs)).encode()).hexdigest()[:16]
    return _checked(fingerprint(device, "step", digest), device, check, "step"), cases
