"""The time model: seconds of every counted call from a data sheet and five efficiencies.

A call takes the longer of its products and its bytes,

    max(ideal / efficiency, bytes / (bandwidth efficiency * bandwidth)) + LAUNCH_SECONDS

ideal: seconds of its tiles at the data sheet's peak. With `overlap` below 1, that share of the shorter one hides
behind the longer and the rest is added: the runs cannot tell (docs/projection.md); 1 is reported, others beside it.

Tiles are computed whole and whole rounds of them occupy the device: a library product takes the best of LIBRARY_TILES,
a fused kernel its own. In a fused kernel's loop an HMMA holds its sub-core's tensor pipe for C cycles (16 on the
A5000), s issue slots go with each, one a cycle, and w warps a sub-core take turns. With one warp, multiplying and the
rest would follow each other, C + s - 1; with many the longer one hides the other; taken is max(C, s, C + (s - 1) / w).
Products that a layout computes twice hold the pipe twice. s is the main loop's, in SASS, and what the emulator counts
beyond it (executed.py): other loops, prologue and epilogue.

A step is its micro-batches one after the other, then the exchange of gradients, the optimiser, the exchange of
weights (ZeRO 1); nothing is overlapped with anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.projection.collect import Call, Compiled, Counts, cdiv
from march.cost.devices import Device
from march.cost.step import optimizer_cost
from march.predecessor.runs import EVALUATION_SECONDS, SEQUENCES

# between two kernels of one stream on a full queue, start and drain included; the host runs ahead
LAUNCH_SECONDS = 4e-6
# bus bandwidth of NCCL's rings between 8 cards on PCIe 4.0 x16 (31.5 GB/s raw) without NVLink, over two sockets
EXCHANGE_BANDWIDTH = 12e9
LIBRARY_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
SUB_CORES = 4


class Efficiencies(NamedTuple):
    """Shares of the data sheet's figures. tensor: of products on tensor cores; unaligned: of library products whose
    rows do not start at multiples of 16 bytes; fp32: of products on float32 units; bandwidth: of memory. host: seconds
    a sequence of a micro-batch, once per step, of the eager runs (see docs/projection.md); not a share."""

    tensor: float
    unaligned: float
    fp32: float
    bandwidth: float
    host: float


NAMES = Efficiencies._fields
TENSOR, UNALIGNED, FP32, BANDWIDTH, HOST = range(len(NAMES))
Values = Efficiencies | np.ndarray


@dataclass(frozen=True)
class Work:
    """A micro-batch's calls, a row each distinct one; and a step's rest.

    calls: phase, operator, name, count, flops; kind: index of the efficiency that its products take; ideal: seconds at
    peak, moved: at the full bandwidth, both of one call. rest: seconds per step by name (at full bandwidth, elsewhere).
    """

    calls: pd.DataFrame
    micro_batches: int
    micro_batch: int
    rest: Mapping[str, tuple[float, float]]
    eager: bool
    overlap: float = 1.0

    def call_seconds(self, efficiencies: Values) -> np.ndarray:
        """Seconds of each row in a step."""
        count, kind, ideal, moved = (self.calls[name].to_numpy() for name in ("count", "kind", "ideal", "moved"))
        products, moved = ideal / np.asarray(efficiencies)[kind], moved / efficiencies[BANDWIDTH]
        busy = np.maximum(products, moved) + (1 - self.overlap) * np.minimum(products, moved)
        return self.micro_batches * count * (busy + LAUNCH_SECONDS)

    def others(self, efficiencies: Values) -> dict[str, float]:
        """Seconds per step of what is no call."""
        bandwidth = efficiencies[BANDWIDTH]
        seconds = {name: float(moved / bandwidth + fixed) for name, (moved, fixed) in self.rest.items()}
        return seconds | ({"host": float(efficiencies[HOST] * self.micro_batch)} if self.eager else {})

    def seconds(self, efficiencies: Values) -> float:
        """Of a step."""
        return float(self.call_seconds(efficiencies).sum()) + sum(self.others(efficiencies).values())

    def by_operator(self, efficiencies: Values) -> dict[str, float]:
        """Seconds of a step by operator, longest first; they add up to `seconds`."""
        calls = pd.Series(self.call_seconds(efficiencies)).groupby(self.calls.operator, sort=False).sum().to_dict()
        return dict(sorted((calls | self.others(efficiencies)).items(), key=lambda item: -item[1]))


def rounds(tiles: int, sms: int) -> float:
    """Time of `tiles` equal tiles over that of a device that is never idle. Fewer tiles than SMs are split."""
    return cdiv(tiles, sms) * sms / tiles if tiles >= sms else 1.0


def library_flops(call: Call, sms: int) -> float:
    """FLOPs of a library product's tiles, with idle SMs of the last round, for the tile where that is least."""
    product = call.product
    assert product is not None
    tiles = [(product.batch * cdiv(product.m, m) * cdiv(product.n, n), m * n) for m, n in LIBRARY_TILES]
    return min(2 * number * size * product.k * rounds(number, sms) for number, size in tiles)


