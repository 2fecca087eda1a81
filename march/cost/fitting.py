"""Memory of a training step, and the micro-batch that fits."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import kernels
from kernels.dispatch import OPERATORS, triton_interpreted
from march.config import ModelConfig
from march.cost.step import fused_operators, measure, total_parameters

# CUDA context, DeepSpeed's buckets and allocator fragmentation: not counted, allowed for.
RESERVED_BYTES = 1 << 30
HEADROOM = 0.92
LARGEST_MICRO_BATCH = 1024
# Micro-batches that the line goes through. The portable cross entropy has one chunk of logits and no float32 sums up
# to 5 sequences of the paper's: through 1 and 3 the line rose by 33 MiB a sequence, and the 627 of Baseline that
# fitted in 24 GB were more than the fused path's. Beyond 17 it rises by 46.5, from 8 to 17 by 50.3. The fused cross
# entropy's chunk grows to its limit, which 17 sequences reach: the line starts beyond. The peak is the highest of
# several lines (at the cross entropy's backward, at a wide layer's), so between the two sizes the line is never below
# it.
SIZES, FUSED_SIZES = (8, 17), (64, 512)


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


def counted_as(impl: kernels.Impl, device_type: str | None = None) -> str:
    """`impl` as it is counted, in the form of a command line: "reference" and fused kernels as themselves, libraries
    and fused kernels that Triton interprets as the torch path, which needs more. "auto" is what it takes on a device
    of `device_type`, "cuda" or "cpu", by default this machine's: a CPU's sequences need several times a GPU's."""
    on_gpu = (device_type or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    names = {operator: impl if isinstance(impl, str) else impl.get(operator, "auto") for operator in OPERATORS}
    names = {operator: name if name != "auto" or on_gpu else "torch" for operator, name in names.items()}
    fused = [] if triton_interpreted() else fused_operators(names)
    counted = {o: "triton" if o in fused else "reference" if n == "reference" else "torch" for o, n in names.items()}
    return ",".join(f"{operator}={name}" for operator, name in counted.items())


@lru_cache(maxsize=256)
def _peak(config: ModelConfig, lengths: tuple[int, int], micro_batch: int, impl: str, precision: str) -> int:
    return measure(config, *lengths, micro_batch, kernels.parse_impl(impl), precision).peak


def memory(
    config: ModelConfig,
    encoder_length: int = 921,
    decoder_length: int = 206,
    *,
    impl: kernels.Impl = "auto",
    precision: str | None = None,
    zero_world: int = 1,
    device_type: str | None = None,
) -> Memory:
    """The estimate for one device; sequences of encoder_length and decoder_length positions. device_type: where "auto"
    runs, see `counted_as`."""
    chosen, counted = precision or config.precision, counted_as(impl, device_type)
    small, large = FUSED_SIZES if "triton" in counted else SIZES
    low, high = (_peak(config, (encoder_length, decoder_length), size, counted, chosen) for size in (small, large))
    per_sequence = max(1, (high - low) // (large - small))
    states = state_bytes(total_parameters(config), chosen, zero_world)
    return Memory(states, max(0, low - small * per_sequence), per_sequence)


def room(memory_bytes: float, fixed: int) -> float:
    """Bytes that `memory_bytes` of a device leave to sequences beside `fixed`, the model's states for instance."""
    return memory_bytes * HEADROOM - RESERVED_BYTES - fixed


def fitting_micro_batch(
    config: ModelConfig,
    encoder_length: int,
    decoder_length: int,
    memory_bytes: float,
    impl: kernels.Impl = "auto",
    dtype: str | None = None,
    zero_world: int = 1,
    device_type: str | None = None,
) -> int:
    """Sequences of the largest micro-batch whose estimate fits `memory_bytes`; at least 1, at most 1024.

    dtype: "bf16" or "fp32", by default the configuration's. zero_world: processes that share the optimiser's state.
    device_type: where "auto" runs, "cuda" or "cpu", by default this machine's.
    """
    options: dict[str, Any] = {"precision": dtype, "zero_world": zero_world, "device_type": device_type}
    estimate = memory(config, encoder_length, decoder_length, impl=impl, **options)
    return int(min(LARGEST_MICRO_BATCH, max(1, room(memory_bytes, estimate.total(0)) // estimate.per_sequence)))
