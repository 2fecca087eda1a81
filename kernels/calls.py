"""Calls of operators without their values: recorded in a step, made smaller, drawn again; and the programs they launch.

Recorded on meta tensors, a call keeps what decides its programs: layouts, dtypes, what needs a gradient and in which
layouts the gradients of its outputs come. Its batch, lengths and vocabulary are cut as far as the programs stay.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.dropout import Dropout, dropout_state
from kernels.operators import OPERATORS
from kernels.operators.record import Draw
from kernels.validation import Contract

# (sequences, positions, words), the smallest first; the first that launches the same programs is taken. Positions and
# words keep their remainder by 16, which Triton specialises on, and are more than the widest tile has.
CUTS: tuple[tuple[float, float, float], ...] = ((2, 144, 304), (math.inf, 144, 304), (math.inf,) * 3)
# sizes at which an operator is checked where no step was recorded, by axis or its first letter
GENERIC = {"B": 2, "L": 40, "H": 2, "G": 2, "K": 64, "D": 96, "rows": 192, "V": 300, "P": 48}


@dataclass(frozen=True)
class Layout:
    """A tensor without its values. offset: where it starts in its storage, of 16 elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    differentiable: bool = False

    @classmethod
    def of(cls, x: Tensor) -> "Layout":
        differentiable = x.requires_grad and torch.is_grad_enabled()
        return cls(tuple(x.shape), x.stride(), int(x.storage_offset()) % 16, x.dtype, differentiable)

    def elements(self) -> int:
        return math.prod(self.shape)

    def cut(self, shape: tuple[int, ...]) -> "Layout":
        """The layout in another shape: the order of the dimensions and the gaps between rows stay."""
        strides = []
        for stride in self.strides:
            inner = [i for i, other in enumerate(self.strides) if 0 < other < stride]
            old, new = (math.prod(sizes[i] for i in inner) for sizes in (self.shape, shape))
            exact = stride * new / max(old, 1)
            strides.append(int(exact) if exact == int(exact) else int(exact) // 16 * 16 + 16 + stride % 16)
        return replace(self, shape=shape, strides=tuple(strides))

    def place(self, x: Tensor) -> Tensor:
        """`x` in this layout; dimensions of stride 0 repeat its first entry."""
        single = tuple(1 if stride == 0 else n for n, stride in zip(self.shape, self.strides, strict=True))
        extent = 1 + sum((n - 1) * s for n, s in zip(single, self.strides, strict=True)) if x.numel() else 0
        buffer = torch.empty(self.offset + extent, dtype=self.dtype, device=x.device)
        x = x[tuple(slice(0, n) for n in single)]
        view = buffer.as_strided(single, self.strides, self.offset).copy_(x).expand(self.shape)
        return view.requires_grad_(self.differentiable)


@dataclass(frozen=True)
class Call:
    """One call of an operator. kwargs: a Layout for a tensor, a Drop for a Dropout. upstream: of each
    output the layout of its gradient, None where backward gets none; () for ones of our own for every output."""

    operator: str
    tensors: dict[str, Layout | None]
    kwargs: dict[str, Any] = field(default_factory=dict)
    upstream: tuple[Layout | None, ...] = ()

    @property
    def contract(self) -> Contract:
        return OPERATORS[self.operator].contract_of(self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.tensors.values() if x is not None and x.dtype.is_floating_point)

    def cut(self, sequences: float, positions: float, words: float) -> "Call":
        """The call with at most about so many of each; see CUTS."""

        def size(axis: str, n: int) -> int:
            limit = {"B": sequences, "L": positions, "P": positions + 16, "V": words}.get(axis[0], n)
            if n <= limit or axis[0] == "B":
                return int(min(n, limit))
            return int(limit + (n - limit) % 16)

        return self.resized(size)

    def resized(self, size: Callable[[str, int], int]) -> "Call":
        """The call with size(axis, n) in place of n, for each named axis of its contract."""
        contract = self.contract

        def changed(name: str, x: Any) -> Any:
            if not isinstance(x, Layout):
                return x
            axes = contract.arguments[name].axes
            return x.cut(tuple(n if a.isdigit() else size(a, n) for a, n in zip(axes, x.shape, strict=True)))

        tensors = {name: changed(name, x) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, kwargs={name: changed(name, x) for name, x in self.kwargs.items()})

    def draw(self, device: torch.device) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """(tensors, other arguments) with the values of the operator's record."""
        draw, arguments = Draw(0, torch.float64, "cpu"), self.contract.arguments
        record, rng = OPERATORS[self.operator], dropout_state(42, 1, 5, device)
        given = {n: x for n, x in {**self.tensors, **self.kwargs}.items() if isinstance(x, Layout)}
        sizes = {a: n for name, x in given.items() for a, n in zip(arguments[name].axes, x.shape, strict=True)}
        sizes |= {"ignore_index": self.kwargs.get("ignore_index", -100)}

        def drawn(name: str, layout: Layout) -> Tensor:
            shape = layout.shape
            if device.type == "meta":
                return layout.place(torch.empty(shape, dtype=layout.dtype, device=device))
            if name == "key_lengths":
                x = sizes["Lk"] - draw.integers(sizes["Lk"], shape)
            elif name == "key_mask":
                x = draw.integers(4, shape) > 0
            else:
                x = record.draw(name, draw, sizes, shape)
            return layout.place(x.to(device, layout.dtype))

        tensors = {name: None if x is None else drawn(name, x) for name, x in self.tensors.items()}
        kwargs = {}
        for site, (name, x) in enumerate(self.kwargs.items(), 1):
            if isinstance(x, Drop):
                x = Dropout(x.p, rng, site)
            kwargs[name] = drawn(name, x) if isinstance(x, Layout) else x
        return tensors, kwargs


@dataclass(frozen=True)
class Drop:
    """A Dropout without its state and site, which choose no program."""

    p: float


def call_of(operator: str, tensors: Iterable[Tensor | None], kwargs: Mapping[str, Any]) -> Call:
    """The Call of an operator's arguments."""

    def plain(x: Any) -> Any:
        return Drop(x.p) if isinstance(x, Dropout) else Layout.of(x) if isinstance(x, Tensor) else x

    named = zip(OPERATORS[operator].contract.tensors, (plain(x) for x in tensors), strict=True)
    return Call(operator, dict(named), {name: plain(x) for name, x in kwargs.items()})


def generic_calls(operator: str, dtype: torch.dtype, library: bool = False) -> list[Call]:
    """What an operator is checked at where no step was recorded, one call a form: every feature that masks or scales.

    library: of one that draws its own masks, has no padding and one form: without these.
    """
    record = OPERATORS[operator]

    def call(contract: Contract) -> Call:
        def layout(name: str) -> Layout:
            argument = contract.arguments[name]
            shape = [int(axis) if axis.isdigit() else GENERIC.get(axis) or GENERIC[axis[0]] for axis in argument.axes]
            x = torch.empty(shape, dtype=torch.int64 if argument.type else dtype, device="meta")
            return replace(Layout.of(x), differentiable=not argument.type)

        kwargs: dict[str, Any] = record.checked | dict.fromkeys(record.drops, None if library else Drop(0.25))
        if "key_lengths" in contract.arguments and not library:
            kwargs["key_lengths"] = layout("key_lengths")
        if contract.tensors == ("q",):
            kwargs["return_kv"] = True
        given = {name: layout(name) for name in contract.tensors}
        return Call(operator, dict.fromkeys(record.contract.tensors) | given, kwargs)

    return [call(contract) for contract in (record.forms or (record.contract,))[: 1 if library else None]]


def results(
    operator: str, function: Callable, leaves: Mapping[str, Any], kwargs: Mapping[str, Any], upstream: tuple = ()
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    wanted = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
    with torch.set_grad_enabled(bool(wanted)):
        outputs = function(**leaves, **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        named: dict[str, Tensor] = {f"output {i}": x for i, x in enumerate(outputs)}
        used = outputs[: OPERATORS[operator].differentiable]
        given = []
        for x, layout in zip(used, upstream or (...,) * len(used), strict=False):
            if layout is None:
                continue
            g = torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=x.device).view(x.shape)
            g = (g if x.dim() else g.abs()).to(x.dtype)
            given.append((x, g if layout is ... else replace(layout.cut(tuple(x.shape)), dtype=x.dtype).place(g)))
        if not (wanted and given):
            return named
        gradients = torch.autograd.grad(
            [x for x, _ in given], list(wanted.values()), [g for _, g in given], allow_unused=True
        )
    return named | {
        f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), gradients, strict=True)
    }


