"""Projections of experiments: fit once on the eager runs, apply to both implementations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from bench.predecessor import GPUS, SEQUENCES, micro_batch, published_seconds
from bench.projection import Projection
from bench.projection.collect import Counts, collect
from bench.projection.fit import Fit, fit, leave_one_out, root_mean_square
from bench.projection.model import BANDWIDTH, EXCHANGE_BANDWIDTH, Work, work
from march.cost.devices import DEVICES

Progress = Callable[[str], None]
STATUS = "projection, not measured"
# the runs that the fit sees were of this node
FITTED = ("a5000", GPUS)
# standard deviations to both sides of a range: 90% of a normal distribution
RANGE = 1.645


@dataclass(frozen=True)
class Calibration:
    """fit on all published runs; left_out: each run left out once (fit.leave_one_out); works of these runs."""

    fit: Fit
    left_out: pd.DataFrame
    works: dict[str, Work]
    published: dict[str, float]

    @property
    def noise(self) -> float:
        """Root mean square of the leave-one-out errors: what one run differs by beyond the efficiencies."""
        return root_mean_square(self.left_out.error)


def calibrate(progress: Progress = lambda line: None, overlap: float = 1.0) -> Calibration:
    """Counts the eager steps of the published runs and fits the efficiencies."""
    device, published = DEVICES[FITTED[0]], published_seconds()
    works = {
        name: work(collect(name, "eager", micro_batch(name), progress=progress), device, FITTED[1], overlap=overlap)
        for name in published
    }
    return Calibration(fit(works, published), leave_one_out(works, published), works, published)


@dataclass(frozen=True)
class ProjectedStep(Projection):
    """A projection and what it follows from. arithmetic_seconds: of all its FLOPs at the peak of the data sheet: no
    implementation of these products is faster. tflop, dram_bytes: of one GPU's step."""

    arithmetic_seconds: float
    micro_batch: int
    micro_batches: int
    precision: str
    tflop: float
    dram_bytes: int
    counts: Counts
    work: Work

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"status": STATUS} | {field.name: getattr(self, field.name) for field in fields(self)[:-2]}


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
) -> ProjectedStep:
    """Projection of one experiment. micro: sequences of a micro-batch, by default the published run's, 64 fused."""
    device = DEVICES[device_name]
    batch = min(micro or micro_batch(name, impl), -(-SEQUENCES // gpus))
    counts = collect(name, impl, batch, device.arch, progress=progress)
    step = work(counts, device, gpus, exchange, overlap)
    values = calibration.fit.efficiencies
    seconds, flops = step.seconds(values), step.micro_batches * counts.flops
    factor = math.exp(RANGE * math.hypot(calibration.fit.spread(step), calibration.noise))
    return ProjectedStep(
        experiment=name,
        impl=impl,
        device=device_name,
        gpus=gpus,
        seconds=seconds,
        low=seconds / factor,
        high=seconds * factor,
        by_operator=step.by_operator(values),
        published_seconds=published_seconds().get(name) if impl == "eager" and (device_name, gpus) == FITTED else None,
        arithmetic_seconds=flops / device.peak(counts.precision),
        micro_batch=counts.micro_batch,
        micro_batches=step.micro_batches,
        precision=counts.precision,
        tflop=flops / 1e12,
        dram_bytes=step.micro_batches * counts.dram,
        counts=counts,
        work=step,
    )


def kernels_of(step: ProjectedStep, calibration: Calibration) -> pd.DataFrame:
    """Each kernel or operator of torch of a step: how often, seconds, what of it products and bytes would take alone,
    and what it takes beyond its useful FLOPs at 0.80 of the peak. Longest first."""
    values, calls = calibration.fit.efficiencies, step.work.calls
    times, seconds = step.micro_batches * calls["count"], step.work.call_seconds(values)
    table = pd.DataFrame(
        {
            "operator": calls["operator"],
            "phase": calls["phase"],
            "kernel": calls["name"].str.removeprefix("aten::").str.strip("_"),
            "calls": times,
            "seconds": seconds,
            "products": times * calls["ideal"] / [values[kind] for kind in calls["kind"]],
            "bytes": times * calls["moved"] / values[BANDWIDTH],
            "beyond": seconds - times * calls["flops"] / (0.80 * DEVICES[step.device].peak(step.precision)),
        }
    )
    grouped = table.groupby(["operator", "phase", "kernel"], sort=False, as_index=False).sum()
    return grouped.sort_values("seconds", ascending=False, kind="stable")
