"""What an operator refuses: ValueError with what was expected, what came, and what to do.

A `Contract` holds the shapes of an operator's arguments as its documentation writes them:

    Contract("attention", q="B Lq H K", k="B|1 Lk G K", v="B|1 Lk G Kv", key_lengths="int B; one length a sequence")

A name is a size: the first argument that has it gives its value, the others must agree. "B|1" is that of B, or 1 (a
name of its own: what it is in k, it is in v; "B'|1" is another such). A number is itself. Before the axes may stand a
type, int64, int (of 32 or 64 bits) or bool; other arguments are floating, of one dtype. Behind a semicolon: what to do.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.dropout import Dropout

MAX_HEAD_DIM = 512
_TYPES = {"int64": (torch.int64,), "int": (torch.int32, torch.int64), "bool": (torch.bool,)}
_SHOWN = {"int": "integers"}


def check(condition: bool, operator: str, expected: str, got: object, fix: str) -> None:
    if not condition:
        raise ValueError(f"{operator}: expected {expected}, got {got}; {fix}")


@dataclass(frozen=True)
class Argument:
    """One argument of a Contract. type: a key of _TYPES, or "" for floating."""

    name: str
    type: str
    axes: tuple[str, ...]
    fix: str

    @classmethod
    def parse(cls, name: str, text: str) -> "Argument":
        shape, _, fix = text.partition("; ")
        words = shape.split()
        kind = words.pop(0) if words[0] in _TYPES else ""
        return cls(name, kind, tuple(words), fix or "sizes of one name are equal: reshape or slice it")

    def expected(self, sizes: dict[str, int]) -> str:
        def shown(axis: str) -> str:
            base, _, other = axis.partition("|")
            value = sizes.get(axis, sizes.get(base.rstrip("'")) if other else None)
            return base if value is None else f"{value} or 1" if other and axis not in sizes else str(value)

        kind = f"{_SHOWN.get(self.type, self.type)} " if self.type else ""
        return f"{self.name} as {kind}[{', '.join(shown(axis) for axis in self.axes)}]"

    def check(self, operator: str, x: Tensor, sizes: dict[str, int]) -> None:
        """Binds its free sizes in `sizes`, or raises."""
        right = x.dim() == len(self.axes) and (not self.type or x.dtype in _TYPES[self.type])
        # bound beside `sizes`, so that a refusal names what was free before
        found = dict(sizes)
        for axis, n in zip(self.axes, x.shape, strict=False) if right else ():
            base, _, other = axis.partition("|")
            if base.isdigit():
                right = right and n == int(base)
            elif axis in found:
                right = right and n == found[axis]
            else:
                right = right and (not other or n == 1 or n == found[base.rstrip("'")])
                found[axis] = n
        if not right:
            got = f"{x.dtype} {list(x.shape)}" if self.type else list(x.shape)
            check(False, operator, self.expected(sizes), got, self.fix)
        sizes.update(found)


def once_differentiable(backward: Callable) -> Callable:
    """A backward of plain operations that is not differentiable. torch's own of this name leaves what it cannot follow
    out of a second derivative, without a word, where autograd.grad is asked for some inputs alone."""

    @functools.wraps(backward)
    def first(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("kernels: expected a first derivative, got create_graph=True; use impl='reference'")
        return backward(ctx, *gradients)

    return first


def check_dense(operator: str, arguments: dict[str, object], optional: dict[str, bool]) -> None:
    """Those named in `optional` are tensors, or None where True stands, and strided: they have the shape and the memory
    that all else reads."""
    for name, may_lack in optional.items():
        x = arguments.get(name)
        if not isinstance(x, Tensor):
            lacks = x is None and (may_lack or name not in arguments)  # Python itself names what is not given
            check(lacks, operator, f"{name} as a tensor", type(x).__name__, "convert it with torch.as_tensor")
        else:
            got = "a nested one" if x.is_nested else x.layout
            dense = got == torch.strided
            check(dense, operator, f"{name} as a dense tensor", got, f"convert it with {name}.to_dense() or pad it")


class Contract:
    """The arguments of an operator, in their order; see above."""

    def __init__(self, operator: str, **arguments: str):
        self.operator = operator
        self.arguments = {name: Argument.parse(name, text) for name, text in arguments.items()}
        # what is positional: lengths and masks are keyword arguments
        self.tensors = tuple(name for name, one in self.arguments.items() if one.type not in ("int", "bool"))

    def check(self, dropouts: Sequence[Dropout | None] = (), **given: Tensor | None) -> dict[str, int]:
        """Sizes by name of what is given; ValueError for another shape, dtype or device."""
        op, tensors = self.operator, {name: x for name, x in given.items() if x is not None}
        sizes: dict[str, int] = {}
        for name, x in tensors.items():
            self.arguments[name].check(op, x, sizes)
        first = next(name for name in tensors if not self.arguments[name].type)
        dtype, device = tensors[first].dtype, tensors[first].device
        fix = f"convert it with {first}.to(torch.float32)"
        check(dtype.is_floating_point, op, f"{first} of a floating dtype", dtype, fix)
        for name, x in tensors.items():
            if not self.arguments[name].type:
                fix = f"convert it with {name}.to({dtype})"
                check(x.dtype == dtype, op, f"{name} as {dtype} like {first}", x.dtype, fix)
            fix = f"move it with {name}.to({first}.device)"
            check(x.device == device, op, f"{name} on {device} like {first}", x.device, fix)
        for one in dropouts:
            if one is not None:
                fix = "move it to the operator's device"
                check(one.rng.device == device, op, f"dropout.rng on {device}", one.rng.device, fix)
        return sizes


def check_heads(contract: Contract, sizes: dict[str, int]) -> None:
    """Numbers of key/value heads G, G' that divide H, and head widths K, Kv that attention has."""
    op, heads, fix = contract.operator, sizes["H"], "repeat or regroup the heads"
    for axis in ("G", "G'"):
        n = sizes.get(axis, heads)
        check(n > 0 and heads % n == 0, op, f"a number of key/value heads that divides {heads}", n, fix)
    for axis in ("K", "Kv"):
        n = sizes.get(axis, sizes["K"])
        where = next((x.name for x in contract.arguments.values() if axis in x.axes), "")
        expected = f"a head width from 1 to {MAX_HEAD_DIM} in {where}"
        check(1 <= n <= MAX_HEAD_DIM, op, expected, n, "use more, narrower heads")


def check_indices(operator: str, name: str, indices: Tensor, rows: int, ignored: int | None = None) -> None:
    """ValueError for a table without rows. With KERNELS_DEBUG=1 in the environment ValueError names the first index
    outside [0, rows) other than `ignored`, for which it waits for the device."""
    check(rows > 0 or indices.numel() == 0, operator, "a vocabulary of at least 1", rows, "give a table [V, D]")
    if torch.compiler.is_compiling() or os.environ.get("KERNELS_DEBUG") != "1":
        return
    if isinstance(indices, FakeTensor) or indices.device.type == "meta":
        return
    wrong = (indices < 0) | (indices >= rows)
    if ignored is not None:
        wrong &= indices != ignored
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        expected = f"{name} in [0, {rows})" + ("" if ignored is None else f" or {ignored}")
        check(False, operator, expected, f"{indices[tuple(at)].item()} at {at}", "look at how they were made")
