"""Tables of projections, each of which says that it is one; and docs/projection.md, template.md with its tables."""

import datetime
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from bench.predecessor import EVALUATION_SECONDS, HALVED, HALVED_EXPERIMENTS, MICRO_BATCH
from bench.projection.fit import NOISE, PRIORS, fit, mean_error, root_mean_square
from bench.projection.model import EXCHANGE_BANDWIDTH, HOST, LAUNCH_SECONDS, NAMES, work
from bench.projection.project import FITTED, Calibration, ProjectedStep, calibrate, kernels_of, project
from bench.tables import Row, markdown
from march import experiments
from march.cost.devices import DEVICES

TITLE = "Projection, not measured"
ASKED, AIM = 0.21, 0.185
# the tensor efficiency held fast; shares of a call's shorter part that hide behind the longer one
PINNED, OVERLAPS = (0.40, 0.50, 0.60, 0.70, 0.75, 0.80), (1.0, 0.5, 0.0)
# one card an architecture and those of sm_86
OTHERS = ("a5000", "a6000", "3090", "4090", "l4", "a100", "h100")


def _table(said: str, rows: Iterable[Row]) -> str:
    return f"{TITLE}{said}\n\n{markdown(list(rows))}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}%"


def _range(step: ProjectedStep) -> str:
    return f"{step.low:.3f} to {step.high:.3f}"


def predictions(steps: Sequence[ProjectedStep]) -> str:
    """One line an experiment and implementation; relative to Baseline of the same implementation where it is there."""
    baseline = {p.impl: p.seconds for p in steps if p.experiment == "Baseline"}
    rows = [
        {
            "experiment": p.experiment,
            "impl": p.impl,
            "micro-batches": f"{p.micro_batches} x {p.micro_batch}",
            "projected s": f"{p.seconds:.4f}",
            "90% range": _range(p),
            "to Baseline": f"{p.seconds / baseline[p.impl]:.3f}" if p.impl in baseline else "-",
            "arithmetic s": f"{p.arithmetic_seconds:.4f}",
            "published s": f"{p.published_seconds:.4f}" if p.published_seconds else "-",
            "difference": _percent(p.seconds / p.published_seconds - 1) if p.published_seconds else "-",
        }
        for p in steps
    ]
    where = ", ".join(sorted({f"{p.gpus} x {DEVICES[p.device].name}" for p in steps}))
    return _table(f": seconds per step of 1024 sequences on {where}.", rows)


def efficiencies(calibration: Calibration) -> str:
    """The fitted numbers beside what was expected and their bounds."""
    spreads = calibration.fit.covariance.diagonal() ** 0.5
    rows = [
        {
            "efficiency": name,
            "fitted": f"{value:.4f}" if name == "host" else f"{value:.3f}",
            "uncertain by": f"{100 * spread:.0f}%",
            "expected": f"{PRIORS[name].expected:g} +- {100 * PRIORS[name].spread:.0f}%",
            "bounds": f"{PRIORS[name].low:g} to {PRIORS[name].high:g}",
            "where the expectation is from": PRIORS[name].source,
        }
        for name, value, spread in zip(NAMES, calibration.fit.efficiencies, spreads, strict=True)
    ]
    return (
        _table(": efficiencies of the time model, fitted to the eager runs alone.", rows)
        + f"\n\nStated, not fitted: {LAUNCH_SECONDS * 1e6:.0f} us a call, {EXCHANGE_BANDWIDTH / 1e9:.0f} GB/s for the "
        f"exchange, {EVALUATION_SECONDS:.3f} s per step of evaluation in the published seconds, "
        f"{100 * NOISE:.0f}% noise of a run."
    )


def left_out(calibration: Calibration) -> str:
    """Each published run projected without it, and by the naive baseline."""
    fitted, base, runs = calibration.fit.seconds, calibration.published["Baseline"], calibration.left_out
    rows = [
        {
            "experiment": name,
            "published s": f"{run.published:.4f}",
            "fitted s": f"{fitted[name]:.4f}",
            "left out s": f"{run.projected:.4f}",
            "error": _percent(run.error),
            "naive error": _percent(run.naive_error),
            "published to Baseline": f"{run.published - base:+.3f}",
            "fitted to Baseline": f"{fitted[name] - fitted['Baseline']:+.3f}",
        }
        for name, run in runs.iterrows()
    ]
    narrow = runs.drop("BaselineFP32")
    errors = [100 * mean_error(table[name]) for table in (runs, narrow) for name in ("error", "naive_error")]
    return (
        _table(f": each run projected by a fit to the other {len(runs) - 1}; naive baseline: their median.", rows)
        + "\n\nMean absolute leave-one-out error {:.2f}%, of the naive baseline {:.2f}%; without BaselineFP32 {:.2f}% "
        "and {:.2f}%. Root mean square {:.2f}%.".format(*errors, 100 * calibration.noise)
    )


def operators(step: ProjectedStep) -> str:
    """Milliseconds of a step by operator."""
    rows = [
        {"operator": name, "ms": f"{1e3 * s:.2f}", "share": f"{100 * s / step.seconds:.1f}%"}
        for name, s in step.by_operator.items()
    ]
    return _table(f": {step.experiment}, {step.impl}, {step.seconds:.4f} s per step, by operator.", rows)


