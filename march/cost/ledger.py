"""The ledger of a training step: launches, FLOPs, bytes moved and bytes kept, by operator and phase.

Every number is counted: launches are those that the launch code makes, operators of torch those that it dispatches
(march.cost.measure). Declared are the formulas of the fused products (march.cost.flops), what kernels read, in which
order, and write (march.cost.cache), both compared with traces of them, and the optimiser, which is a library's.
"""

import math
from dataclasses import asdict, dataclass, field
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
# Float32 tensors of an activation's size that are sums, not copies, and exist in no other precision.
ACCUMULATORS = {
    ("linear_cross_entropy", "forward"): "dh, a share of the vocabulary each",
    ("linear_cross_entropy", "backward"): "dh, summed over the chunks of the vocabulary",
}


@dataclass
class Row:
    """One operator in one phase. bytes_read, bytes_written: each tensor of a launch or operator of torch once;
    dram_read, dram_written: under the cache model; boundary: the least at the operator's boundary; saved: kept for
    backward. launches: of fused kernels; calls: operators of torch that move data. names: how often each of them ran;
    moved: its DRAM bytes."""

    operator: str
    phase: str
    launches: int = 0
    calls: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    dram_read: int = 0
    dram_written: int = 0
    boundary: int = 0
    saved: int = 0
    names: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)

    @property
    def dram(self) -> int:
        return self.dram_read + self.dram_written

    def add(self, other: "Row") -> None:
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


NUMBERS = (
    "launches",
    "calls",
    "flops",
    "bytes_read",
    "bytes_written",
    "dram_read",
    "dram_written",
    "boundary",
    "saved",
)


@dataclass(frozen=True)
class Forbidden:
    """A tensor that a step must not make, and why."""

    reason: str
    operator: str
    phase: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass
class Ledger:
    """rows by operator and phase; peak: most bytes that live at one time beyond weights, gradients included;
    forbidden: what a step must not make, of which nothing is expected."""

    micro_batch: int
    encoder_length: int
    decoder_length: int
    precision: str
    rows: list[Row]
    peak: int
    forbidden: list[Forbidden]

    def total(self, *phases: str) -> Row:
        """Sum of the rows of `phases`, by default of all."""
        total = Row("total", "+".join(phases) or "all")
        for row in self.rows:
            if not phases or row.phase in phases:
                total.add(row)
        return total

    @property
    def saved(self) -> int:
        return self.total().saved

    @property
    def ratio(self) -> float:
        """DRAM bytes of forward and backward over the boundaries' minimum. The optimiser's bytes, the same in both,
        are left out: they would flatter the ratio."""
        step = self.total("forward", "backward")
        return step.dram / step.boundary

    def row(self, operator: str, phase: str) -> Row:
        return next(row for row in self.rows if (row.operator, row.phase) == (operator, phase))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "micro_batch": self.micro_batch,
            "encoder_length": self.encoder_length,
            "decoder_length": self.decoder_length,
            "precision": self.precision,
            "rows": [asdict(row) for row in self.rows],
            "total": asdict(self.total()),
            "saved": self.saved,
            "peak": self.peak,
            "dram_over_boundary": self.ratio,
            "forbidden": [asdict(one) for one in self.forbidden],
        }


def entry(event: Event) -> Row:
    """The row of one event alone, the boundary left out."""
    row = Row(event.operator, event.phase)
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


def optimizer_row(parameters: int, precision: str) -> Row:
    """A library's fused AdamW over `parameters`, weights in float32 and a copy in the working precision.

    Read: the gradient twice (its norm, for clipping, and the update), weight and two moments in float32. Written:
    weight, moments, and in bf16 the working copy. The boundary is the same: no implementation does with less.
    """
    gradient = 2 if precision == "bf16" else 4
    read = parameters * (2 * gradient + 12)
    written = parameters * (12 + (2 if precision == "bf16" else 0))
    return Row("adamw", "optimizer", 0, 0, 0, read, written, read, written, read + written, 0, {"library": 1})


def forbidden(
    allocations: list[Allocation], config: ModelConfig, lengths: tuple[int, int], batch: int
) -> list[Forbidden]:
    """What a step must not make among `allocations`: [L, L] tensors, concatenated keys or values, float32 copies of an
    activation, logits in more than LOGITS_BYTES."""
    encoder, decoder = lengths
    both = encoder + decoder
    exact = {encoder, decoder, both}
    # a kernel may pad lengths to its tiles
    padded = {-(-n // 128) * 128 for n in exact}
    # an activation has a multiple of a stack's tokens as elements, in any layout, and dim_model or more for each
    tokens = (batch * encoder, batch * decoder)
    found: dict[tuple, Forbidden] = {}
    for one in allocations:
        last = one.shape[-2:]
        wide = len(one.shape) >= 3 and all(n in padded for n in last)
        reasons = {
            "[L, L]": len(last) == 2 and (all(n in exact for n in last) or wide),
            "keys or values concatenated": both in one.shape[1:] and len(one.shape) >= 3,
            "float32 copy of an activation": one.dtype.itemsize == 4
            and one.dtype.is_floating_point
            and config.precision == "bf16"
            and any(math.prod(one.shape) % n == 0 and math.prod(one.shape) >= n * config.dim_model for n in tokens)
            and (one.operator, one.phase) not in ACCUMULATORS,
            "logits over 200 MB": one.bytes > LOGITS_BYTES
            and (one.operator == "linear_cross_entropy" or config.vocab_size in one.shape),
        }
        for reason, is_so in reasons.items():
            if is_so:
                dtype = str(one.dtype).removeprefix("torch.")
                key = (reason, one.operator, one.phase, one.name, dtype, one.shape)
                found[key] = Forbidden(reason, one.operator, one.phase, one.name, dtype, one.shape, one.bytes)
    return list(found.values())


def step_ledger(
    config: ModelConfig,
    encoder_length: int = 921,
    decoder_length: int = 206,
    *,
    micro_batch: int = 64,
    impl: kernels.Impl = "triton",
    precision: str | None = None,
) -> Ledger:
    """Ledger of one micro-batch's forward and backward and one optimiser step.

    impl: see kernels.dispatch; precision "bf16" or "fp32", by default the configuration's. RuntimeError with fused
    kernels under TRITON_INTERPRET=1; AccessError where a kernel is not declared.
    """
    chosen = precision or config.precision
    measured = measure(config, encoder_length, decoder_length, micro_batch, impl, chosen)
    rows: dict[tuple[str, str], Row] = {}

    def row(operator: str, phase: str) -> Row:
        return rows.setdefault((operator, phase), Row(operator, phase))

    for event in measured.events:
        one, counted = row(event.operator, event.phase), entry(event)
        one.add(counted)
        one.names[event.name] = one.names.get(event.name, 0) + 1
        one.moved[event.name] = one.moved.get(event.name, 0) + counted.dram
    for boundary in measured.boundaries:
        row(boundary.operator, boundary.phase).boundary += boundary.bytes
    for operator, size in measured.saved.items():
        row(operator, "forward").saved += size
    rows["adamw", "optimizer"] = optimizer_row(total_parameters(config), chosen)
    ordered = sorted(rows.values(), key=lambda one: (PHASES.index(one.phase), -one.dram))
    return Ledger(
        micro_batch,
        encoder_length,
        decoder_length,
        chosen,
        ordered,
        measured.peak,
        forbidden(measured.allocations, config, (encoder_length, decoder_length), micro_batch),
    )
