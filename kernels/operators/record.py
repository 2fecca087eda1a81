"""What is known of an operator besides how to compute it: one record, which everything that asks reads.

The dispatch (where its implementations are), the API (the contract of its arguments), the self-test and the tests (what
it is compared at, on which numbers), the tuner (tiles to try), the cost model (what backward needs, what its kernels
read, write and multiply) and the compile report (limits) know an operator from here and from nowhere else.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.validation import Contract, check

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
Sizes = Mapping[str, int]
ENCODER_LENGTH, DECODER_LENGTH, MICRO_BATCH, VOCABULARY, POSITIONS = 921, 206, 64, 30_000, 1024


class Draw:
    """Numbers from a seed, drawn on the CPU and then moved: the same on every device; of meta tensors the shapes."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device, self.meta = dtype, device, torch.device(device).type == "meta"

    def normal(self, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        if self.meta:
            return torch.empty(shape, dtype=self.dtype, device="meta")
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (torch.randn(shape, generator=self.generator, dtype=wide) * scale).to(self.device, self.dtype)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        if self.meta:
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(0, max(high, 1), shape, generator=self.generator).to(self.device)


Values = Callable[[Draw, Sizes, Sequence[int]], Tensor]


def normalised(axis: str) -> Values:
    """Values whose product with others of variance 1 over `axis` has variance 1."""
    return lambda draw, sizes, shape: draw.normal(shape, scale=sizes[axis] ** -0.5)


@dataclass(frozen=True)
class Kernel:
    """A fused kernel for the cost model. writes: pointers that it writes, it reads the others; flops: of a launch, by
    its arguments' names."""

    writes: str
    flops: Callable[[Any], int] | None = None


def _always(constants: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Limit:
    """Limits of the kernels whose name matches `kernel` (a shell pattern) and whose constants satisfy `where`.

    issue_per_hmma, shared_per_tensor: exclusive and inclusive upper bounds for `loop`: every innermost loop with
    products ("every"), or the one with fewest slots a product ("main", where other loops are masked edges).
    half_precision_only: the bound on products is for float16 and bfloat16; float32 has other instructions.
    """

    kernel: str
    where: Callable[[Mapping[str, Any]], bool] = _always
    no_spills: bool = False
    resident_warps: int | None = None
    issue_per_hmma: float | None = None
    shared_per_tensor: float | None = None
    no_duplicates: bool = False
    loop: str = "every"
    architectures: tuple[str, ...] = ("sm_86",)


@dataclass(frozen=True)
class Tuned:
    """One entry of the tuner. committed: its fields on an architecture. The operator runs at dimensions `dims` with
    `kwargs` and dropout in `drops`, forward and, where the tile is of backward, backward."""

    name: str
    committed: Callable[[str], dict[str, Any]]
    alternatives: tuple[dict[str, Any], ...]
    dims: Mapping[str, Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    drops: tuple[str, ...] = ("dropout",)
    dtype: torch.dtype = torch.bfloat16
    backward: bool = True


@dataclass(frozen=True)
class Operator:
    """contract: its tensors, in their order, and what may stand in keyword arguments; forms: contracts of calls that
    give some of these tensors, or other shapes of them (sizes name one by its number, "form").
    portable: the module of its eager implementation; the formula is in kernels.reference, the kernels in
    kernels.fused.NAME; libraries: other implementations, in kernels.libraries.
    sizes: the axes of the contract from the dimensions that tests and bench speak of; values: of tensors that are not
    drawn from N(0, 1). checked: the arguments at which it is compared where no step was recorded, beside dropout in
    `drops` and key lengths where the contract has them. differentiable: how many of the outputs are, None for all.
    saved: what any backward must see again ("out": the first output, "lse": a float32 a row of attention); flops:
    products that the formula needs, forward and backward, two for each multiply-add.
    kernels, tiles, limits: of its fused kernels, by name."""

    contract: Contract
    portable: str
    sizes: Callable[..., dict[str, int]]
    saved: tuple[str, ...]
    checked: dict[str, Any]
    drops: tuple[str, ...] = ("dropout",)
    differentiable: int | None = None
    values: Mapping[str, Values] = field(default_factory=dict)
    flops: Callable[[Sizes, Mapping[str, Any]], tuple[int, int]] = lambda sizes, kwargs: (0, 0)
    forms: tuple[Contract, ...] = ()
    libraries: tuple[str, ...] = ()
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    tiles: Callable[[], list[Tuned]] = list
    limits: tuple[Limit, ...] = ()

    @property
    def name(self) -> str:
        return self.contract.operator

    @property
    def fused_module(self) -> str:
        return f"kernels.fused.{self.name}"

    def module(self, implementation: str) -> Any:
        """The module of an implementation: torch, reference, triton, or a library's name."""
        named = {"torch": self.portable, "reference": "kernels.reference", "triton": self.fused_module}
        return importlib.import_module(named.get(implementation, f"kernels.libraries.{implementation}"))

    def contract_of(self, tensors: Mapping[str, Any]) -> Contract:
        """The contract of a call with these tensors, by name, of which some may be None."""
        given = tuple(name for name, x in tensors.items() if x is not None)
        found = [form for form in self.forms if form.tensors == given]
        allowed = " or ".join(", ".join(form.tensors) for form in self.forms)
        check(bool(found or not self.forms), self.name, allowed, ", ".join(given), "give the others, or leave one out")
        return found[0] if found else self.contract

    def inputs(
        self, *dims: Any, seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu",
        **named: Any,
    ) -> dict[str, Tensor | None]:  # fmt: skip
        """Its tensors by name, at dimensions as `sizes` takes them; the same numbers on every device."""
        sizes, draw = self.sizes(*dims, **named), Draw(seed, dtype, device)
        contract = self.forms[sizes["form"]] if self.forms else self.contract
        drawn = {}
        for name in sorted(contract.tensors, key=lambda name: not contract.arguments[name].type):
            shape = [sizes[axis] for axis in contract.arguments[name].axes]
            drawn[name] = self.draw(name, draw, sizes, shape)
        return {name: drawn[name] for name in contract.tensors}

    def draw(self, name: str, draw: Draw, sizes: Sizes, shape: Sequence[int]) -> Tensor:
        return self.values[name](draw, sizes, shape) if name in self.values else draw.normal(shape)
