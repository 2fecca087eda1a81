"""Projections of experiments: fit once on the eager runs, apply to both implementations."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.projection.collect import Counts, collect
from bench.projection.fit import Fit, LeftOut, fit, leave_one_out, root_mean_square
from bench.projection.model import EXCHANGE_BANDWIDTH, NAMES, Work, work
from bench.projection.predecessor import GPUS, SEQUENCES, micro_batch, published_seconds
from march.cost.devices import DEVICES, Device

Progress = Callable[[str], None]
STATUS = "projection, not measured"
# the runs that the fit sees were of this node
FITTED = ("a5000", GPUS)
# standard deviations to both sides of a range: 90% of a normal distribution
RANGE = 1.645


@dataclass(frozen=True)
class Calibration:
    """fit on all published runs, and each run left out once; works of these runs."""

    fit: Fit
    left_out: list[LeftOut]
    works: dict[str, Work]
    published: dict[str, float]

    @property
    def noise(self) -> float:
        """Root mean square of the leave-one-out errors: what one run differs by beyond the efficiencies."""
        return root_mean_square([row.error for row in self.left_out])


def calibrate(progress: Progress = lambda line: None, overlap: float = 1.0) -> Calibration:
    """Counts the eager steps of the published runs and fits the efficiencies."""
    device, published = DEVICES[FITTED[0]], published_seconds()
    works = {
        name: work(collect(name, "eager", micro_batch(name), progress=progress), device, FITTED[1], overlap=overlap)
        for name in published
    }
    return Calibration(fit(works, published), leave_one_out(works, published), works, published)


@dataclass(frozen=True)
class Projection:
    """Seconds a step of one experiment; low, high: 90% of what the fit's error implies; counts, work: its source."""

    experiment: str
    impl: str
    device: str
    gpus: int
    seconds: float
    low: float
    high: float
    by_operator: dict[str, float]
    published: float | None
    counts: Counts
    work: Work

    @property
    def arithmetic(self) -> float:
        """Seconds of all its FLOPs at the peak of the data sheet: no implementation of these products is faster."""
        return self.work.micro_batches * self.counts.flops / DEVICES[self.device].peak(self.counts.precision)

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": STATUS,
            "experiment": self.experiment,
            "impl": self.impl,
            "device": self.device,
            "gpus": self.gpus,
            "seconds": self.seconds,
            "low": self.low,
            "high": self.high,
            "by_operator": self.by_operator,
            "published_seconds": self.published,
            "arithmetic_seconds": self.arithmetic,
            "micro_batch": self.counts.micro_batch,
            "micro_batches": self.work.micro_batches,
            "precision": self.counts.precision,
            "tflop": self.work.micro_batches * self.counts.flops / 1e12,
            "dram_bytes": self.work.micro_batches * self.counts.dram,
        }


def project(
    name: str,
    impl: str,
    calibration: Calibration,
    device_name: str = "a5000",
    gpus: int = GPUS,
    micro: int | None = None,
    exchange: float = EXCHANGE_BANDWIDTH,
    progress: Progress = lambda line: None,
    overlap: float = 1.0,
) -> Projection:
    """Projection of one experiment. micro: sequences of a micro-batch, by default the published run's, 64 fused."""
    device: Device = DEVICES[device_name]
    batch = min(micro or micro_batch(name, impl), -(-SEQUENCES // gpus))
    counts = collect(name, impl, batch, device.arch, progress=progress)
    step = work(counts, device, gpus, exchange, overlap)
    values = calibration.fit.efficiencies.array()
    seconds = step.seconds(values)
    spread = math.hypot(calibration.fit.spread(step), calibration.noise)
    return Projection(
        name,
        impl,
        device_name,
        gpus,
        seconds,
        seconds * math.exp(-RANGE * spread),
        seconds * math.exp(RANGE * spread),
        step.by_operator(values),
        published_seconds().get(name) if impl == "eager" and (device_name, gpus) == FITTED else None,
        counts,
        step,
    )


def kernels_of(projection: Projection, calibration: Calibration) -> list[dict[str, Any]]:
    """Each kernel or operator of torch of a step: seconds, what of it products and bytes would take alone, and what it
    takes beyond its useful FLOPs at 0.80 of the peak. Longest first."""
    step, values = projection.work, calibration.fit.efficiencies.array()
    peak = DEVICES[projection.device].peak(projection.counts.precision)
    bandwidth = values[NAMES.index("bandwidth")]
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for i, (call, seconds) in enumerate(zip(projection.counts.calls, step.calls(values), strict=True)):
        key = (call.operator, call.phase, call.name)
        row = rows.setdefault(
            key,
            {
                "operator": call.operator,
                "phase": call.phase,
                "kernel": call.name.removeprefix("aten::").strip("_"),
                **dict.fromkeys(("calls", "seconds", "products", "bytes", "beyond"), 0.0),
            },
        )
        times = step.micro_batches * call.count
        row["calls"] += times
        row["seconds"] += float(seconds)
        row["products"] += float(times * step.ideal[i] / values[step.kind[i]])
        row["bytes"] += float(times * step.moved[i] / bandwidth)
        row["beyond"] += float(seconds) - times * call.flops / (0.80 * peak)
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def all_projections(
    names: Iterable[str], impls: Iterable[str], calibration: Calibration, **options: Any
) -> list[Projection]:
    return [project(name, impl, calibration, **options) for name in names for impl in impls]


def guess_error(calibration: Calibration) -> float:
    return float(np.mean([abs(row.guess_error) for row in calibration.left_out]))
