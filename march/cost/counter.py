"""Counts what a step dispatches on meta tensors: operators of torch, launches of kernels, bytes that live.

A registered operator of `kernels` is opaque to torch: here the function behind it runs under the counter instead, so
that its library products and allocations are seen like everyone's, and its launches are those that the active
recording (`kernels.compile_only`) gained meanwhile. The operator itself counts nothing.

The seam reports every operator call (`kernels.dispatch.observed`), and a call's share of backward is found by walking
the autograd graph from its outputs to its inputs. What is left are the products of the linear layers ("linear"), and
what autograd does between operators ("other"): sums of gradients, copies that a layout asks for.

The compulsory traffic of a call is the least that any implementation moves, each tensor read or written once:
    forward   its inputs and outputs (attention: the log-sum-exp too, which backward cannot do without);
    backward  incoming gradients, what the formula needs (`saved` of its record), gradients of the inputs.
Keys and values that self-attention hands on are no output, they stay where they are; what comes back to them is an
incoming gradient.
"""

import math
import weakref
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kernels.compile_only.record import Launch
from kernels.operators import OPERATORS

# Views that torch does not mark as such, and allocations: nothing moves.
_FREE = ("aten::_unsafe_view", "aten::lift_fresh")
_ALLOCATE = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
# Labels of what no operator owns: products of linear layers, and the rest.
LINEAR, OTHER = "linear", "other"
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Product:
    """A library product C[m, n] = A[m, k] B[k, n], `batch` times; bytes of an element of A and B.

    alignment: bytes, up to 16, of which the starts of all rows of A and B are multiples. Below 16 a library cannot
    load with its fast instructions.
    """

    batch: int
    m: int
    n: int
    k: int
    element_size: int
    alignment: int = 16


@dataclass(frozen=True)
class Event:
    """One operator of torch (product where it is one) or one launch; reads, writes: bytes, each tensor once."""

    operator: str
    phase: str
    name: str
    flops: int = 0
    reads: int = 0
    writes: int = 0
    product: Product | None = None
    launch: Launch | None = None


@dataclass(frozen=True)
class Allocation:
    """A new storage: who made it and what it was first seen as."""

    operator: str
    phase: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


# ---------------------------------------------------------------- tensors and launches


def tensor_bytes(x: Tensor) -> int:
    """Bytes of the distinct elements: dimensions of stride 0 count once."""
    distinct = math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return distinct * x.element_size() if x.numel() else 0


def tensors(tree: Any) -> list[Tensor]:
    """Those that have a storage; a sparse one is made of two that do."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout is torch.strided]


def total_bytes(many: Iterable[Tensor]) -> int:
    return sum(map(tensor_bytes, many))


def _alignment(x: Tensor) -> int:
    """Bytes, up to 16, that divide every row's start; a row is what lies next to each other."""
    steps = [n for size, n in zip(x.shape, x.stride(), strict=True) if n != 1 and size > 1]
    return math.gcd(16, *(n * x.element_size() for n in (x.storage_offset(), *steps)))


def _product(name: str, arguments: tuple) -> Product | None:
    if name not in _PRODUCTS:
        return None
    a, b = arguments[1:3] if "add" in name else arguments[:2]
    batch = a.shape[0] if a.dim() == 3 else 1
    alignment = min(_alignment(a), _alignment(b))
    return Product(batch, a.shape[-2], b.shape[-1], a.shape[-1], a.element_size(), alignment)


class Arguments:
    """A launch's arguments and constants by name, as the records' formulas of FLOPs take them."""

    def __init__(self, launch: Launch):
        self.constants, self.arguments = launch.constants, {one.name: one for one in launch.arguments}

    def __getitem__(self, name: str) -> Any:
        return self.constants[name] if name in self.constants else self.arguments[name].value

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.arguments[name].shape
        assert shape is not None, name
        return shape


# what the operators' records say of their kernels
KERNELS = {name: kernel for record in OPERATORS.values() for name, kernel in record.kernels.items()}
WITH_PRODUCTS = frozenset(name for name, kernel in KERNELS.items() if kernel.flops)


