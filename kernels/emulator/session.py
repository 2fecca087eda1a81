"""`active`: within it the fused kernels run on CPU tensors, by executing the PTX that they compile to.

    with emulator.active("sm_86") as session:
        loss = model(...).loss          # impl="triton"
        loss.backward()
    session.launches[0].counts.by_source()

The launch code is that of a GPU run, intercepted as in kernels.compile_only.record. What torch.empty gives out is
filled with 0xFF and remembered as uninitialised until a kernel, or torch, writes it.
"""

import contextlib
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels.compile_only import record
from kernels.dispatch import kernels_on_cpu
from kernels.emulator.codegen import Code
from kernels.emulator.machine import Counts, Finding, Machine
from kernels.emulator.memory import GlobalMemory, Region, Storage, address_of
from kernels.emulator.parse import Kernel, parse

# lanes of a group of programs that run together: an array of 4 bytes each stays in a core's second cache
LANES = 1 << 14
# of the noise in `sample`; odd, so that rows differ
PERIOD = 65_521
_EMPTY = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip


class EmulationError(AssertionError):
    """What the checks found in one launch."""

    def __init__(self, findings: list[Finding]):
        super().__init__("\n".join(map(str, findings)))
        self.findings = findings


@dataclass
class EmulatedLaunch:
    """One launch that was executed. recorded: as kernels.compile_only would have it; kernel: the PTX that ran, parsed;
    seconds: of the execution."""

    recorded: record.Launch
    kernel: Kernel
    findings: list[Finding]
    counts: Counts
    seconds: float


@dataclass
class Session:
    """Options and results of an emulation.

    checks: memory, initialisation, races; True, or which kernels by name. profile, likewise: count sectors and
    wavefronts too.
    seed: of a random order of programs. transform: (kernel's name, PTX) -> PTX, for mutants. raises: EmulationError at
    the end of a launch with findings. done: called after each launch.
    """

    arch: str
    checks: bool | Callable[[str], bool] = True
    profile: bool | Callable[[str], bool] = False
    seed: int | None = None
    transform: Callable[[str, str], str] | None = None
    raises: bool = True
    lanes: int = LANES
    done: Callable[[EmulatedLaunch], None] = lambda _: None
    launches: list[EmulatedLaunch] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


class _Initialised(TorchDispatchMode):
    """Fills what torch allocates without a value with 0xFF, and keeps which of its bytes were written since."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: dict[int, tuple[StorageWeakRef, np.ndarray]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        implementation = _custom(func)
        if implementation is not None:
            with self:  # its own allocations count too
                return implementation(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _EMPTY:
            self._forget(out)
        else:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._written(value)
            for name, value in kwargs.items():
                if name == "out":
                    self._written(value)
        return out

    def _forget(self, out: Tensor) -> None:
        if out.device.type == "cpu" and out.layout == torch.strided and out.untyped_storage().nbytes():
            storage = out.untyped_storage()
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
            self.maps[storage.data_ptr()] = StorageWeakRef(storage), np.zeros(storage.nbytes(), np.uint8)

    def _written(self, value: Any) -> None:
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor) and x.device.type == "cpu" and (found := self.of(x)) is not None:
                mark = torch.from_numpy(found).view(-1)
                size, start = x.element_size(), x.storage_offset() * x.element_size()
                shape, strides = (*x.shape, size), (*(s * size for s in x.stride()), 1)
                mark.as_strided(shape, strides, start).fill_(1)

    def of(self, x: Tensor) -> np.ndarray | None:
        """The map of x's storage: 1 for bytes written; None where all are."""
        key = x.untyped_storage().data_ptr()
        reference, found = self.maps.get(key, (None, None))
        if reference is None or reference.expired():
            self.maps.pop(key, None)
            return None
        return found

    def drop_full(self) -> None:
        for key, (reference, found) in list(self.maps.items()):
            if reference.expired() or found.all():
                del self.maps[key]


def _custom(func: Any) -> Callable | None:
    """The Python function behind an operator of torch.library.custom_op, or None."""
    from torch._library.custom_ops import OPDEFS

    name = getattr(func, "_name", "").split(".")[0]
    definition = OPDEFS.get(name) if getattr(func, "namespace", "aten") not in ("aten", "prim") else None
    return None if definition is None else definition._init_fn


