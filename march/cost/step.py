"""What a training step costs by operator and phase: launches, FLOPs, bytes moved and kept; parameters by part.

One forward and backward runs on meta tensors under a counter: launches are those that the launch code makes, operators
of torch those that it dispatches, parameters those of the module. Declared are the FLOPs of the fused kernels and what
they write, in their operators' records (the emulator's counts of them agree, a test says), and the optimiser, which is
a library's.
"""

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch

import kernels
from kernels.compile_only import recording
from kernels.dispatch import OPERATORS, fused_available, observed
from march.config import ModelConfig, resolve
from march.cost.counter import Allocation, Counter
from march.model import Transformer
from march.model.layers import Sublayer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# the architecture whose tiles the launches take
ARCH = "sm_86"
LOGITS_BYTES = 200_000_000
PHASES = ("forward", "backward", "optimizer")


@lru_cache(maxsize=256)
def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's. A part is a stack and the class of the layer that has them."""
    with torch.device("meta"):
        model = Transformer(resolve(config), "torch")
    modules = dict(model.named_modules())
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        stack, *path = name.split(".")
        owners = [modules[".".join([stack, *path[:depth]])] for depth in range(1, len(path))]
        layer = next((owner for owner in owners if isinstance(owner, Sublayer)), None)
        part = stack.split("_")[0]  # what belongs to no stack
        if len(path) > 1:
            words = "Norms" if type(owners[-1]).__name__ == "Norm" else type(layer or owners[-1]).__name__
            part = f"{stack}{re.sub('(?=[A-Z])', ' ', words).lower()}"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def total_parameters(config: ModelConfig) -> int:
    """Parameters of the model, tied ones once, dead ones included."""
    return sum(parameters(config).values())


# ---------------------------------------------------------------- one step on meta tensors


def inputs(config: ModelConfig, encoder_length: int, decoder_length: int, batch: int) -> dict[str, torch.Tensor]:
    """A batch on the meta device as the trainer hands it over: packed sequences, so no padding mask."""
    shapes = {"input_ids": encoder_length, "decoder_input_ids": decoder_length, "labels": decoder_length}
    with torch.device("meta"):
        ids = {name: torch.empty(batch, length, dtype=torch.int64) for name, length in shapes.items()}
        return ids | {"dropout_state": torch.empty(3, dtype=torch.int64)}


def fused_operators(impl: kernels.Impl) -> list[str]:
    """Operators that `impl` computes by fused kernels on a GPU; "auto" does where there are any."""
    names = {operator: impl if isinstance(impl, str) else impl.get(operator, "auto") for operator in OPERATORS}
    return [o for o, name in names.items() if name == "triton" or (name == "auto" and fused_available(o))]


def measure(
    config: ModelConfig,
    encoder_length: int,
    decoder_length: int,
    micro_batch: int,
    impl: kernels.Impl,
    precision: str,
    arch: str = ARCH,
    compile: bool | Callable[[str], bool] = False,
) -> Counter:
    """The counter of one micro-batch's forward and backward. RuntimeError with fused operators under
    TRITON_INTERPRET=1, where nothing launches. arch, compile: of the launches, as kernels.compile_only.recording takes
    them."""
    fused = fused_operators(impl)
    # meta tensors are on no GPU: what "auto" takes there is said by name
    chosen = impl if impl != "auto" else {o: "triton" if o in fused else "torch" for o in OPERATORS}
    with torch.device("meta"):
        model = Transformer(resolve(config), chosen).to(DTYPES[precision]).train()
    batch = inputs(config, encoder_length, decoder_length, micro_batch)
    recorded: contextlib.AbstractContextManager = recording(arch, compile) if fused else contextlib.nullcontext([])
    with recorded as launches, Counter(launches) as counter:
        for parameter in model.parameters():
            counter.ignore(parameter)
        with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda x: x), observed(counter.wrap):
            loss = model(**batch).loss
        counter.backward(loss)
    return counter


# ---------------------------------------------------------------- the rows


@dataclass
class OpCost:
    """One operator in one phase. bytes_read, bytes_written: each tensor of a launch or operator of torch once;
    compulsory: the least that crosses the operator's boundary; saved: kept for backward. launches: of fused kernels;
    calls: operators of torch that move data. names: how often each of them ran; moved: its bytes."""

    operator: str
    phase: str
    launches: int = 0
    calls: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    compulsory: int = 0
    saved: int = 0
    names: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def add(self, other: "OpCost") -> None:
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


NUMBERS = tuple(one.name for one in fields(OpCost) if one.type is int)


