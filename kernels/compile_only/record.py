"""A stand-in Triton driver, and the record of every launch made under it.

Triton asks its active driver for the target, for the device and for a launcher. The stand-in answers with a target of
our choice and a launcher that does nothing, so `kernel[grid](...)` in kernels.fused runs on meta tensors as it stands,
compiles for that target and is noted down. Nothing here executes a kernel.
"""

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.dispatch import triton_interpreted
from kernels.operators.record import ARCHITECTURES


@dataclass(frozen=True)
class Argument:
    """One run-time argument of a launch: a tensor's layout, or a scalar's value."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    # bytes of distinct elements: dimensions of stride 0 count once
    bytes: int = 0
    value: Any = None

    @property
    def is_tensor(self) -> bool:
        return self.shape is not None


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, as the launch code asked for it."""

    kernel: str
    module: str
    arch: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    arguments: tuple[Argument, ...]
    # Triton's CompiledKernel: asm (ttir, ttgir, ptx, cubin) and metadata; None where only recorded
    compiled: Any = field(default=None, repr=False, compare=False)
    # what Triton makes one program of: kernel, types, alignment and constants of its arguments, options
    program: str = field(default="", repr=False)
    # gives (the kernel, types, constants, attributes), as Triton's front end takes them
    source: Any = field(default=None, repr=False, compare=False)

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def configuration(self) -> str:
        """Constants and options on one line, for a table; of an activation its name, without its code's hashes."""
        given = dict(self.constants)
        if "ACTIVATION" in given:
            given["ACTIVATION"] = given["ACTIVATION"].partition(":")[0]
        constants = " ".join(f"{name}={value}".replace(" ", "") for name, value in sorted(given.items()))
        return f"{constants} warps={self.num_warps} stages={self.num_stages}".strip()


_active: list["Recorder"] = []


def launches(x: Tensor) -> bool:
    """Whether an operator on `x` launches its kernels: False while shapes alone are traced (meta and fake tensors),
    unless a recording is active.

    An operator's one implementation allocates its outputs, asks this, and launches; registered both as the custom op
    and as its fake, it cannot disagree with itself about shapes and strides.
    """
    if isinstance(x, FakeTensor):
        return False
    return x.device.type != "meta" or bool(_active)


def architecture(x: Tensor) -> str:
    """The target whose tiles an operator on `x` takes: the recording's, the CUDA device's, elsewhere sm_86's."""
    if _active:
        return _active[-1].arch
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        return f"sm_{major}{minor}"
    return "sm_86"


class _Pointer:
    """A tensor as a real launch would see it."""

    def __init__(self, tensor: Tensor, address: int):
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _driver(arch: str) -> SimpleNamespace:
    """The part of a Triton driver that compiling and launching use, for a target that is not there."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    utils = SimpleNamespace(
        # unlimited here: the report names the breach instead
        get_device_properties=lambda device: {"max_shared_mem": sys.maxsize},
        load_binary=lambda *arguments: (object(), object(), 0, 0, 1024),
        unload_module=lambda module: None,
    )
    return SimpleNamespace(
        utils=utils,
        # accepts a launch and does nothing
        launcher_cls=lambda src, metadata: lambda *arguments: None,
        get_current_target=lambda: target,
        # Triton keeps compiled kernels by device: a name of its own keeps them apart from those of a real GPU
        get_current_device=lambda: f"compile_only:{arch}",
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("meta"),
    )


def _argument(name: str, value: Any) -> Argument:
    if isinstance(value, Tensor):
        distinct = math.prod(n for n, stride in zip(value.shape, value.stride(), strict=True) if stride != 0)
        return Argument(
            name,
            str(value.dtype).removeprefix("torch."),
            tuple(value.shape),
            tuple(value.stride()),
            distinct * value.element_size() if value.numel() else 0,
        )
    return Argument(name, type(value).__name__, value=value)


def _plain(value: Any) -> Any:
    """A compile-time constant as a plain Python value: tl.dtype and jit functions by name."""
    value = getattr(value, "value", value)
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value if isinstance(value, bool | int | float | str | type(None)) else getattr(value, "__name__", str(value))


def _specialised(function: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[str, Callable[[], tuple]]:
    """(`Launch.program`, `Launch.source`) of a launch, as the active driver's target specialises its arguments."""
    from triton.runtime.driver import driver

    backend, binder = function.device_caches[driver.active.get_current_device()][3:]
    bound, specialisation, options = binder(*args, **kwargs)
    program = f"{function.__module__}.{function.__name__} {specialisation} {options}"
    return program, lambda: (function, *function._pack_args(backend, kwargs, bound, specialisation, options)[1:])


