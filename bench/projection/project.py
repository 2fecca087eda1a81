"""Projections of experiments: fit once on the eager runs, apply to both implementations."""

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd

from bench.projection import Projection
from bench.projection.collect import Counts, collect
from bench.projection.fit import Fit, fit, leave_one_out, root_mean_square
from bench.projection.model import BANDWIDTH, EXCHANGE_BANDWIDTH, Work, held, work
from march.cost.devices import DEVICES
from march.predecessor.runs import GPUS, SEQUENCES, micro_batch, published_seconds

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


@functools.cache
def calibrate(overlap: float = 1.0) -> Calibration:
    """Counts the eager steps of the published runs and fits the efficiencies."""
    device, published = DEVICES[FITTED[0]], published_seconds()
    works = {
        name: work(collect(name, "eager", micro_batch(name)), device, FITTED[1], overlap=overlap) for name in published
    }
    return Calibration(fit(works, published), leave_one_out(works, published), works, published)


@dataclass(frozen=True)
class ProjectedStep(Projection):
    """A projection and what it follows from. arithmetic_seconds: of all its FLOPs at the peak of the data sheet: no
    implementation of these products is faster. tflop, dram_bytes (of every call's tensors once): of one GPU's step."""

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
        found = {"status": STATUS} | {field.name: getattr(self, field.name) for field in fields(self)[:-2]}
        return found | {"static_slots": self.counts.uncounted}


def batch_of(name: str, impl: str, gpus: int = GPUS, micro: int | None = None) -> int:
    """Sequences of a micro-batch: `micro`, by default the published run's, 64 fused; no more than a device's share."""
    return min(micro or micro_batch(name, impl), -(-SEQUENCES // gpus))


def project(
    name: str,
    impl: str,
    calibration: Calibration,
    device_name: str = "a5000",
    gpus: int = GPUS,
    micro: int | None = None,
    exchange: float = EXCHANGE_BANDWIDTH,
    overlap: float = 1.0,
) -> ProjectedStep:
    """Projection of one experiment. micro: as of `batch_of`."""
    device = DEVICES[device_name]
    counts = collect(name, impl, batch_of(name, impl, gpus, micro), device.arch)
    step = work(counts, device, gpus, exchange, overlap)
    values = calibration.fit.efficiencies
    seconds, flops = step.seconds(values), step.micro_batches * counts.total("flops")
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
        dram_bytes=round(step.micro_batches * counts.total("reads", "writes")),
        counts=counts,
        work=step,
    )


def static(counts: Counts) -> Counts:
    """With the issue slots of main loops alone."""
    return replace(counts, calls=counts.calls.assign(beyond=math.nan))


def slots_of(step: ProjectedStep) -> pd.DataFrame:
    """Issue slots for each product in a fused step, a row for equal ones: of the main loop, beyond it, both;
    before, after: times as long as by products alone the tensor pipe is held, without and with what is beyond."""
    device, calls = DEVICES[step.device], step.counts.calls
    calls = calls[(calls.slots > 0) & (calls.precision == "bf16")]
    table = pd.DataFrame(
        {
            "kernel": calls.name.str.strip("_").str.removesuffix("_kernel"),
            "static": calls.slots,
            "beyond": calls.beyond,
            "taken": calls.slots + calls.beyond.fillna(0.0),
            "before": held(calls.assign(beyond=0.0), device),
            "after": held(calls, device),
            "calls": step.micro_batches * calls["count"],
            "tflop": step.micro_batches * calls["count"] * calls.executed / 1e12,
        }
    )
    equal = ["kernel", "static", "beyond", "taken", "before", "after"]
    summed = table.groupby(equal, sort=False, dropna=False, as_index=False).sum()
    return summed.sort_values("tflop", ascending=False, kind="stable")


def kernels_of(step: ProjectedStep, calibration: Calibration) -> pd.DataFrame:
    """Each kernel or operator of torch of a step: how often, seconds, what of it products and bytes would take alone,
    and what it takes beyond its useful FLOPs at 0.80 of the peak. Longest first."""
    values, calls = calibration.fit.efficiencies, step.work.calls
    times, seconds = step.micro_batches * calls["count"], step.work.call_seconds(values)
    table = pd.DataFrame(
        {
            "operator": calls.operator,
            "phase": calls.phase,
            "kernel": calls.name.str.removeprefix("aten::").str.strip("_"),
            "calls": times,
            "seconds": seconds,
            "products": times * calls.ideal / [values[kind] for kind in calls.kind],
            "bytes": times * calls.moved / values[BANDWIDTH],
            "beyond": seconds - times * calls.flops / (0.80 * DEVICES[step.device].peak(step.precision)),
        }
    )
    grouped = table.groupby(["operator", "phase", "kernel"], sort=False, as_index=False).sum()
    return grouped.sort_values("seconds", ascending=False, kind="stable")
