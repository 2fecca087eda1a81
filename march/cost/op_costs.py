"""What a training step costs by operator and phase: launches, FLOPs, bytes moved and bytes kept.

Every number is counted: launches are those that the launch code makes, operators of torch those that it dispatches
(march.cost.measure). Declared are the formulas of the fused products (march.cost.flops), what kernels read, in which
order, and write (march.cost.cache), both compared with traces of them, and the optimiser, which is a library's.
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any

import kernels
from march.config import ModelConfig
from march.cost.cache import launch_traffic, product_reads
from march.cost.counter import Allocation, Event
from march.cost.flops import launch_flops
from march.cost.measure import measure
from march.cost.size import total_parameters

LOGITS_BYTES = 200_000_000
PHASES = ("forward", "backward", "optimizer")
# Float32 tensors of an activation's size that are sums, not copies, and exist in no other precision: the cross
# entropy's dh, a share of the vocabulary each, then summed over the chunks of the vocabulary
ACCUMULATORS = {("linear_cross_entropy", "forward"), ("linear_cross_entropy", "backward")}


@dataclass
class OpCost:
    """One operator in one phase. bytes_read, bytes_written: each tensor of a launch or operator of torch once;
    dram_read, dram_written: under the cache model; compulsory: the least that crosses the operator's boundary; saved:
    kept for backward. launches: of fused kernels; calls: operators of torch that move data. names: how often each of
    them ran; moved: its DRAM bytes."""

    operator: str
    phase: str
    launches: int = 0
    calls: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    dram_read: int = 0
    dram_written: int = 0
    compulsory: int = 0
    saved: int = 0
    names: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)

    @property
    def dram(self) -> int:
        return self.dram_read + self.dram_written

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
        """DRAM bytes of forward and backward over the compulsory ones. The optimiser's bytes, the same in both, are
        left out: they would flatter the ratio."""
        return self.step.dram / self.step.compulsory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        made = [{"reason": reason, **vars(one), "dtype": _dtype(one)} for reason, one in self.forbidden]
        found = {one.name: getattr(self, one.name) for one in fields(self)} | {"rows": [asdict(r) for r in self.rows]}
        sums = {"total": asdict(self.total()), "saved": self.total().saved, "dram_over_compulsory": self.ratio}
        return found | sums | {"forbidden": made}


def _dtype(one: Allocation) -> str:
    return str(one.dtype).removeprefix("torch.")


def event_cost(event: Event) -> OpCost:
    """The row of one event alone, without its compulsory traffic."""
    row = OpCost(event.operator, event.phase)
    if event.launch is not None:
        traffic = launch_traffic(event.launch)
        row.launches = 1
        row.flops = launch_flops(event.launch)
        row.bytes_read, row.bytes_written = traffic.reads, traffic.writes
        row.dram_read, row.dram_written = traffic.dram_reads, traffic.writes
        return row
    row.calls, row.flops = 1, event.flops
    row.bytes_read = row.dram_read = event.reads
    row.bytes_written = row.dram_written = event.writes
    if event.product is not None:
        product = event.product
        once = product.batch * (product.m + product.n) * product.k * product.element_size
        # what is not an operand of the product (a sum that it adds to) is read once
        row.dram_read = product_reads(product) + max(0, event.reads - once)
    return row


def optimizer_cost(parameters: int, precision: str) -> OpCost:
    """A library's fused AdamW over `parameters`, weights in float32 and a copy in the working precision.

    Read: the gradient twice (its norm, for clipping, and the update), weight and two moments in float32. Written:
    weight, moments, and in bf16 the working copy. All of it is compulsory: no implementation does with less.
    """
    gradient = 2 if precision == "bf16" else 4
    read = parameters * (2 * gradient + 12)
    written = parameters * (12 + (2 if precision == "bf16" else 0))
    return OpCost("adamw", "optimizer", 0, 0, 0, read, written, read, written, read + written, 0, {"library": 1})


def forbidden(
    allocations: list[Allocation], config: ModelConfig, lengths: tuple[int, int], batch: int
) -> list[tuple[str, Allocation]]:
    """What a step must not make among `allocations`: [L, L] tensors, concatenated keys or values, float32 copies of an
    activation, logits in more than LOGITS_BYTES."""
    encoder, decoder = lengths
    both = encoder + decoder
    exact = {encoder, decoder, both}
    # a kernel may pad lengths to its tiles
    padded = {-(-n // 128) * 128 for n in exact}
    # an activation has a multiple of a stack's tokens as elements, in any layout, and dim_model or more for each
    tokens = (batch * encoder, batch * decoder)
    found: dict[tuple[str, Allocation], None] = {}
    for one in allocations:
        last, size = one.shape[-2:], math.prod(one.shape)
        wide = len(one.shape) >= 3 and all(n in padded for n in last)
        reasons = {
            "[L, L]": len(last) == 2 and (all(n in exact for n in last) or wide),
            "keys or values concatenated": both in one.shape[1:] and len(one.shape) >= 3,
            "float32 copy of an activation": one.dtype.itemsize == 4
            and one.dtype.is_floating_point
            and config.precision == "bf16"
            and any(size % n == 0 and size >= n * config.dim_model for n in tokens)
            and (one.operator, one.phase) not in ACCUMULATORS,
            "logits over 200 MB": one.bytes > LOGITS_BYTES
            and (one.operator == "linear_cross_entropy" or config.vocab_size in one.shape),
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
    configuration's. RuntimeError with fused kernels under TRITON_INTERPRET=1; AccessError where a kernel is not
    declared.
    """
    chosen = precision or config.precision
    measured = measure(config, encoder_length, decoder_length, micro_batch, impl, chosen)
    rows: defaultdict[tuple[str, str], OpCost] = defaultdict(lambda: OpCost("", ""))
    for event in measured.events:
        row, counted = rows[event.operator, event.phase], event_cost(event)
        row.add(counted)
        row.names[event.name] = row.names.get(event.name, 0) + 1
        row.moved[event.name] = row.moved.get(event.name, 0) + counted.dram
    for one in measured.compulsory:
        rows[one.operator, one.phase].compulsory += one.bytes
    for operator, size in measured.saved.items():
        rows[operator, "forward"].saved += size
    rows["adamw", "optimizer"] = optimizer_cost(total_parameters(config), chosen)
    for key, row in rows.items():
        row.operator, row.phase = key
    ordered = sorted(rows.values(), key=lambda row: (PHASES.index(row.phase), -row.dram))
    lengths = (encoder_length, decoder_length)
    made = forbidden(measured.allocations, config, lengths, micro_batch)
    return OpCosts(micro_batch, *lengths, chosen, ordered, measured.peak, made)


@lru_cache(maxsize=64)
def training_flops(config: ModelConfig, encoder_length: int = 921, decoder_length: int = 206) -> int:
    """FLOPs of matrix products that one sequence's forward and backward need, by the `torch` path on meta tensors.

    The recomputation of attention scores in backward is part of it, as it is of the fused kernels. Scores count in
    full under a causal mask.
    """
    return step_costs(config, encoder_length, decoder_length, micro_batch=1, impl="torch").step.flops