def launch_event(launch: Launch, operator: str = OTHER, phase: str = "forward") -> Event:
    """A recorded launch: FLOPs of its products by its record's formula, each of its tensors read or written once.

    As torch counts its own attention: scores in full, whatever blocks a mask lets a kernel skip; softmax, dropout and
    activations do not count. What backward computes again counts, it is executed. LookupError without a record.
    """
    kernel = KERNELS.get(launch.kernel)
    if kernel is None:
        raise LookupError(f"{launch.kernel}: expected it in a record of kernels.operators, got none; declare it there")
    written, size = kernel.writes.split(), {one.name: one.bytes for one in launch.arguments}
    writes = sum(size[name] for name in written if name in size)
    flops = kernel.flops(Arguments(launch)) if kernel.flops else 0
    return Event(operator, phase, launch.kernel, flops, sum(size.values()) - writes, writes, launch=launch)


# ---------------------------------------------------------------- the counter


def _python_function(name: str) -> Callable | None:
    """The function behind the registered operator `name` where it is one of `kernels`, else None."""
    definition = OPDEFS.get(name)
    function = definition._init_fn if definition is not None else None
    return function if function is not None and function.__module__.startswith("kernels.") else None


class Counter(TorchDispatchMode):
    """events, allocations in their order; live: bytes alive now, peak: the most, beyond what it `ignore`s. operator,
    phase: labels of what is dispatched next, "" for what no operator owns. compulsory: bytes by operator and phase;
    saved: bytes kept for backward by the operator that keeps them, each storage once. launches: a recording's list."""

    def __init__(self, launches: list[Launch] | None = None):
        super().__init__()
        self.events: list[Event] = []
        self.allocations: list[Allocation] = []
        self.compulsory: Counts[tuple[str, str]] = Counts()
        self.operator, self.phase = "", "forward"
        self.live = self.peak = 0
        self.saved: Counts[str] = Counts()
        self._launches = launches if launches is not None else []
        self._noted = len(self._launches)
        # numbers of the storages that live: addresses are used again, numbers are not
        self._numbers: dict[int, int] = {}
        self._last = 0
        self._kept: set[int] = set()
        self._hooked: set[Any] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep torch.compile out of a mode, where nobody calls it, torch imports it, 1.5 s."""
        return False

    def ignore(self, x: Tensor) -> None:
        """Takes the storage of `x` as one that is there anyhow, a parameter's."""
        self._kept.add(self._number(x))

    def _number(self, x: Tensor) -> int:
        key = x.untyped_storage()._cdata
        if key not in self._numbers:
            self._last += 1
            self._numbers[key] = self._last
        return self._numbers[key]

    def _track(self, x: Tensor, name: str) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        size = storage.nbytes()
        self._number(x)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.allocations.append(Allocation(self.operator or OTHER, self.phase, name, x.dtype, tuple(x.shape), size))
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._numbers.pop(key, None)
        self.live -= size

    def keep(self, x: Tensor) -> Tensor:
        """Notes what is saved for backward; for torch.autograd.graph.saved_tensors_hooks."""
        number = self._number(x)
        if number not in self._kept:
            self._kept.add(number)
            self.saved[self.operator or LINEAR] += x.untyped_storage().nbytes()
        return x

    def note_launches(self) -> None:
        """Takes up the launches since the last call, under the current labels."""
        for launch in self._launches[self._noted :]:
            self.events.append(launch_event(launch, self.operator or OTHER, self.phase))
        self._noted = len(self._launches)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        inner = _python_function(name)
        if inner is not None:
            with self:
                out = inner(*args, **kwargs)
            self.note_launches()
            return out
        out = func(*args, **kwargs)
        outputs = tensors(out)
        for x in outputs:
            self._track(x, name)
        if func.is_view or name in _FREE or name in _ALLOCATE:
            return out
        from torch.utils.flop_counter import flop_registry  # which imports Triton: a run on a CPU has no use for it

        inputs, product, flops = tensors((args, kwargs)), _product(name, args), 0
        if func._overloadpacket in flop_registry:
            # of a product the operands alone: the output's dtype, which may stand behind them, torch does not expect
            shaped = tensors(args) if product else args
            flops = flop_registry[func._overloadpacket](*shaped, **kwargs, out_val=out)
        operator = self.operator or (LINEAR if product else OTHER)
        moved = total_bytes(inputs), total_bytes(outputs)
        self.events.append(Event(operator, self.phase, name, flops, *moved, product))
        if operator == LINEAR and self.phase == "forward":
            # backward: dY, X, W, dX, dW
            self.compulsory[LINEAR, "forward"] += sum(moved)
            self.compulsory[LINEAR, "backward"] += moved[0] + sum(moved)
        return out

    # ------------------------------------------------------------ who does what, and what must move

    def wrap(self, operator: str, function: Callable) -> Callable:
        """`function`, which computes `operator`, observed; for kernels.dispatch.observed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.note_launches()
            before, self.operator = self.operator, operator
            try:
                out = function(*args, **kwargs)
                self.note_launches()
            finally:
                self.operator = before
            # views of its own: what arrives at them comes from outside the operator
            out = tree_map(lambda x: x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x, out)
            self._call(operator, args, kwargs, out)
            ends = {x.grad_fn for x in tensors((args, kwargs)) if x.grad_fn is not None}
            self._walk([x.grad_fn for x in tensors(out)], ends, lambda node: operator)
            return out

        return call

    def _call(self, operator: str, args: tuple, kwargs: Mapping[str, Any], out: Any) -> None:
        record = OPERATORS[operator]
        needs, named = record.saved, dict(zip(record.contract.tensors, args, strict=False))
        outputs = tensors(out)
        if operator == "residual_norm" and named["s"] is None:
            outputs = outputs[1:]  # y is x
        if kwargs.get("return_kv"):
            outputs = outputs[:1]  # keys and values are handed on where they are
        lse = math.prod(tensors(out)[0].shape[:3]) * 4 if "lse" in needs else 0
        self.compulsory[operator, "forward"] += total_bytes(tensors((args, kwargs))) + total_bytes(outputs) + lse
        wanted = [x for x in named.values() if isinstance(x, Tensor) and x.requires_grad]
        if not wanted:
            return
        if operator == "residual_norm" and kwargs.get("dropout") is None and len(wanted) == 3:
            wanted = wanted[1:]  # one gradient serves x and s
        needed = [named[one] for one in needs if named.get(one) is not None] + tensors(out)[: "out" in needs]
        self.compulsory[operator, "backward"] += total_bytes(needed) + total_bytes(wanted) + lse

        def incoming(gradient: Tensor | None) -> None:
            self.compulsory[operator, "backward"] += 0 if gradient is None else tensor_bytes(gradient)

        for x in tensors(out):
            if x.requires_grad:
                x.register_hook(incoming)

    def backward(self, loss: Tensor) -> None:
        """Backward of a whole step's loss; what no operator owns is a linear layer's or other."""
        self._walk([loss.grad_fn], set(), lambda node: LINEAR if "mm" in node.name().lower() else OTHER)
        self.phase = "backward"
        loss.backward()
        self.note_launches()

    def _walk(self, start: list, ends: set, label: Callable[[Any], str]) -> None:
        stack, visited = list(start), set(ends)
        while stack:
            node = stack.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if node not in self._hooked and (label(node) == OTHER or "AccumulateGrad" not in node.name()):
                self._hooked.add(node)
                node.register_prehook(self._enter(label(node)))
                node.register_hook(self._leave)
            stack.extend(parent for parent, _ in node.next_functions)

    def _enter(self, operator: str) -> Callable:
        def enter(gradients: tuple) -> None:
            self.operator = operator

        return enter

    def _leave(self, inputs: tuple, outputs: tuple) -> None:
        self.note_launches()
        self.operator = ""
