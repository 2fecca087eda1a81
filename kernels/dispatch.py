"""The one seam between an operator and its implementations.

`impl` is a name for every operator ("auto", "triton", "torch", "reference") or a mapping from operator to name, where
an operator that is not named takes "auto": {"attention": "flash_attn", "residual_norm": "apex"}. Nothing falls back
in silence: a choice that cannot run raises `ImplementationError` and says what to do.
"""

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch

from kernels.operators import OPERATORS as RECORDS

log = logging.getLogger("kernels")

Impl = str | Mapping[str, str]

OPERATORS = tuple(RECORDS)
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


class ImplementationError(RuntimeError):
    """The chosen implementation of an operator cannot run here."""


def validate(impl: Impl) -> Impl:
    """Checks the names in `impl`; ValueError names the choices."""
    chosen = dict.fromkeys(OPERATORS, impl) if isinstance(impl, str) else dict(impl)
    for operator, name in chosen.items():
        if operator not in OPERATORS:
            raise ValueError(f"impl: expected an operator among {', '.join(OPERATORS)}, got {operator!r}")
        choices = IMPLEMENTATIONS if isinstance(impl, str) else IMPLEMENTATIONS + RECORDS[operator].libraries
        if name not in choices:
            hint = ""
            for library_operator, record in RECORDS.items():
                if name in record.libraries:
                    hint = f"; {name} applies to one operator: use {library_operator}={name}"
            raise ValueError(f"impl: expected one of {', '.join(choices)} for {operator}, got {name!r}{hint}")
    return impl


def parse_impl(text: str) -> Impl:
    """`impl` from a command line: "torch", or "attention=flash_attn,residual_norm=apex"."""
    if "=" not in text:
        return validate(text)
    pairs = [part.split("=", 1) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"impl: expected a name or operator=name,operator=name, got {text!r}")
    chosen = {operator.strip(): name.strip() for operator, name in pairs}
    if len(chosen) < len(pairs):
        raise ValueError(f"impl: expected each operator once, got {text!r}; leave one out")
    return validate(chosen)


def triton_interpreted() -> bool:
    """True where Triton programs run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# not empty while something executes the compiled kernels on CPU tensors: kernels.emulator
_ON_CPU: list[bool] = []


@contextlib.contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Within it, impl='triton' takes CPU tensors."""
    _ON_CPU.append(True)
    try:
        yield
    finally:
        _ON_CPU.pop()
        for key in [key for key in _LOADED if key[1] == "triton" and key[2].type == "cpu"]:
            del _LOADED[key]


_SAID: set[str] = set()


def _automatic(operator: str, device_type: str) -> str:
    if device_type not in _SAID:
        _SAID.add(device_type)
        log.warning("kernels: impl='auto' on %s takes %s", device_type, describe("auto", torch.device(device_type)))
    return "triton" if device_type == "cuda" and fused_available(operator) else "torch"


def choice(operator: str, impl: Impl, device: torch.device) -> str:
    """Name of the implementation that `operator` takes on `device`."""
    name = impl if isinstance(impl, str) else impl.get(operator, "auto")
    return _automatic(operator, device.type) if name == "auto" else name


@cache
def fused_available(operator: str) -> bool:
    """True where the fused kernel of `operator` is part of this installation."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", RECORDS[operator].fused_module))


# by (name, operator): nothing of these has to be loaded or checked, so torch.compile may meet them first
_PLAIN: dict[tuple[str, str], Callable] = {
    (name, operator): getattr(record.module(name), operator)
    for name in ("torch", "reference")
    for operator, record in RECORDS.items()
}
# the others: filled by `_load`, read by `implementation`: a plain dictionary, which torch.compile can trace
_LOADED: dict[tuple[str, str, torch.device, torch.dtype], Callable] = {}


def _function(operator: str, name: str, device_type: str) -> Callable:
    if (name, operator) in _PLAIN:
        return _PLAIN[name, operator]
    if name == "triton":
        if not fused_available(operator):
            raise ImplementationError(
                f"{operator}: impl='triton' has no fused kernel here (triton installed: "
                f"{importlib.util.find_spec('triton') is not None}); use impl='torch'"
            )
        if device_type not in ("cuda", "meta") and not triton_interpreted() and not _ON_CPU:
            raise ImplementationError(
                f"{operator}: impl='triton' needs a CUDA device, got tensors on {device_type}; use impl='torch' or "
                "'auto', or set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
            )
    elif device_type != "cuda":
        raise ImplementationError(
            f"{operator}: impl={name!r} needs a CUDA device, got tensors on {device_type}; use impl='torch'"
        )
    return getattr(RECORDS[operator].module(name), operator)


def _is_checked(name: str, device: torch.device) -> bool:
    """Whether implementation `name` is compared with the reference before its first use on `device`."""
    return device.type == "cuda" and name not in ("torch", "reference")


def _load(operator: str, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Puts the function that is `name` for `operator` into _LOADED, or raises and says what to do.

    On a CUDA device a kernel is compared with `reference` before its first use (kernels.selftest).
    """
    if (operator, name, device, dtype) in _LOADED:
        return
    function = _function(operator, name, device.type)
    if _is_checked(name, device):
        from kernels import selftest

        if selftest.verify(operator, name, function, device, dtype) != "remembered":
            log.info("kernels: %s=%s agrees with the reference on %s in %s", operator, name, device, dtype)
    _LOADED[operator, name, device, dtype] = function


