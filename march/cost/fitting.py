"""Memory of a training step, and the micro-batch that fits."""

from dataclasses import dataclass

import kernels
from march.config import ModelConfig
from march.cost.parameters import total_parameters
from march.cost.step import step_cost

# CUDA context, DeepSpeed's buckets and allocator fragmentation: not counted, allowed for.
RESERVED_BYTES = 1 << 30
HEADROOM = 0.92
LARGEST_MICRO_BATCH = 1024


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. states: weights, gradients and optimiser state under ZeRO 1; per_sequence and fixed: what
    forward and backward keep and use beyond that, a line through two counted micro-batches."""

    states: int
    fixed: int
    per_sequence: int

    def total(self, micro_batch: int) -> int:
        return self.states + self.fixed + micro_batch * self.per_sequence


def state_bytes(parameters: int, precision: str, zero_world: int = 1) -> int:
    """Weights, gradients and AdamW's state of `parameters`, in bytes on one of `zero_world` devices (ZeRO 1).

    bf16: weights 2, gradients 2 and their flat copy 2, and a share of the float32 weights 4, gradients 4 and moments 8.
    fp32: weights 4, gradients 4 and their flat copy 4, and a share of the weights' copy 4, gradients 4 and moments 8.
    """
    whole = 6 if precision == "bf16" else 12
    return parameters * whole + parameters * 16 // zero_world


def impl_name(impl: kernels.Impl) -> str:
    """`impl` as step_cost takes it. "auto" and libraries are counted as the torch path."""
    return impl if isinstance(impl, str) and impl in ("torch", "reference") else "torch"


def memory(
    config: ModelConfig,
    encoder_length: int = 921,
    decoder_length: int = 206,
    *,
    impl: kernels.Impl = "auto",
    precision: str | None = None,
    zero_world: int = 1,
) -> Memory:
    """The estimate for one device; sequences of encoder_length and decoder_length positions."""
    chosen = precision or config.precision
    small, large = (
        step_cost(
            config, encoder_length, decoder_length, micro_batch=size, impl=impl_name(impl), precision=chosen
        ).peak_bytes
        for size in (1, 3)
    )
    per_sequence = max(1, (large - small) // 2)
    states = state_bytes(total_parameters(config), chosen, zero_world)
    return Memory(states, max(0, small - per_sequence), per_sequence)


def fitting_micro_batch(
    config: ModelConfig,
    encoder_length: int,
    decoder_length: int,
    memory_bytes: float,
    impl: kernels.Impl = "auto",
    dtype: str | None = None,
    zero_world: int = 1,
) -> int:
    """Sequences of the largest micro-batch whose estimate fits `memory_bytes`; at least 1, at most 1024.

    dtype: "bf16" or "fp32", by default the configuration's. zero_world: processes that share the optimiser's state.
    """
    estimate = memory(config, encoder_length, decoder_length, impl=impl, precision=dtype, zero_world=zero_world)
    room = memory_bytes * HEADROOM - RESERVED_BYTES - estimate.total(0)
    return int(min(LARGEST_MICRO_BATCH, max(1, room // estimate.per_sequence)))
