"""docs/projection.md: template.md with its tables, written anew by `python -m bench.projection --markdown`."""

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.ledger import markdown
from bench.projection import table
from bench.projection.fit import PRIORS, fit, mean_error, root_mean_square
from bench.projection.model import EXCHANGE_BANDWIDTH, HOST, LAUNCH_SECONDS, work
from bench.projection.predecessor import EVALUATION_SECONDS, HALVED, HALVED_EXPERIMENTS, MICRO_BATCH, published_seconds
from bench.projection.project import FITTED, Calibration, Projection, calibrate, project
from march import experiments
from march.cost.devices import DEVICES

PINNED = (0.40, 0.50, 0.60, 0.70, 0.75, 0.80)
OVERLAPS = (1.0, 0.5, 0.0)
# one card an architecture and those of sm_86
OTHERS = ("a5000", "a6000", "3090", "4090", "l4", "a100", "h100")
TEMPLATE = Path(__file__).parent / "template.md"


def _pinned(calibration: Calibration, baseline: Projection) -> str:
    """The fit with the tensor efficiency held fast: what the runs say about it, and what follows for the fused step."""
    rows = []
    for value in PINNED:
        priors = {**PRIORS, "tensor": replace(PRIORS["tensor"], expected=value, spread=1e-3)}
        found = fit(calibration.works, calibration.published, priors)
        errors = [found.seconds[name] / seconds - 1 for name, seconds in calibration.published.items()]
        e = found.efficiencies
        rows.append(
            [
                f"{value:.2f}",
                f"{100 * root_mean_square(errors):.1f}%",
                f"{e.unaligned:.2f}",
                f"{e.fp32:.2f}",
                f"{e.bandwidth:.2f}",
                f"{1e3 * e.host:.1f}",
                f"{baseline.work.seconds(e.array()):.3f}",
            ]
        )
    header = ("tensor held at", "rms error of fit", "unaligned", "fp32", "bandwidth", "host ms", "fused Baseline s")
    return (
        f"{table.TITLE}. The twelve runs do not tell the tensor efficiency: any value fits them within their noise of "
        "2 to 7%, so what others measured decides.\n\n" + markdown(header, rows)
    )


def _overlaps(progress: Callable[[str], None]) -> str:
    """Other answers to how much of a call's shorter part hides behind its longer one."""
    rows = []
    for overlap in OVERLAPS:
        found = calibrate(progress, overlap)
        errors = [row.error for row in found.left_out]
        step = project("Baseline", "triton", found, progress=progress, overlap=overlap)
        rows.append(
            [
                f"{overlap:.0%}",
                f"{100 * mean_error(errors):.2f}%",
                f"{found.fit.efficiencies.tensor:.2f}",
                f"{found.fit.efficiencies.bandwidth:.2f}",
                f"{step.seconds:.3f}",
            ]
        )
    header = ("hidden of the shorter", "mean leave-one-out error", "tensor", "bandwidth", "fused Baseline s")
    return (
        f"{table.TITLE}. How much of a call's bytes hide behind its products, or the other way round, the runs cannot "
        "tell either: they lean towards less, by less than their noise. 100%, the roofline, is the model here: the "
        "loops of the fused kernels load the next tiles while they multiply.\n\n" + markdown(header, rows)
    )


def _sensitivity(calibration: Calibration, baseline: Projection) -> str:
    """Baseline's fused step when one stated thing is otherwise."""
    values, counts = calibration.fit.efficiencies.array(), baseline.counts
    device = DEVICES[FITTED[0]]
    host = values[HOST] * counts.micro_batch
    cases = [
        ("as projected", baseline.seconds),
        *((f"exchange at {gb} GB/s", work(counts, device, FITTED[1], gb * 1e9).seconds(values)) for gb in (6, 24)),
        ("exchange hidden behind backward", baseline.seconds - baseline.by_operator["exchange"]),
        ("the eager runs' host time there too", baseline.seconds + host),
    ]
    rows = [[name, f"{seconds:.4f}"] for name, seconds in cases]
    return f"{table.TITLE}: Baseline's fused step if one thing were otherwise.\n\n" + markdown(("if", "s a step"), rows)


def _devices(calibration: Calibration, progress: Callable[[str], None]) -> str:
    found = [project("Baseline", "triton", calibration, name, progress=progress) for name in OTHERS]
    rows = [
        [
            DEVICES[p.device].name,
            DEVICES[p.device].arch,
            f"{p.seconds:.3f}",
            f"{p.low:.3f} to {p.high:.3f}",
            f"{p.arithmetic:.3f}",
        ]
        for p in found
    ]
    header = ("device", "compiled for", "projected s", "90% range", "arithmetic s")
    return (
        f"{table.TITLE}: Baseline's fused step on 8 of other devices, with the A5000's efficiencies and exchange.\n\n"
        + markdown(header, rows)
    )


def _baseline(eager: Projection, fused: Projection) -> str:
    published = published_seconds()["Baseline"]
    without = published - EVALUATION_SECONDS
    return (
        f"Published: {published:.4f} s a step, {without:.3f} s without its evaluation. Projected with fused kernels: "
        f"**{fused.seconds:.3f} s** ({fused.low:.3f} to {fused.high:.3f}), {without / fused.seconds:.1f} times faster. "
        f"Arithmetic limit, {fused.work.micro_batches * fused.counts.flops / 1e12:.1f} TFLOP a GPU at the peak of "
        f"{DEVICES[FITTED[0]].bf16 / 1e12:.0f} TFLOP/s: {fused.arithmetic:.3f} s (the eager step's: "
        f"{eager.arithmetic:.3f} s)."
    )


def page(calibration: Calibration, progress: Callable[[str], None]) -> str:
    """The template filled in; every table of it says that it is a projection."""
    eager, fused = (
        [project(name, impl, calibration, progress=progress) for name in experiments.names()]
        for impl in ("eager", "triton")
    )
    base_eager, base_fused = (next(p for p in many if p.experiment == "Baseline") for many in (eager, fused))
    host = calibration.fit.efficiencies.host
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .format(
            made=f"As produced on {datetime.date.today().isoformat()} with torch {torch.__version__}.",
            halved_size=HALVED,
            halved=", ".join(sorted(HALVED_EXPERIMENTS)),
            launch=f"{LAUNCH_SECONDS * 1e6:.0f}",
            exchange=f"{EXCHANGE_BANDWIDTH / 1e9:.0f}",
            evaluation=f"{EVALUATION_SECONDS:.3f}",
            host_halved=f"{host * (MICRO_BATCH - HALVED):.2f}",
            efficiencies=table.efficiencies(calibration),
            left_out=table.left_out(calibration),
            pinned=_pinned(calibration, base_fused),
            overlaps=_overlaps(progress),
            baseline=_baseline(base_eager, base_fused),
            held_back=table.held_back(base_fused, calibration),
            operators=table.operators(base_fused),
            kernels=table.kernels(base_fused, calibration),
            sensitivity=_sensitivity(calibration, base_fused),
            eager=table.predictions(eager),
            fused=table.predictions(fused),
            devices=_devices(calibration, progress),
        )
        .rstrip()
    )
