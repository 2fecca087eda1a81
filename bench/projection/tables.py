"""Tables of projections, each of which says that it is one (tables.md); and docs/projection.md (page.md)."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench import pages
from bench.projection import executed
from bench.projection.fit import NOISE, PRIORS, fit, mean_error, root_mean_square
from bench.projection.model import EXCHANGE_BANDWIDTH, LAUNCH_SECONDS, work
from bench.projection.project import (
    FITTED,
    Calibration,
    ProjectedStep,
    calibrate,
    kernels_of,
    project,
    slots_of,
    static,
)
from kernels.emulator.session import EMULATED
from march.cost.devices import DEVICES
from march.predecessor.runs import EVALUATION_SECONDS, HALVED, HALVED_EXPERIMENTS, MICRO_BATCH, known

FOLDER = Path(__file__).parent
ASKED, AIM = 0.21, 0.185
# the tensor efficiency held fast; shares of a call's shorter part that hide behind the longer one
PINNED, OVERLAPS = (0.40, 0.50, 0.60, 0.70, 0.75, 0.80), (1.0, 0.5, 0.0)
# one card an architecture and those of sm_86
OTHERS = ("a5000", "a6000", "3090", "4090", "l4", "a100", "h100")
STATED = {"launch": LAUNCH_SECONDS, "exchange": EXCHANGE_BANDWIDTH, "evaluation": EVALUATION_SECONDS}
Items = list[dict[str, Any]]


def _filled(name: str, *values: Any, **more: Any) -> str:
    """A macro of tables.md."""
    module = pages.templates(FOLDER, padded=True).get_template("tables.md").module
    return str(getattr(module, name)(*values, **more)).strip()


def predictions(steps: Sequence[ProjectedStep]) -> str:
    """One line an experiment and implementation; relative to Baseline of the same implementation where it is there."""
    baseline = {p.impl: p.seconds for p in steps if p.experiment == "Baseline"}
    items = [
        {
            "p": p,
            "ratio": p.seconds / baseline[p.impl] if p.impl in baseline else None,
            "off": p.seconds / p.published_seconds - 1 if p.published_seconds else None,
        }
        for p in steps
    ]
    return _filled("predictions", items, ", ".join(sorted({f"{p.gpus} x {DEVICES[p.device].name}" for p in steps})))


def efficiencies(calibration: Calibration) -> str:
    """The fitted numbers beside what was expected and their bounds."""
    spreads = calibration.fit.covariance.diagonal() ** 0.5
    fitted = [
        {"name": name, "value": f"{x:.4f}" if name == "host" else f"{x:.3f}", "spread": spread, "prior": PRIORS[name]}
        for (name, x), spread in zip(calibration.fit.efficiencies._asdict().items(), spreads, strict=True)
    ]
    return _filled("efficiencies", fitted, **STATED, noise=NOISE)


def left_out(calibration: Calibration) -> str:
    """Each published run projected without it, and by the naive baseline."""
    runs = calibration.left_out.assign(name=calibration.left_out.index, fitted=pd.Series(calibration.fit.seconds))
    runs["a"], runs["b"] = (runs[side] - runs[side]["Baseline"] for side in ("published", "fitted"))
    narrow = runs.drop("BaselineFP32")
    errors = [mean_error(frame[name]) for frame in (runs, narrow) for name in ("error", "naive_error")]
    return _filled("left_out", runs.to_dict("records"), [*errors, calibration.noise])


def operators(step: ProjectedStep) -> str:
    """Milliseconds of a step by operator."""
    items = [{"name": name, "s": s, "share": s / step.seconds} for name, s in step.by_operator.items()]
    return _filled("operators", step, items)


def kernels(step: ProjectedStep, calibration: Calibration, least: float = 5e-4) -> str:
    """Where a step's time is, kernel by kernel; those of `least` seconds and more."""
    found = kernels_of(step, calibration)
    shown = found.seconds >= least
    return _filled("kernels", step, found[shown].to_dict("records"), found.seconds[~shown].sum())


def slots(step: ProjectedStep) -> str:
    """Issue slots of the kernels with products, static beside emulated."""
    return _filled("slots", step, slots_of(step).to_dict("records"))


def uncounted(step: ProjectedStep) -> str:
    """One line: which kernels' issue slots are static."""
    what = (
        f"{step.experiment}, {step.device}: issue slots of the main loop alone for {', '.join(step.counts.uncounted)}"
    )
    if step.counts.arch not in EMULATED:
        return f"{what}: {step.counts.arch} is not emulated"
    return f"{what}: {executed.FILE.name} has no such launch; this command with --count adds it"