@dataclass
class OpCosts:
    """rows by operator and phase; peak: most bytes that live at one time beyond weights, gradients included;
    forbidden: why a step must not make a tensor, and the tensor, of which nothing is expected."""

    micro_batch: int
    encoder_length: int
    decoder_length: int
    precision: str
    rows: list[OpCost]
    peak: int
    forbidden: list[tuple[str, Allocation]]

    def total(self, *phases: str) -> OpCost:
        """Sum of the rows of `phases`, by default of all."""
        total = OpCost("total", "+".join(phases) or "all")
        for row in self.rows:
            if not phases or row.phase in phases:
                total.add(row)
        return total

    @property
    def step(self) -> OpCost:
        """Of forward and backward."""
        return self.total("forward", "backward")

    @property
    def ratio(self) -> float:
        """Bytes of forward and backward over the compulsory ones. The optimiser's, the same in both, are left out: they
        would flatter the ratio."""
        return self.step.bytes / self.step.compulsory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        made = [
            {"reason": reason, **vars(one), "dtype": str(one.dtype).removeprefix("torch.")}
            for reason, one in self.forbidden
        ]
        rows = {"rows": [asdict(row) for row in self.rows], "total": asdict(self.total())}
        return vars(self) | rows | {"saved": self.step.saved, "over_compulsory": self.ratio, "forbidden": made}


def optimizer_cost(parameters: int, precision: str) -> OpCost:
    """A library's fused AdamW over `parameters`, weights in float32 and a copy in the working precision.

    Read: the gradient twice (its norm, for clipping, and the update), weight and two moments in float32. Written:
    weight, moments, and in bf16 the working copy. All of it is compulsory: no implementation does with less.
    """
    gradient, copy = (2, 2) if precision == "bf16" else (4, 0)
    read, written = parameters * (2 * gradient + 12), parameters * (12 + copy)
    return OpCost("adamw", "optimizer", 0, 0, 0, read, written, read + written, 0, {"library": 1})


def forbidden(
    allocations: list[Allocation], config: ModelConfig, lengths: tuple[int, int], batch: int
) -> list[tuple[str, Allocation]]:
    """What a step must not make among `allocations`: [L, L] tensors, concatenated keys or values, float32 copies of an
    activation, logits in more than LOGITS_BYTES."""
    both = sum(lengths)
    exact = {*lengths, both}
    # a kernel may pad lengths to its tiles
    padded = {-(-n // 128) * 128 for n in exact}
    # an activation has a multiple of a stack's tokens as elements, in any layout, and dim_model or more for each
    tokens = [batch * length for length in lengths]
    found: dict[tuple[str, Allocation], None] = {}
    for one in allocations:
        last, size = one.shape[-2:], math.prod(one.shape)
        wide = len(one.shape) >= 3 and all(n in padded for n in last)
        entropy = one.operator == "linear_cross_entropy"
        reasons = {
            "[L, L]": len(last) == 2 and (all(n in exact for n in last) or wide),
            "keys or values concatenated": both in one.shape[1:] and len(one.shape) >= 3,
            # the cross entropy's dh is a sum of shares of the vocabulary in float32, no copy
            "float32 copy of an activation": one.dtype.itemsize == 4
            and one.dtype.is_floating_point
            and config.precision == "bf16"
            and any(size % n == 0 and size >= n * config.dim_model for n in tokens)
            and not entropy,
            "logits over 200 MB": one.bytes > LOGITS_BYTES and (entropy or config.vocab_size in one.shape),
        }
        found |= {(reason, one): None for reason, is_so in reasons.items() if is_so}
    return list(found)


def step_costs(
    config: ModelConfig,
    encoder_length: int = 921,
    decoder_length: int = 206,
    *,
    micro_batch: int = 64,
    impl: kernels.Impl = "triton",
    precision: str | None = None,
) -> OpCosts:
    """Costs of one micro-batch's forward and backward and one optimiser step.

    impl: see kernels.dispatch; "auto" takes the fused kernels, as on a GPU. precision: "bf16" or "fp32", by default the
    configuration's. RuntimeError with fused kernels under TRITON_INTERPRET=1; LookupError where a kernel is not
    declared.
    """
    chosen, lengths = precision or config.precision, (encoder_length, decoder_length)
    counter = measure(config, *lengths, micro_batch, impl, chosen)
    rows: defaultdict[tuple[str, str], OpCost] = defaultdict(lambda: OpCost("", ""))
    for event in counter.events:
        row, launched = rows[event.operator, event.phase], int(event.launch is not None)
        row.add(OpCost("", "", launched, 1 - launched, event.flops, event.reads, event.writes))
        row.names[event.name] = row.names.get(event.name, 0) + 1
        row.moved[event.name] = row.moved.get(event.name, 0) + event.reads + event.writes
    for key, size in counter.compulsory.items():
        rows[key].compulsory = size
    for operator, size in counter.saved.items():
        rows[operator, "forward"].saved = size
    rows["adamw", "optimizer"] = optimizer_cost(total_parameters(config), chosen)
    for key, row in rows.items():
        row.operator, row.phase = key
    ordered = sorted(rows.values(), key=lambda row: (PHASES.index(row.phase), -row.bytes))
    made = forbidden(counter.allocations, config, lengths, micro_batch)
    return OpCosts(micro_batch, *lengths, chosen, ordered, counter.peak, made)


@lru_cache(maxsize=64)
def training_flops(config: ModelConfig, encoder_length: int = 921, decoder_length: int = 206) -> int:
    """FLOPs of matrix products that one sequence's forward and backward need, by the `torch` path on meta tensors.

    The recomputation of attention scores in backward is part of it, as it is of the fused kernels. Scores count in
    full under a causal mask.
    """
    return step_costs(config, encoder_length, decoder_length, micro_batch=1, impl="torch").step.flops