def _sources_here(text: str) -> str:
    """PTX with the files of the modules that are loaded: Triton keeps compiled kernels by their source, not by its
    place, so those in its cache may name another copy of the same file."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    here = {Path(name).parts[-2:]: name for name in files if name}
    return re.sub(r'(\.file\s+\d+ )"([^"]*)"', lambda m: f'{m[1]}"{here.get(Path(m[2]).parts[-2:], m[2])}"', text)


@functools.lru_cache(256)
def _code(text: str) -> Code:
    return Code(parse(_sources_here(text)))


class Emulator(record.Recorder):
    """Executes each launch after compiling it."""

    device = "cpu"

    def __init__(self, session: Session, initialised: _Initialised):
        super().__init__(session.arch, lambda _: True)
        self.session, self.initialised = session, initialised

    def address(self, index: int, tensor: Tensor) -> int:
        return address_of(index, tensor)

    def launched(self, launch: record.Launch, values: dict[str, Any]) -> None:
        with _disable_current_modes(), torch.no_grad(), np.errstate(all="ignore"):
            start = time.perf_counter()
            code = self._code(launch)
            findings, counts = self._execute(code, launch, values)
            self.initialised.drop_full()
        done = EmulatedLaunch(launch, code.kernel, findings, counts, time.perf_counter() - start)
        self.session.launches.append(done)
        self.session.findings += findings
        self.session.done(done)
        if findings and self.session.raises:
            raise EmulationError(findings)

    def _code(self, launch: record.Launch) -> Code:
        text = launch.compiled.asm["ptx"]
        if self.session.transform is not None:
            text = self.session.transform(launch.kernel, text)
        return _code(text)

    def _execute(self, code: Code, launch: record.Launch, values: dict[str, Any]) -> tuple[list[Finding], Counts]:
        session, metadata = self.session, launch.compiled.metadata
        checks, profile = (x if isinstance(x, bool) else x(launch.kernel) for x in (session.checks, session.profile))
        return execute(
            code, launch.grid, _arguments(launch, values), metadata.shared, self.initialised.of,
            checks=checks, profile=profile, seed=session.seed, lanes=session.lanes,
        )  # fmt: skip


def _arguments(launch: record.Launch, values: Mapping[str, Any]) -> list[tuple[int, str, Any]]:
    """(number, name, value) of each parameter; values: every argument by name, in order, constants too."""
    signature = launch.compiled.src.signature
    # a number in the order of all arguments, which is in the addresses that specialisation saw
    arguments = [(i, n, x) for i, (n, x) in enumerate(values.items()) if signature[n] != "constexpr"]
    return arguments + [(len(values) + i, n, 0) for i, n in enumerate(("global scratch", "profile scratch"))]


def sample(launch: record.Launch, numbers: np.ndarray) -> EmulatedLaunch:
    """Programs `numbers` of a launch that was recorded and compiled on meta tensors, at its full size and without
    checks: for counts of kernels in which integers in memory decide nothing, since these are zeros, all else noise."""
    given = {a.name: _drawn(a) if a.is_tensor else a.value for a in launch.arguments}
    code, start = _code(launch.compiled.asm["ptx"]), time.perf_counter()
    arguments = _arguments(launch, {name: given.get(name) for name in launch.compiled.src.signature})
    with np.errstate(all="ignore"):
        findings, counts = execute(
            code, launch.grid, arguments, launch.compiled.metadata.shared, checks=False, numbers=numbers
        )
    return EmulatedLaunch(launch, code.kernel, findings, counts, time.perf_counter() - start)


def _drawn(argument: record.Argument) -> Tensor:
    """Noise, of which a sum of 64 products has variance 1, of 1024 16: an activation branches on its argument's size.
    It repeats, since it is drawn for whole tensors of which little is read."""
    assert argument.shape is not None
    assert argument.strides is not None
    dtype = getattr(torch, argument.dtype)
    elements = max(1, 1 + sum((n - 1) * stride for n, stride in zip(argument.shape, argument.strides, strict=True)))
    flat = torch.zeros(elements, dtype=dtype)
    if dtype.is_floating_point:
        noise = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)) * 64**-0.25
        flat = noise.to(dtype).repeat(-(-elements // PERIOD))[:elements]
    return flat.as_strided(argument.shape, argument.strides)


def execute(
    code: Code, grid: tuple[int, int, int], arguments: list[tuple[int, str, Any]], shared_bytes: int,
    initialised: Callable[[Tensor], np.ndarray | None] = lambda _: None,
    *, checks: bool = True, profile: bool = False, seed: int | None = None, lanes: int = LANES,
    numbers: np.ndarray | None = None,
) -> tuple[list[Finding], Counts]:  # fmt: skip
    """Runs a kernel's programs on `arguments` (number in addresses, name, tensor or scalar), one for each parameter;
    numbers: of the programs that run, by default all."""
    memory, parameters = _bind(code, arguments, initialised, checks)
    numbers = np.arange(math.prod(grid)) if numbers is None else numbers
    if seed is not None:
        np.random.default_rng(seed).shuffle(numbers)
    found: dict[tuple[str, int], Finding] = {}
    counts, group = Counts(), max(1, lanes // code.kernel.threads)
    for first in range(0, len(numbers), group):
        machine = Machine(
            code, numbers[first : first + group], grid, parameters, memory, shared_bytes, found,
            checks=checks, profile=profile,
        )  # fmt: skip
        machine.run()
        machine.report_undefined()
        machine.add_counts(counts)
    return list(found.values()), counts


def _bind(
    code: Code, arguments: list[tuple[int, str, Any]], initialised: Callable[[Tensor], np.ndarray | None], checks: bool
) -> tuple[GlobalMemory, dict[str, np.ndarray]]:
    """Memory, and the parameters' bytes by their names in the PTX."""
    regions: dict[int, Region] = {}
    storages: dict[int, Storage] = {}
    parameters, by_parameter = {}, {}
    for (parameter, kind), (index, name, value) in zip(code.kernel.parameters.items(), arguments, strict=True):
        if isinstance(value, Tensor):
            key = value.untyped_storage().data_ptr()
            if key not in storages:
                storages[key] = Storage(value, initialised(value))
            by_parameter[parameter] = storages[key]
            regions[index + 1] = Region(name, index, value, storages[key])
            data: Any = np.uint64(address_of(index, value))
        elif isinstance(value, float):
            data = np.dtype(f"f{int(kind[1:]) // 8}").type(value)
        else:
            data = np.array(int(value) & ((1 << 64) - 1), np.uint64)
        parameters[parameter] = np.frombuffer(np.asarray(data).tobytes(), np.uint8)[None]
    if checks:
        _track(code, by_parameter)
    return GlobalMemory(regions, checks), parameters