# ---------------------------------------------------------------- docs/projection.md


def _excess(step: ProjectedStep, calibration: Calibration) -> str:
    """What stands between a fused step and the aim, longest excess first."""
    found = kernels_of(step, calibration).sort_values("beyond", ascending=False)
    named = [
        f"{row.kernel} ({row.operator}, {row.phase}) {1e3 * row.beyond:.1f}"
        for row in found[found.beyond > 5e-4].itertuples()
    ]
    named += [f"{name} {1e3 * s:.1f}" for name, s in step.by_operator.items() if name in step.work.rest]
    return ", ".join(named)


def _pinned(calibration: Calibration, baseline: ProjectedStep) -> Items:
    """The fit with the tensor efficiency held fast: what the runs say about it, and what follows for the fused step."""
    items = []
    for value in PINNED:
        priors = PRIORS | {"tensor": PRIORS["tensor"]._replace(expected=value, spread=1e-3)}
        found = fit(calibration.works, calibration.published, priors)
        error = root_mean_square(pd.Series(found.seconds) / calibration.left_out.published - 1)
        fused = baseline.work.seconds(found.efficiencies)
        items.append({"tensor": value, "error": error, "e": found.efficiencies, "fused": fused})
    return items


def _overlaps() -> Items:
    """Other answers to how much of a call's shorter part hides behind its longer one."""
    items = []
    for overlap in OVERLAPS:
        found = calibrate(overlap)
        step = project("Baseline", "triton", found, overlap=overlap)
        error = mean_error(found.left_out.error)
        items.append({"overlap": overlap, "error": error, "e": found.fit.efficiencies, "step": step})
    return items


def _sensitivity(calibration: Calibration, baseline: ProjectedStep) -> list[tuple[str, float]]:
    """Baseline's fused step when one stated thing is otherwise."""
    values, device = calibration.fit.efficiencies, DEVICES[FITTED[0]]
    slow, fast = (work(baseline.counts, device, FITTED[1], gb * 1e9).seconds(values) for gb in (6, 24))
    return [
        ("as projected", baseline.seconds),
        ("issue slots of the main loops alone", work(static(baseline.counts), device, FITTED[1]).seconds(values)),
        ("exchange at 6 GB/s", slow),
        ("exchange at 24 GB/s", fast),
        ("exchange hidden behind backward", baseline.seconds - baseline.by_operator["exchange"]),
        ("the eager runs' host time there too", baseline.seconds + values.host * baseline.micro_batch),
    ]


def page(calibration: Calibration) -> str:
    """page.md filled in; every table of it says that it is a projection."""
    eager, fused = ([project(name, impl, calibration) for name in known()] for impl in ("eager", "triton"))
    base_eager, base = (next(p for p in many if p.experiment == "Baseline") for many in (eager, fused))
    devices = [project("Baseline", "triton", calibration, name) for name in OTHERS]
    sensitivity = _sensitivity(calibration, base)
    return pages.render(
        FOLDER / "page.md",
        padded=True,
        **STATED,
        made=f"As produced on {datetime.date.today().isoformat()} with torch {torch.__version__}.",
        halved_size=HALVED,
        halved=", ".join(sorted(HALVED_EXPERIMENTS)),
        host_halved=calibration.fit.efficiencies.host * (MICRO_BATCH - HALVED),
        efficiencies=efficiencies(calibration),
        left_out=left_out(calibration),
        pinned=_pinned(calibration, base),
        overlaps=_overlaps(),
        published=calibration.published["Baseline"],
        base=base,
        base_eager=base_eager,
        peak=DEVICES[FITTED[0]].bf16,
        asked=ASKED,
        aim=AIM,
        excess=_excess(base, calibration),
        operators=operators(base),
        kernels=kernels(base, calibration),
        slots=slots(base),
        base_static=sensitivity[1][1],
        error=mean_error(calibration.left_out.error),
        uncounted=[
            f"{one.experiment}, {one.device}"
            for one in (*fused, *devices)
            if one.counts.uncounted and one.counts.arch in EMULATED
        ],
        sensitivity=sensitivity,
        eager=predictions(eager),
        fused=predictions(fused),
        devices=[{"p": p, "d": DEVICES[p.device]} for p in devices],
    )