# ---------------------------------------------------------------- the programs of a step


def fused_function(operator: str) -> Callable:
    """The fused kernels' function, past the dispatch, whose own check would come first."""
    return getattr(OPERATORS[operator].module("triton"), operator)


def record(call: Call, arch: str) -> frozenset[str]:
    """The programs that a call launches on `arch`; nothing runs."""
    from kernels.compile_only import recording

    inputs, kwargs = call.draw(torch.device("meta"))
    with recording(arch, compile=False) as launches:
        results(call.operator, fused_function(call.operator), inputs, kwargs, call.upstream)
    return frozenset(launch.program for launch in launches)


def observe(step: Callable[[], object], arch: str) -> tuple[list[Call], frozenset[str]]:
    """(distinct calls of fused operators in `step`, which runs on meta tensors; the programs that it launches)."""
    from kernels.compile_only import recording
    from kernels.dispatch import observed

    noted: list[tuple[Call, list[Layout | None]]] = []

    def wrap(operator: str, function: Callable) -> Callable:
        if not function.__module__.startswith("kernels.fused"):
            return function

        def called(*tensors: Tensor | None, **kwargs: Any) -> Any:
            call = call_of(operator, tensors, kwargs)
            result = function(*tensors, **kwargs)
            outputs = result if isinstance(result, tuple) else (result,)
            upstream: list[Layout | None] = [None] * len(outputs)
            for i, x in enumerate(outputs):
                if x.requires_grad:
                    x.register_hook(lambda g, i=i: upstream.__setitem__(i, g if g is None else Layout.of(g.detach())))
            noted.append((call, upstream))
            return result

        return called

    with recording(arch, compile=False) as launches, observed(wrap):
        step()
    distinct: list[Call] = []
    for call, upstream in noted:
        call = replace(call, upstream=tuple(upstream))
        if call not in distinct:
            distinct.append(call)
    return distinct, frozenset(launch.program for launch in launches)


def cases_of(step: Callable[[], object], arch: str) -> tuple[list[Call], frozenset[str]]:
    """(calls as small as may be that launch every program of `step`, those programs).

    Raises ImplementationError, naming a program, where the calls do not launch it.
    """
    from kernels.dispatch import ImplementationError

    calls, programs = observe(step, arch)
    cases: list[Call] = []
    covered: frozenset[str] = frozenset()
    for call in calls:
        own = record(call, arch)
        small = next(one for cut in CUTS if record(one := call.cut(*cut), arch) == own)
        covered |= own
        if small not in cases:
            cases.append(small)
    if programs - covered:
        raise ImplementationError(uncovered(programs - covered))
    return cases, programs


def uncovered(programs: Iterable[str]) -> str:
    names = sorted(program.split(" ", 1)[0].rsplit(".", 1)[-1] for program in programs)
    return f"self-test: expected every program of the step to be compared, got none of {', '.join(names)}; report it"
