"""Tables of projections, each of which says that it is one; and docs/projection.md, template.md with its tables."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from bench.predecessor import EVALUATION_SECONDS, HALVED, HALVED_EXPERIMENTS, MICRO_BATCH
from bench.projection.fit import NOISE, PRIORS, fit, mean_error, root_mean_square
from bench.projection.model import EXCHANGE_BANDWIDTH, LAUNCH_SECONDS, work
from bench.projection.project import FITTED, Calibration, ProjectedStep, calibrate, kernels_of, project
from bench.tables import Row, markdown, table
from march import experiments
from march.cost.devices import DEVICES

TITLE = "Projection, not measured"
ASKED, AIM = 0.21, 0.185
# the tensor efficiency held fast; shares of a call's shorter part that hide behind the longer one
PINNED, OVERLAPS = (0.40, 0.50, 0.60, 0.70, 0.75, 0.80), (1.0, 0.5, 0.0)
# one card an architecture and those of sm_86
OTHERS = ("a5000", "a6000", "3090", "4090", "l4", "a100", "h100")


def predictions(steps: Sequence[ProjectedStep]) -> str:
    """One line an experiment and implementation; relative to Baseline of the same implementation where it is there."""
    baseline = {p.impl: p.seconds for p in steps if p.experiment == "Baseline"}
    rows = table(
        "experiment | impl | micro-batches | projected s | 90% range | to Baseline | arithmetic s | published s | "
        "difference",
        "{p.experiment} | {p.impl} | {p.micro_batches} x {p.micro_batch} | {p.seconds:.4f} | {p.low:.3f} "
        "to {p.high:.3f} | {ratio:.3f} | {p.arithmetic_seconds:.4f} | {p.published_seconds:.4f} | {off:+.1%}",
        [
            {
                "p": p,
                "ratio": p.seconds / baseline[p.impl] if p.impl in baseline else None,
                "off": p.seconds / p.published_seconds - 1 if p.published_seconds else None,
            }
            for p in steps
        ],
    )
    where = ", ".join(sorted({f"{p.gpus} x {DEVICES[p.device].name}" for p in steps}))
    return f"{TITLE}: seconds per step of 1024 sequences on {where}.\n\n{markdown(rows)}"


def efficiencies(calibration: Calibration) -> str:
    """The fitted numbers beside what was expected and their bounds."""
    spreads = calibration.fit.covariance.diagonal() ** 0.5
    fitted = zip(calibration.fit.efficiencies._asdict().items(), spreads, strict=True)
    rows = table(
        "efficiency | fitted | uncertain by | expected | bounds | where the expectation is from",
        "{name} | {value} | {spread:.0%} | {prior.expected:g} +- {prior.spread:.0%} | "
        "{prior.low:g} to {prior.high:g} | {prior.source}",
        [
            {"name": n, "value": f"{x:.4f}" if n == "host" else f"{x:.3f}", "spread": spread, "prior": PRIORS[n]}
            for (n, x), spread in fitted
        ],
    )
    return (
        f"{TITLE}: efficiencies of the time model, fitted to the eager runs alone.\n\n{markdown(rows)}\n\n"
        f"Stated, not fitted: {LAUNCH_SECONDS * 1e6:.0f} us a call, {EXCHANGE_BANDWIDTH / 1e9:.0f} GB/s for the "
        f"exchange, {EVALUATION_SECONDS:.3f} s per step of evaluation in the published seconds, "
        f"{NOISE:.0%} noise of a run."
    )


def left_out(calibration: Calibration) -> str:
    """Each published run projected without it, and by the naive baseline."""
    runs = calibration.left_out.assign(fitted=pd.Series(calibration.fit.seconds))
    rows = table(
        "experiment | published s | fitted s | left out s | error | naive error | published to Baseline | "
        "fitted to Baseline",
        "{name} | {published:.4f} | {fitted:.4f} | {projected:.4f} | {error:+.1%} | {naive_error:+.1%} | "
        "{a:+.3f} | {b:+.3f}",
        runs.assign(
            name=runs.index,
            a=runs.published - runs.published["Baseline"],
            b=runs.fitted - runs.fitted["Baseline"],
        ).to_dict("records"),
    )
    narrow = runs.drop("BaselineFP32")
    errors = [mean_error(frame[name]) for frame in (runs, narrow) for name in ("error", "naive_error")]
    return (
        f"{TITLE}: each run projected by a fit to the other {len(runs) - 1}; naive baseline: their median.\n\n"
        f"{markdown(rows)}\n\n"
        "Mean absolute leave-one-out error {:.2%}, of the naive baseline {:.2%}; without BaselineFP32 {:.2%} and "
        "{:.2%}. Root mean square {:.2%}.".format(*errors, calibration.noise)
    )


def operators(step: ProjectedStep) -> str:
    """Milliseconds of a step by operator."""
    items = [{"name": name, "s": s, "share": s / step.seconds} for name, s in step.by_operator.items()]
    rows = table("operator | ms | share", "{name} | {s:.2ms} | {share:.1%}", items)
    return f"{TITLE}: {step.experiment}, {step.impl}, {step.seconds:.4f} s per step, by operator.\n\n{markdown(rows)}"


def kernels(step: ProjectedStep, calibration: Calibration, least: float = 5e-4) -> str:
    """Where a step's time is, kernel by kernel; those of `least` seconds and more."""
    found = kernels_of(step, calibration)
    shown = found.seconds >= least
    rows = table(
        "operator | phase | kernel | calls | ms | products alone | bytes alone | beyond 0.80 of peak",
        "{operator} | {phase} | {kernel} | {calls:.0f} | {seconds:.2ms} | {products:.2ms} | {bytes:.2ms} | "
        "{beyond:.2ms}",
        found[shown].to_dict("records"),
    )
    rest = f"{1e3 * found.seconds[~shown].sum():.2f} ms in others"
    said = f"{TITLE}: {step.experiment}, {step.impl}, kernel by kernel, ms per step; {rest}."
    return f"{said}\n\n{markdown(rows)}"


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


