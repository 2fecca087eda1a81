"""Tables of projections, each of which says that it is one."""

from collections.abc import Sequence

from bench.ledger import markdown
from bench.projection.fit import NOISE, PRIORS, mean_error
from bench.projection.model import EXCHANGE_BANDWIDTH, LAUNCH_SECONDS, NAMES
from bench.projection.predecessor import EVALUATION_SECONDS
from bench.projection.project import Calibration, Projection, guess_error, kernels_of
from march.cost.devices import DEVICES

TITLE = "Projection, not measured"
ASKED, AIM = 0.21, 0.185


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}%"


def predictions(projections: Sequence[Projection]) -> str:
    """One line an experiment and implementation; relative to Baseline of the same implementation where it is there."""
    baseline = {p.impl: p.seconds for p in projections if p.experiment == "Baseline"}
    cells = []
    for p in projections:
        cells.append(
            [
                p.experiment,
                p.impl,
                f"{p.work.micro_batches} x {p.counts.micro_batch}",
                f"{p.seconds:.4f}",
                f"{p.low:.3f} to {p.high:.3f}",
                f"{p.seconds / baseline[p.impl]:.3f}" if p.impl in baseline else "-",
                f"{p.arithmetic:.4f}",
                f"{p.published:.4f}" if p.published else "-",
                _percent(p.seconds / p.published - 1) if p.published else "-",
            ]
        )
    header = (
        "experiment",
        "impl",
        "micro-batches",
        "projected s",
        "90% range",
        "to Baseline",
        "arithmetic s",
        "published s",
        "difference",
    )
    where = ", ".join(sorted({f"{p.gpus} x {DEVICES[p.device].name}" for p in projections}))
    return f"{TITLE}: seconds a step of 1024 sequences on {where}.\n\n" + markdown(header, cells)


def efficiencies(calibration: Calibration) -> str:
    """The fitted numbers beside what was expected and their bounds."""
    found, covariance = calibration.fit.efficiencies, calibration.fit.covariance
    cells = []
    for i, name in enumerate(NAMES):
        prior = PRIORS[name]
        cells.append(
            [
                name,
                f"{getattr(found, name):.4f}" if name == "host" else f"{getattr(found, name):.3f}",
                f"{100 * covariance[i, i] ** 0.5:.0f}%",
                f"{prior.expected:g} +- {100 * prior.spread:.0f}%",
                f"{prior.low:g} to {prior.high:g}",
                prior.source,
            ]
        )
    header = ("efficiency", "fitted", "uncertain by", "expected", "bounds", "where the expectation is from")
    return (
        f"{TITLE}: efficiencies of the time model, fitted to the eager runs alone.\n\n"
        + markdown(header, cells)
        + f"\n\nStated, not fitted: {LAUNCH_SECONDS * 1e6:.0f} us a call, {EXCHANGE_BANDWIDTH / 1e9:.0f} GB/s for the "
        f"exchange, {EVALUATION_SECONDS:.3f} s a step of evaluation in the published seconds, "
        f"{100 * NOISE:.0f}% noise of a run."
    )


def left_out(calibration: Calibration) -> str:
    """Each published run projected without it, and the constant guess of the others."""
    fitted, base = calibration.fit.seconds, calibration.published["Baseline"]
    cells = [
        [
            row.name,
            f"{row.published:.4f}",
            f"{fitted[row.name]:.4f}",
            f"{row.projected:.4f}",
            _percent(row.error),
            _percent(row.guess_error),
            f"{row.published - base:+.3f}",
            f"{fitted[row.name] - fitted['Baseline']:+.3f}",
        ]
        for row in calibration.left_out
    ]
    header = (
        "experiment",
        "published s",
        "fitted s",
        "left out s",
        "error",
        "guess's error",
        "published to Baseline",
        "fitted to Baseline",
    )
    errors = [row.error for row in calibration.left_out]
    without = [row for row in calibration.left_out if row.name != "BaselineFP32"]
    return (
        f"{TITLE}: each run projected by a fit to the other {len(errors) - 1}; guess: their median.\n\n"
        + markdown(header, cells)
        + f"\n\nMean absolute leave-one-out error {100 * mean_error(errors):.2f}%, of the constant guess "
        f"{100 * guess_error(calibration):.2f}%; without BaselineFP32 "
        f"{100 * mean_error([r.error for r in without]):.2f}% and "
        f"{100 * mean_error([r.guess_error for r in without]):.2f}%. Root mean square {100 * calibration.noise:.2f}%."
    )


def operators(projection: Projection) -> str:
    """Milliseconds of a step by operator."""
    cells = [
        [name, f"{1e3 * s:.2f}", f"{100 * s / projection.seconds:.1f}%"] for name, s in projection.by_operator.items()
    ]
    return (
        f"{TITLE}: {projection.experiment}, {projection.impl}, {projection.seconds:.4f} s a step, by operator.\n\n"
        + markdown(("operator", "ms", "share"), cells)
    )


def kernels(projection: Projection, calibration: Calibration, least: float = 5e-4) -> str:
    """Where a step's time is, kernel by kernel; those of `least` seconds and more."""
    rows = kernels_of(projection, calibration)
    cells = [
        [
            row["operator"],
            row["phase"],
            row["kernel"],
            f"{row['calls']:.0f}",
            *(f"{1e3 * row[name]:.2f}" for name in ("seconds", "products", "bytes", "beyond")),
        ]
        for row in rows
        if row["seconds"] >= least
    ]
    rest = sum(row["seconds"] for row in rows if row["seconds"] < least)
    header = ("operator", "phase", "kernel", "calls", "ms", "products alone", "bytes alone", "beyond 0.80 of peak")
    return (
        f"{TITLE}: {projection.experiment}, {projection.impl}, kernel by kernel, ms a step; "
        f"{1e3 * rest:.2f} ms in others.\n\n" + markdown(header, cells)
    )


def held_back(projection: Projection, calibration: Calibration) -> str:
    """What stands between a fused step and the aim, longest excess first."""
    seconds = projection.seconds
    verdict = "met" if seconds < ASKED else f"not met, {1e3 * (seconds - ASKED):.1f} ms above"
    lines = [
        f"{TITLE}: {projection.experiment}, {projection.impl}: {seconds:.4f} s ({projection.low:.3f} to "
        f"{projection.high:.3f}); below {ASKED} s asked: {verdict}. Its arithmetic at the full peak takes "
        f"{projection.arithmetic:.4f} s, {projection.arithmetic / seconds:.0%} of it.",
    ]
    if seconds > AIM:
        excess = [row for row in kernels_of(projection, calibration) if row["beyond"] > 5e-4]
        excess.sort(key=lambda row: -row["beyond"])
        rest = {name: value for name, value in projection.by_operator.items() if name in projection.work.rest}
        named = [f"{row['kernel']} ({row['operator']}, {row['phase']}) {1e3 * row['beyond']:.1f}" for row in excess]
        named += [f"{name} {1e3 * value:.1f}" for name, value in rest.items()]
        lines.append(
            f"The aim of {AIM} s is {1e3 * (seconds - AIM):.1f} ms away. Milliseconds beyond useful FLOPs at 0.80 of "
            "the peak: " + ", ".join(named) + "."
        )
    return "\n\n".join(lines)