@contextlib.contextmanager
def watching() -> Iterator[set[str]]:
    """Within it kernels run as ever; yields the growing set of the programs (`Launch.program`) that are launched."""
    from triton.runtime.jit import JITFunction

    original, programs = JITFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        programs.add(_specialised(self, args, kwargs)[0])
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = run
    try:
        yield programs
    finally:
        JITFunction.run = original


class Recorder:
    """Notes down every launch made while it is `installed`; kernels.emulator derives one that executes them."""

    # type of the tensors that launches take
    device = "meta"

    def __init__(self, arch: str, compile: Callable[[str], bool]):
        self.arch, self.compile = arch, compile
        self.launches: list[Launch] = []

    def address(self, index: int, tensor: Tensor) -> int:
        """Address of argument number `index`: allocations aligned to 256 bytes, as the CUDA allocator's are."""
        return 256 + int(tensor.storage_offset()) * tensor.element_size()

    def launched(self, launch: Launch, values: dict[str, Any]) -> None:
        """Called with every launch and its arguments by name."""
        self.launches.append(launch)

    def run(self, original: Callable, function: Any, args: tuple, grid: Any, warmup: bool, kwargs: dict) -> Any:
        names = {parameter.name: parameter for parameter in function.params}
        given = {name: value for name, value in kwargs.items() if name in names}
        options = {name: value for name, value in kwargs.items() if name not in names}
        bound = function.signature.bind(*args, **given)
        bound.apply_defaults()
        values = bound.arguments
        pointers = {
            n: _Pointer(v, self.address(i, v)) if isinstance(v, Tensor) else v
            for i, (n, v) in enumerate(values.items())
        }
        program, source = _specialised(function, (), pointers | options)
        if callable(grid):
            grid = grid(dict(values))
        grid3 = tuple(int(n) for n in (*grid, 1, 1)[:3])
        compiled = None
        if self.compile(function.__name__):
            compiled = original(function, grid=grid3, warmup=warmup, **pointers, **options)
        launch = Launch(
            kernel=function.__name__,
            module=function.__module__,
            arch=self.arch,
            grid=grid3,  # type: ignore[arg-type]
            num_warps=options.get("num_warps", 4),
            num_stages=options.get("num_stages", 3),
            constants={n: _plain(v) for n, v in values.items() if names[n].is_constexpr},
            arguments=tuple(_argument(n, v) for n, v in values.items() if not names[n].is_constexpr),
            compiled=compiled,
            program=program,
            source=source,
        )
        self.launched(launch, dict(values))
        return compiled


@contextlib.contextmanager
def recording(arch: str = "sm_86", compile: bool | Callable[[str], bool] = True) -> Iterator[list[Launch]]:
    """Within it, fused operators on meta tensors run their launch code for `arch`; yields the growing list of launches.

    compile: compile each distinct kernel (seconds each, kept in Triton's cache on disk), else only note the launch; or
    a function of the kernel's name that says which.
    Raises RuntimeError under TRITON_INTERPRET=1, where kernels are Python functions that nothing can compile, and
    ValueError for an unknown architecture. Launches on other than meta tensors are refused: nothing could run them.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"recording: expected arch among {', '.join(ARCHITECTURES)}, got {arch!r}")
    with installed(Recorder(arch, compile if callable(compile) else lambda _: compile)) as recorder:
        yield recorder.launches


@contextlib.contextmanager
def installed(recorder: Recorder) -> Iterator[Recorder]:
    """Within it, launches of Triton kernels go to `recorder` instead of a device; errors as of `recording`."""
    if triton_interpreted():
        raise RuntimeError(
            "recording: expected compiled kernels, got TRITON_INTERPRET=1, which replaces them by interpreted ones; "
            "start Python without it"
        )
    importlib.import_module("kernels.fused")  # pins Triton's options before Triton is imported
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if _active:
        raise RuntimeError("recording: expected no other active recording, got one; end it first")
    original, previous = JITFunction.run, driver._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.device.type != recorder.device:
                raise ValueError(f"recording: expected {recorder.device} tensors, got one on {value.device}")
        return recorder.run(original, self, args, grid, warmup, kwargs)

    JITFunction.run = run
    driver.set_active(_driver(recorder.arch))
    _active.append(recorder)
    try:
        yield recorder
    finally:
        _active.remove(recorder)
        driver._active = previous
        JITFunction.run = original