def _pinned(calibration: Calibration, baseline: ProjectedStep) -> list[Row]:
    """The fit with the tensor efficiency held fast: what the runs say about it, and what follows for the fused step."""
    items = []
    for value in PINNED:
        priors = PRIORS | {"tensor": PRIORS["tensor"]._replace(expected=value, spread=1e-3)}
        found = fit(calibration.works, calibration.published, priors)
        error = root_mean_square(pd.Series(found.seconds) / calibration.left_out.published - 1)
        fused = baseline.work.seconds(found.efficiencies)
        items.append({"tensor": value, "error": error, "e": found.efficiencies, "fused": fused})
    return table(
        "tensor held at | rms error of fit | unaligned | fp32 | bandwidth | host ms | fused Baseline s",
        "{tensor:.2f} | {error:.1%} | {e.unaligned:.2f} | {e.fp32:.2f} | {e.bandwidth:.2f} | {e.host:.1ms} | "
        "{fused:.3f}",
        items,
    )


def _overlaps(progress: Callable[[str], None]) -> list[Row]:
    """Other answers to how much of a call's shorter part hides behind its longer one."""
    items = []
    for overlap in OVERLAPS:
        found = calibrate(progress, overlap)
        step = project("Baseline", "triton", found, progress=progress, overlap=overlap)
        error = mean_error(found.left_out.error)
        items.append({"overlap": overlap, "error": error, "e": found.fit.efficiencies, "step": step})
    return table(
        "hidden of the shorter | mean leave-one-out error | tensor | bandwidth | fused Baseline s",
        "{overlap:.0%} | {error:.2%} | {e.tensor:.2f} | {e.bandwidth:.2f} | {step.seconds:.3f}",
        items,
    )


def _sensitivity(calibration: Calibration, baseline: ProjectedStep) -> list[Row]:
    """Baseline's fused step when one stated thing is otherwise."""
    values, device = calibration.fit.efficiencies, DEVICES[FITTED[0]]
    slow, fast = (work(baseline.counts, device, FITTED[1], gb * 1e9).seconds(values) for gb in (6, 24))
    cases = {
        "as projected": baseline.seconds,
        "exchange at 6 GB/s": slow,
        "exchange at 24 GB/s": fast,
        "exchange hidden behind backward": baseline.seconds - baseline.by_operator["exchange"],
        "the eager runs' host time there too": baseline.seconds + values.host * baseline.micro_batch,
    }
    return [{"if": name, "s per step": f"{seconds:.4f}"} for name, seconds in cases.items()]


def _devices(calibration: Calibration, progress: Callable[[str], None]) -> list[Row]:
    found = [project("Baseline", "triton", calibration, name, progress=progress) for name in OTHERS]
    return table(
        "device | compiled for | projected s | 90% range | arithmetic s",
        "{d.name} | {d.arch} | {p.seconds:.3f} | {p.low:.3f} to {p.high:.3f} | {p.arithmetic_seconds:.3f}",
        [{"p": p, "d": DEVICES[p.device]} for p in found],
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
        pinned=markdown(_pinned(calibration, base)),
        overlaps=markdown(_overlaps(progress)),
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
        sensitivity=markdown(_sensitivity(calibration, base)),
        eager=predictions(eager),
        fused=predictions(fused),
        devices=markdown(_devices(calibration, progress)),
    ).rstrip()
