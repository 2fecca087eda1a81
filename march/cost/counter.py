"""Counts what a step dispatches on meta tensors: operators of torch, launches of kernels, bytes that live.

A registered operator of `kernels` is opaque to torch: here the function behind it runs under the counter instead, so
that its library products and allocations are seen like everyone's, and its launches are those that the active
recording (`kernels.compile_only`) gained meanwhile. The operator itself counts nothing.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.compile_only.record import Launch

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
    """One operator of torch (reads, writes: each tensor once; product where it is one) or one launch."""

    operator: str
    phase: str
    name: str
    flops: int = 0
    reads: int = 0
    writes: int = 0
    product: Product | None = None
    launch: Launch | None = None
    # numbers of the storages it touches and their bytes, for a boundary that counts each once
    touched: tuple[tuple[int, int], ...] = ()
    # number of the node of the autograd graph that runs it; 0 in forward
    node: int = 0


@dataclass(frozen=True)
class Allocation:
    """A new storage: who made it and what it was first seen as."""

    operator: str
    phase: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


def tensor_bytes(x: Tensor) -> int:
    """Bytes of the distinct elements: dimensions of stride 0 count once."""
    distinct = math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return distinct * x.element_size() if x.numel() else 0


def tensors(tree: Any) -> list[Tensor]:
    """Those that have a storage; a sparse one is made of two that do."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout is torch.strided]


def total_bytes(many: Iterable[Tensor]) -> int:
    return sum(tensor_bytes(x) for x in many)


def python_function(name: str) -> Callable | None:
    """The function behind the registered operator `name` where it is one of `kernels`, else None."""
    definition = OPDEFS.get(name)
    if definition is None or not definition._init_fn.__module__.startswith("kernels."):
        return None
    return definition._init_fn


def _product(name: str, arguments: tuple) -> Product | None:
    if name not in _PRODUCTS:
        return None
    a, b = arguments[1:3] if "add" in name else arguments[:2]
    batch = a.shape[0] if a.dim() == 3 else 1
    size = a.element_size()
    return Product(batch, a.shape[-2], b.shape[-1], a.shape[-1], size, min(_alignment(a), _alignment(b)))


def _alignment(x: Tensor) -> int:
    """Bytes, up to 16, that divide every row's start; a row is what lies next to each other."""
    steps = [n for size, n in zip(x.shape, x.stride(), strict=True) if n != 1 and size > 1]
    return math.gcd(16, *(n * x.element_size() for n in (x.storage_offset(), *steps)))


class Counter(TorchDispatchMode):
    """events, allocations in their order; live: bytes alive now, peak: the most. operator, phase: labels of what is
    dispatched next, "" for what no operator owns; node: see Event. launches: the list that a recording grows."""

    def __init__(self, launches: list[Launch] | None = None):
        super().__init__()
        self.events: list[Event] = []
        self.allocations: list[Allocation] = []
        self.operator, self.phase = "", "forward"
        self.live = self.peak = self.node = 0
        self.seen: dict[int, int] = {}
        self._launches = launches if launches is not None else []
        self._noted = len(self._launches)
        self._numbers = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep torch.compile out of a mode, where nobody calls it, torch imports it, 1.5 s."""
        return False

    def ignore(self, x: Tensor) -> None:
        """Takes the storage of `x` as one that is there anyhow, a parameter's."""
        self._numbers += 1
        self.seen[x.untyped_storage()._cdata] = self._numbers

    def _track(self, x: Tensor, name: str) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.ignore(x)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.allocations.append(Allocation(self.operator or OTHER, self.phase, name, x.dtype, tuple(x.shape), size))
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.seen.pop(key, None)
        self.live -= size

    def _number(self, x: Tensor) -> int:
        """Of the storage of `x`; addresses are used again, numbers are not."""
        key = x.untyped_storage()._cdata
        if key not in self.seen:
            self.ignore(x)
        return self.seen[key]

    def note_launches(self) -> None:
        """Takes up the launches since the last call, under the current labels."""
        for launch in self._launches[self._noted :]:
            self.events.append(Event(self.operator or OTHER, self.phase, launch.kernel, launch=launch))
        self._noted = len(self._launches)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        inner = python_function(name)
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

        packet = func._overloadpacket
        product = _product(name, args)
        flops = 0
        if packet in flop_registry:
            # of a product the operands alone: the output's dtype, which may stand behind them, torch does not expect
            shaped = tensors(args) if product else args
            flops = flop_registry[packet](*shaped, **kwargs, out_val=out)
        inputs = tensors((args, kwargs))
        self.events.append(
            Event(
                self.operator or (LINEAR if product else OTHER),
                self.phase,
                name,
                flops,
                total_bytes(inputs),
                total_bytes(outputs),
                product,
                node=self.node,
                touched=tuple((self._number(x), tensor_bytes(x)) for x in (*inputs, *outputs)),
            )
        )
        return out