def _track(code: Code, storages: dict[str, Storage]) -> None:
    """Prepares the shadow of every storage that the kernel writes."""
    written: set[int] = set()
    read: set[int] = set()
    for site in code.sites.values():
        line = site.instruction.line
        if line in code.reached:
            for name in code.reached[line] & storages.keys() or storages.keys():
                storages[name].granule = min(storages[name].granule, site.size)
                (written if site.instruction.opcode.startswith("st") else read).add(id(storages[name]))
    for storage in {id(s): s for s in storages.values()}.values():
        storage.track(id(storage) in written, id(storage) in read)


@contextlib.contextmanager
def active(arch: str = "sm_86", **options: Any) -> Iterator[Session]:
    """Within it, impl="triton" runs on CPU tensors; options: fields of `Session`.

    Raises EmulationError at the end of a launch in which the checks found something, UnsupportedPtx for PTX without a
    rule, RuntimeError under TRITON_INTERPRET=1, ValueError for an architecture whose PTX is not emulated (sm_90).
    """
    if arch not in EMULATED:
        raise ValueError(f"emulator: expected arch among {', '.join(EMULATED)}, got {arch!r}; use one of them")
    session, initialised = Session(arch, **options), _Initialised()
    with record.installed(Emulator(session, initialised)), kernels_on_cpu(), initialised:
        yield session


EMULATED = ("sm_80", "sm_86", "sm_89")