def kernels(step: ProjectedStep, calibration: Calibration, least: float = 5e-4) -> str:
    """Where a step's time is, kernel by kernel; those of `least` seconds and more."""
    found = kernels_of(step, calibration)
    shown = found.seconds >= least
    rows = [
        {
            "operator": row.operator,
            "phase": row.phase,
            "kernel": row.kernel,
            "calls": f"{row.calls:.0f}",
            "ms": f"{1e3 * row.seconds:.2f}",
            "products alone": f"{1e3 * row.products:.2f}",
            "bytes alone": f"{1e3 * row.bytes:.2f}",
            "beyond 0.80 of peak": f"{1e3 * row.beyond:.2f}",
        }
        for row in found[shown].itertuples()
    ]
    rest = f"{1e3 * found.seconds[~shown].sum():.2f} ms in others"
    return _table(f": {step.experiment}, {step.impl}, kernel by kernel, ms per step; {rest}.", rows)


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


def _pinned(calibration: Calibration, baseline: ProjectedStep) -> str:
    """The fit with the tensor efficiency held fast: what the runs say about it, and what follows for the fused step."""
    rows = []
    for value in PINNED:
        priors = PRIORS | {"tensor": PRIORS["tensor"]._replace(expected=value, spread=1e-3)}
        found = fit(calibration.works, calibration.published, priors)
        errors = calibration.left_out.index.map(found.seconds) / calibration.left_out.published - 1
        e = found.efficiencies
        rows.append(
            {
                "tensor held at": f"{value:.2f}",
                "rms error of fit": f"{100 * root_mean_square(errors):.1f}%",
                **{name: f"{getattr(e, name):.2f}" for name in ("unaligned", "fp32", "bandwidth")},
                "host ms": f"{1e3 * e.host:.1f}",
                "fused Baseline s": f"{baseline.work.seconds(e):.3f}",
            }
        )
    return markdown(rows)


def _overlaps(progress: Callable[[str], None]) -> str:
    """Other answers to how much of a call's shorter part hides behind its longer one."""
    rows = []
    for overlap in OVERLAPS:
        found = calibrate(progress, overlap)
        step = project("Baseline", "triton", found, progress=progress, overlap=overlap)
        rows.append(
            {
                "hidden of the shorter": f"{overlap:.0%}",
                "mean leave-one-out error": f"{100 * mean_error(found.left_out.error):.2f}%",
                **{name: f"{getattr(found.fit.efficiencies, name):.2f}" for name in ("tensor", "bandwidth")},
                "fused Baseline s": f"{step.seconds:.3f}",
            }
        )
    return markdown(rows)


def _sensitivity(calibration: Calibration, baseline: ProjectedStep) -> str:
    """Baseline's fused step when one stated thing is otherwise."""
    values, device = calibration.fit.efficiencies, DEVICES[FITTED[0]]
    slow, fast = (work(baseline.counts, device, FITTED[1], gb * 1e9).seconds(values) for gb in (6, 24))
    cases = {
        "as projected": baseline.seconds,
        "exchange at 6 GB/s": slow,
        "exchange at 24 GB/s": fast,
        "exchange hidden behind backward": baseline.seconds - baseline.by_operator["exchange"],
        "the eager runs' host time there too": baseline.seconds + values[HOST] * baseline.micro_batch,
    }
    return markdown([{"if": name, "s per step": f"{seconds:.4f}"} for name, seconds in cases.items()])


def _devices(calibration: Calibration, progress: Callable[[str], None]) -> str:
    return markdown(
        [
            {
                "device": DEVICES[name].name,
                "compiled for": DEVICES[name].arch,
                "projected s": f"{p.seconds:.3f}",
                "90% range": _range(p),
                "arithmetic s": f"{p.arithmetic_seconds:.3f}",
            }
            for name in OTHERS
            for p in [project("Baseline", "triton", calibration, name, progress=progress)]
        ]
    )


def page(calibration: Calibration, progress: Callable[[str], None]) -> str:
    """The template filled in; every table of it says that it is a projection."""
    eager, fused = (
        [project(name, impl, calibration, progress=progress) for name in experiments.names()]
        for impl in ("eager", "triton")
    )
    base_eager, base = (next(p for p in many if p.experiment == "Baseline") for many in (eager, fused))
    text = (Path(__file__).parent / "template.md").read_text(encoding="utf-8")
    return text.format(
        made=f"As produced on {datetime.date.today().isoformat()} with torch {torch.__version__}.",
        halved_size=HALVED,
        halved=", ".join(sorted(HALVED_EXPERIMENTS)),
        launch=LAUNCH_SECONDS * 1e6,
        exchange=EXCHANGE_BANDWIDTH / 1e9,
        evaluation=EVALUATION_SECONDS,
        host_halved=calibration.fit.efficiencies.host * (MICRO_BATCH - HALVED),
        efficiencies=efficiencies(calibration),
        left_out=left_out(calibration),
        pinned=_pinned(calibration, base),
        overlaps=_overlaps(progress),
        published=calibration.published["Baseline"],
        without=calibration.published["Baseline"] - EVALUATION_SECONDS,
        faster=(calibration.published["Baseline"] - EVALUATION_SECONDS) / base.seconds,
        base=base,
        base_eager=base_eager,
        peak=DEVICES[FITTED[0]].bf16 / 1e12,
        asked=ASKED,
        verdict="met" if base.seconds < ASKED else f"not met, {1e3 * (base.seconds - ASKED):.1f} ms above",
        share=base.arithmetic_seconds / base.seconds,
        aim=AIM,
        away=f"{1e3 * (base.seconds - AIM):.1f} ms away" if base.seconds > AIM else "met",
        excess=_excess(base, calibration),
        operators=operators(base),
        kernels=kernels(base, calibration),
        sensitivity=_sensitivity(calibration, base),
        eager=predictions(eager),
        fused=predictions(fused),
        devices=_devices(calibration, progress),
    ).rstrip()