def ideal_seconds(call: Call, device: Device) -> tuple[int, float]:
    """(index of the efficiency, seconds at peak) of one call."""
    if call.product is not None:
        flops = library_flops(call, device.sms)
        if call.product.element_size == 4:
            return FP32, flops / device.fp32
        return (TENSOR if call.product.alignment >= 16 else UNALIGNED), flops / device.bf16
    if call.compiled is None:
        return TENSOR, 0.0
    compiled = call.compiled
    flops = call.executed * rounds(compiled.programs, device.sms)
    if compiled.precision == "fp32":
        return FP32, flops / device.fp32
    # three products in tf32, whose rate is half of bf16's
    passes = 6 if compiled.precision == "tf32x3" else 1
    return TENSOR, flops * passes * held(compiled, device) / device.bf16


def held(compiled: Compiled, device: Device) -> float:
    """Times as long as a useful HMMA alone, for which one of a fused kernel holds its sub-core's tensor pipe."""
    cycles, slots = device.hmma_cycles * compiled.issued, compiled.slots + (compiled.beyond or 0.0)
    warps = max(1.0, compiled.warps / SUB_CORES)
    if compiled.precision == "bf16":
        cycles = max(cycles, slots, cycles + max(0.0, slots - compiled.issued) / warps)
    return cycles / device.hmma_cycles


def exchange_seconds(counts: Counts, gpus: int, bandwidth: float) -> float:
    """An all-reduce of the gradients, 2 (n - 1) / n of them through the bus, and weights gathered, (n - 1) / n, both in
    the working precision: what DeepSpeed's ZeRO 1 sends with march's settings. Taken for the published runs too."""
    element = 2 if counts.precision == "bf16" else 4
    return (gpus - 1) / gpus * counts.parameters * (2 + 1) * element / bandwidth


def work(
    counts: Counts, device: Device, gpus: int = 8, exchange: float = EXCHANGE_BANDWIDTH, overlap: float = 1.0
) -> Work:
    """A step of 1024 sequences on `gpus` devices."""
    steps = cdiv(SEQUENCES, gpus * counts.micro_batch)
    # a gradient in the working precision is read and added to its float32 sum; what is sent is copied into one tensor,
    # converted, and back again
    gradient = 2 if counts.precision == "bf16" else 4
    sent = 16 + (12 if gradient == 2 else 0) if gpus > 1 else 0
    rest = {
        "gradient sums": (counts.parameters * (steps * (gradient + 8) + sent) / device.bandwidth, 0.0),
        "optimizer": (optimizer_cost(counts.parameters, counts.precision).bytes / gpus / device.bandwidth, 0.0),
        "exchange": (0.0, exchange_seconds(counts, gpus, exchange)),
    }
    if counts.impl == "eager":
        rest["evaluation"] = (0.0, EVALUATION_SECONDS)
    rows = [
        {name: getattr(call, name) for name in ("phase", "operator", "name", "count", "flops")} for call in counts.calls
    ]
    calls = pd.DataFrame(rows)
    calls["kind"], calls["ideal"] = zip(*(ideal_seconds(call, device) for call in counts.calls), strict=True)
    calls["moved"] = [(call.read + call.written) / device.bandwidth for call in counts.calls]
    return Work(calls, steps, counts.micro_batch, rest, counts.impl == "eager", overlap)