# torch.compile takes the answers of these two as constants instead of tracing imports: what
# torch.compiler.assume_constant_result sets, without importing the compiler, which takes 3 s
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]
_automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


# wrappers that `observed` installed, the innermost last
_OBSERVERS: list[Callable[[str, Callable], Callable]] = []


@contextlib.contextmanager
def observed(wrapper: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Within it, an operator calls `wrapper(operator, function)` in place of the function that computes it."""
    _OBSERVERS.append(wrapper)
    try:
        yield
    finally:
        _OBSERVERS.remove(wrapper)


def transformed() -> bool:
    """Whether grad, vjp, jvp or vmap of torch.func is at work; functionalisation is not one of them."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return torch._C._functorch.peek_interpreter_stack().key() != torch._C._functorch.TransformType.Functionalize


def implementation(operator: str, impl: Impl, device: torch.device, dtype: torch.dtype) -> Callable:
    """The function that computes `operator` on tensors of `device` and `dtype`; its keyword arguments are those of
    kernels.reference."""
    name = choice(operator, impl, device)
    if (name, operator) in _PLAIN:
        function = _PLAIN[name, operator]
    else:
        _load(operator, name, device, dtype)
        function = _LOADED[operator, name, device, dtype]
    if name == "torch" and not torch.compiler.is_compiling() and transformed():
        raise ImplementationError(
            f"{operator}: impl='torch' expected no torch.func transform of differentiation or vmap, got one; its "
            "backward is written out: use impl='reference' there, or torch.autograd.grad"
        )
    for wrapper in _OBSERVERS:
        function = wrapper(operator, function)
    return function


def require(impl: Impl, device: torch.device, operators: tuple[str, ...] = OPERATORS) -> None:
    """ImplementationError where what `impl` selects for `operators` cannot run on `device`; nothing is compared."""
    for operator in operators:
        _function(operator, choice(operator, impl, device), device.type)


def self_test(
    impl: Impl,
    device: torch.device,
    dtype: torch.dtype,
    operators: tuple[str, ...] = OPERATORS,
    step: Callable[[], object] | None = None,
) -> dict[str, str]:
    """Loads what `impl` selects for `operators` and runs its checks now, so that a run refuses before it starts.

    step: a training step on meta tensors, fused kernels chosen by name; then each program that it launches is compared
    at a call of the step's own, cut in size, and a fused operator that it does not call is left to its first use.
    Returns by operator which implementation it takes and, where that is a kernel, how its check went. Raises
    ImplementationError where one cannot run or disagrees with the reference.
    """
    if device == torch.device("cuda") and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    chosen = {operator: choice(operator, impl, device) for operator in operators}
    report = {}
    if step is not None and not triton_interpreted() and "triton" in chosen.values() and _is_checked("triton", device):
        from kernels import selftest

        outcome, cases = selftest.verify_step(step, device)
        for call in cases:
            if chosen.get(call.operator) == "triton":
                key = call.operator, "triton", device, call.dtype
                _LOADED[key] = _function(call.operator, "triton", device.type)
        report = {o: f"triton, step {outcome}" for o, name in chosen.items() if name == "triton"}
    for operator, name in chosen.items():
        before = time.perf_counter()
        if operator not in report:
            implementation(operator, impl, device, dtype)
            report[operator] = f"{name}, {time.perf_counter() - before:.1f} s"
    return report


def describe(impl: Impl, device: torch.device) -> str:
    """What each operator takes on `device`, for a run's first line."""
    names = {operator: choice(operator, impl, device) for operator in OPERATORS}
    if len(set(names.values())) == 1:
        return f"every operator: {names['attention']}"
    return ", ".join(f"{operator}: {name}" for operator, name in names.items())
