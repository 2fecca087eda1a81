"""The time model: seconds of every counted call from a data sheet and five efficiencies.

A call takes the longer of its products and its bytes,

    max(ideal / efficiency, bytes / (bandwidth efficiency * bandwidth)) + LAUNCH_SECONDS

ideal: seconds of its tiles at the data sheet's peak; bytes: each of its tensors once. With `overlap` below 1, that
share of the shorter one hides behind the longer and the rest is added: the runs cannot tell (docs/projection.md); 1 is
reported, others beside it.

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

from bench.projection.collect import Counts
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
    """A micro-batch's calls, and a step's rest.

    calls: of Counts, with kind, index of the efficiency that the products take, ideal, seconds at peak, and moved, at
    the full bandwidth, both of one call. rest: seconds per step by name (at full bandwidth, elsewhere).
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

    def by_operator(self, efficiencies: Values) -> dict[str, float]:
        """Seconds of a step by operator, longest first."""
        calls = pd.Series(self.call_seconds(efficiencies)).groupby(self.calls.operator, sort=False).sum().to_dict()
        return dict(sorted((calls | self.others(efficiencies)).items(), key=lambda item: -item[1]))

    def seconds(self, efficiencies: Values) -> float:
        """Of a step."""
        return float(self.call_seconds(efficiencies).sum()) + sum(self.others(efficiencies).values())


def rounds(tiles: pd.Series, sms: int) -> np.ndarray:
    """Time of `tiles` equal tiles over that of a device that is never idle. Fewer tiles than SMs are split."""
    return np.where(tiles < sms, 1.0, np.ceil(tiles / sms) * sms / tiles)


def held(calls: pd.DataFrame, device: Device) -> pd.Series:
    """Times as long as a useful HMMA alone, for which one of a fused kernel holds its sub-core's tensor pipe."""
    cycles, slots = device.hmma_cycles * calls.issued, calls.slots + calls.beyond.fillna(0.0)
    turns = cycles + (slots - calls.issued).clip(lower=0) / (calls.warps / SUB_CORES).clip(lower=1)
    taken = pd.concat([cycles, slots, turns], axis=1).max(axis=1)
    return taken.where(calls.precision == "bf16", cycles) / device.hmma_cycles


def ideal_seconds(calls: pd.DataFrame, device: Device) -> tuple[np.ndarray, pd.Series]:
    """(index of the efficiency, seconds at peak) of each call."""
    tiles = [(calls.batch * np.ceil(calls.m / m) * np.ceil(calls.n / n), m * n) for m, n in LIBRARY_TILES]
    library = pd.concat([2 * t * size * calls.k * rounds(t, device.sms) for t, size in tiles], axis=1).min(axis=1)
    wide = (calls.element_size == 4) | (calls.precision == "fp32")
    # three products in tf32, whose rate is half of bf16's
    passes = held(calls, device).where(~wide, 1.0) * np.where(calls.precision == "tf32x3", 6, 1)
    own = calls.executed * rounds(calls.programs, device.sms) * passes
    kind = np.select([wide, calls.alignment < 16], [FP32, UNALIGNED], TENSOR)
    return kind, library.fillna(own).fillna(0.0) / np.where(wide, device.fp32, device.bf16)


def work(
    counts: Counts, device: Device, gpus: int = 8, exchange: float = EXCHANGE_BANDWIDTH, overlap: float = 1.0
) -> Work:
    """A step of 1024 sequences on `gpus` devices.

    Exchange: an all-reduce of the gradients, 2 (n - 1) / n of them through the bus, and weights gathered, (n - 1) / n,
    both in the working precision: what DeepSpeed's ZeRO 1 sends with march's settings, and for the published runs too.
    """
    steps, gradient = -(-SEQUENCES // (gpus * counts.micro_batch)), 2 if counts.precision == "bf16" else 4
    # a gradient in the working precision is read and added to its float32 sum; what is sent is copied into one tensor,
    # converted, and back again
    sent = 16 + (12 if gradient == 2 else 0) if gpus > 1 else 0
    update = optimizer_cost(counts.parameters, counts.precision).bytes
    rest = {
        "gradient sums": (counts.parameters * (steps * (gradient + 8) + sent) / device.bandwidth, 0.0),
        "optimizer": (update / gpus / device.bandwidth, 0.0),
        "exchange": (0.0, (gpus - 1) / gpus * counts.parameters * (2 + 1) * gradient / exchange),
    }
    if counts.impl == "eager":
        rest["evaluation"] = (0.0, EVALUATION_SECONDS)
    kind, ideal = ideal_seconds(counts.calls, device)
    moved = (counts.calls.reads + counts.calls.writes) / device.bandwidth
    calls = counts.calls.assign(kind=kind, ideal=ideal, moved=moved)
    return Work(calls, steps, counts.micro_batch, rest, counts.impl == "eager", overlap)
