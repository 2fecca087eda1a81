"""What one training step costs, counted from what it dispatches on meta tensors (march.cost.measure).

Nothing is computed and no device is needed: the step's forward and backward run on the meta device, and a dispatch
mode sees every operator with its shapes, every launch of a kernel, every tensor that is made and every one that dies.
So the numbers follow the code; there is no second model of it to keep in step.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import kernels
from march.config import ModelConfig
from march.cost.ledger import entry
from march.cost.measure import measure


@dataclass
class OperatorCost:
    """Calls, FLOPs and bytes of one operator of torch, or of one fused kernel, in one training step."""

    calls: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass
class StepCost:
    """One training step's forward and backward of one micro-batch.

    flops: of matrix products, two for each multiply-add. bytes_read, bytes_written: each operator's tensors once.
    saved_bytes: tensors kept for backward, parameters left out, each storage once. peak_bytes: the most that lived
    at one time beyond weights, gradients included. by_operator: the rows that add up to this.
    """

    micro_batch: int
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    saved_bytes: int = 0
    peak_bytes: int = 0
    by_operator: dict[str, OperatorCost] = field(default_factory=dict)


@lru_cache(maxsize=64)
def _step_cost(
    config: ModelConfig, encoder_length: int, decoder_length: int, micro_batch: int, impl: str, precision: str
) -> StepCost:
    measured = measure(config, encoder_length, decoder_length, micro_batch, kernels.parse_impl(impl), precision)
    cost = StepCost(micro_batch, saved_bytes=sum(measured.saved.values()), peak_bytes=measured.peak)
    for event in measured.events:
        row = cost.by_operator.setdefault(event.name, OperatorCost())
        counted = entry(event)
        row.calls += 1
        row.flops += counted.flops
        row.bytes_read += counted.bytes_read
        row.bytes_written += counted.bytes_written
    for row in cost.by_operator.values():
        cost.flops += row.flops
        cost.bytes_read += row.bytes_read
        cost.bytes_written += row.bytes_written
    return cost


def step_cost(
    config: ModelConfig,
    encoder_length: int = 921,
    decoder_length: int = 206,
    *,
    micro_batch: int = 1,
    impl: str = "torch",
    precision: str | None = None,
) -> StepCost:
    """Cost of one micro-batch's forward and backward; precision "bf16" or "fp32", by default the configuration's.

    impl: as on a command line, see kernels.parse_impl; "auto" takes the fused kernels, as on a GPU.
    """
    return _step_cost(config, encoder_length, decoder_length, micro_batch, impl, precision or config.precision)


def training_flops(config: ModelConfig, encoder_length: int = 921, decoder_length: int = 206) -> int:
    """FLOPs of matrix products that one sequence's forward and backward need, by the `torch` path on meta tensors.

    The recomputation of attention scores in backward is part of it, as it is of the fused kernels. Scores count in
    full under a causal mask.
    """
    return step_cost(config, encoder_length, decoder_length, micro_batch=1).flops
