"""What a kernel does with each of its pointers, read from its TTIR: reads it, writes it, both, or neither.

The data flow of pointers is followed from the function's arguments through pointer arithmetic, branches and loops to
tt.load and tt.store. Nothing is guessed: a pointer that ends elsewhere, or that can be one of two arguments, is an
error. Only Triton's front end runs (0.1 s a kernel), no code is generated for a target.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from kernels.compile_only.front_end import make_ttir
from kernels.compile_only.record import Launch

_TYPES = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "float64": "*fp64",
    "int64": "*i64",
    "int32": "*i32",
    "uint8": "*u8",
    "bool": "*i1",
}
_SCALARS = {"float": "fp32", "bool": "u1"}
# results point where their pointer operands point
_MOVES = (
    "tt.addptr",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
    "tt.bitcast",
    "arith.select",
)
_ENDS = {"tt.load": "r", "tt.store": "w", "tt.atomic_rmw": "rw", "tt.atomic_cas": "rw"}
_TERMINATORS = ("scf.yield", "scf.condition")


class RoleError(RuntimeError):
    """The role of a pointer cannot be read from the kernel."""


@dataclass(frozen=True)
class Roles:
    """roles: for each pointer argument "r", "w", "rw" or "". has_products: the kernel contains a tt.dot."""

    roles: dict[str, str]
    has_products: bool


class _Flow:
    """Sets of values that may point into the same arguments (union-find), and what is done through them."""

    def __init__(self, kernel: str):
        self.kernel = kernel
        self.parent: dict[int, int] = {}
        self.used: list[tuple[int, str]] = []
        self.has_products = False
        # terminators by the region that they end, until the operation that owns the region is visited
        self.pending: dict[int, Any] = {}

    def root(self, value: int) -> int:
        while self.parent.setdefault(value, value) != value:
            value = self.parent[value]
        return value

    def join(self, *values: Any) -> None:
        pointers = [value.id() for value in values if "!tt.ptr" in str(value.get_type())]
        for pointer in pointers[1:]:
            self.parent[self.root(pointer)] = self.root(pointers[0])

    def visit(self, op: Any) -> None:
        """Called after the operations inside `op`."""
        name = op.get_name()
        operands = [op.get_operand(i) for i in range(op.get_num_operands())]
        self.has_products |= name.startswith("tt.dot")
        if name in _TERMINATORS:
            self.pending[op.get_block().get_parent().id()] = op
        elif name == "scf.for":
            self._carry(op, operands[3:], 1)
        elif name == "scf.if":
            for region in range(op.get_num_regions()):
                end = self.pending.pop(op.get_region(region).id(), None)
                if end is not None:
                    for i in range(end.get_num_operands()):
                        self.join(op.get_result(i), end.get_operand(i))
        elif name == "scf.while":
            self._while(op, operands)
        elif any("!tt.ptr" in str(x.get_type()) for x in operands):
            if name in _MOVES:
                self.join(op.get_result(0), *operands)
            elif name in _ENDS and not any("!tt.ptr" in str(x.get_type()) for x in operands[1:]):
                self.used.append((operands[0].id(), _ENDS[name]))
            else:
                raise RoleError(f"{self.kernel}: expected pointers in loads, stores and moves, got one in {name}")

    def _carry(self, op: Any, initial: list, first: int) -> None:
        end = self.pending.pop(op.get_region(0).id())
        block = end.get_block()
        for i, value in enumerate(initial):
            self.join(value, block.arg(first + i), end.get_operand(i), op.get_result(i))

    def _while(self, op: Any, initial: list) -> None:
        condition = self.pending.pop(op.get_region(0).id())
        end = self.pending.pop(op.get_region(1).id())
        before, after = condition.get_block(), end.get_block()
        for i, value in enumerate(initial):
            self.join(value, before.arg(i), end.get_operand(i))
        for i in range(op.get_num_results()):
            self.join(op.get_result(i), condition.get_operand(i + 1), after.arg(i))


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any]]:
    """(types, constants) by argument, as Triton's front end takes them; an argument None is a constant."""
    types, constants = {}, dict(launch.constants)
    for argument in launch.arguments:
        if argument.is_tensor:
            types[argument.name] = _TYPES[argument.dtype]
        elif argument.value is None:
            constants[argument.name] = None
        elif argument.dtype == "int":
            types[argument.name] = "i32" if -(2**31) <= argument.value < 2**31 else "i64"
        else:
            types[argument.name] = _SCALARS[argument.dtype]
    return types | dict.fromkeys(constants, "constexpr"), constants


@cache
def _roles(module: str, kernel: str, arch: str, types: tuple, constants: tuple) -> Roles:
    function = getattr(importlib.import_module(module), kernel)
    from triton._C.libtriton import ir, passes

    signature = {name: dict(types)[name] for name in function.arg_names}
    ttir = make_ttir(function, signature, dict(constants), {}, arch)
    manager = ir.pass_manager(ttir.context)
    passes.common.add_inliner(manager)
    passes.common.add_canonicalizer(manager)
    manager.run(ttir, "roles")
    flow = _Flow(kernel)
    ttir.walk(flow.visit)
    entry = ttir.get_function(kernel)
    names = [name for name in function.arg_names if signature[name] != "constexpr"]
    owners: dict[int, str] = {}
    for position, name in enumerate(names):
        if signature[name].startswith("*"):
            root = flow.root(entry.args(position).id())
            # two arguments in one set: what is done through it cannot be told apart
            owners[root] = "" if root in owners else name
    found = dict.fromkeys((name for name in names if signature[name].startswith("*")), "")
    for value, role in flow.used:
        owner = owners.get(flow.root(value))
        if not owner:
            raise RoleError(
                f"{kernel}: expected every access to go through one argument, got one that may be of several"
            )
        found[owner] = "".join(sorted(set(found[owner] + role)))
    return Roles(found, flow.has_products)


def roles(launch: Launch) -> Roles:
    """Roles of the pointer arguments of a recorded launch; RoleError where one cannot be decided."""
    types, constants = _signature(launch)
    key = tuple(sorted(types.items())), tuple(sorted(constants.items()))
    return _roles(launch.module, launch.kernel, launch.arch, *key)
