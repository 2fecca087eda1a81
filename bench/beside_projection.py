"""What the first hour measured beside what was projected for this device."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import machine
from bench.cache import LENGTHS, ROOT
from bench.predecessor import SEQUENCES
from bench.projection import Projection
from bench.report.load import ReportError, benchmark, projections, read_projections
from bench.report.page import Section
from march.cost import DEVICES, find_device


def projected_here(paths: list[Path]) -> list[Projection]:
    """Projections of Baseline's fused step: from files, else by bench.projection for this device where it lists it."""
    if paths:
        return projections(paths)
    device = machine.listed()
    if device is None:
        return []
    key = next(name for name, one in DEVICES.items() if one == device)
    command = [sys.executable, "-m", "bench.projection", "--exp", "Baseline", "--impl", "triton"]
    command += ["--device", key, "--gpus", str(torch.cuda.device_count()), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return []
    return read_projections(done.stdout, "bench.projection")


def beside_the_projection(results: Path, cuda: bool, found: Sequence[Projection]) -> Section:
    """Measured tokens/s of a GPU beside what was projected for it; a CPU's times beside nothing."""
    title = "Beside the projection"
    if not cuda:
        text = "The projections are of GPUs; a CPU's times are not comparable with them, so nothing is compared here."
        return Section(title, "", [text])
    listed = machine.listed()
    own = [p for p in found if p.impl == "triton" and listed is not None and find_device(p.device) == listed]
    if not own:
        name = listed.name if listed else f"{machine.device_name()}, which march.cost.devices does not list"
        return Section(title, "", [f"No projection of the fused step is there for {name}."])
    try:
        rows_here = benchmark(results).suite("experiments", implementation="triton")
    except ReportError as error:
        return Section(title, "", [f"Nothing measured to compare: {error}"])
    measured = {row["experiment"]: row["tokens_per_second"] for row in rows_here}
    rows = []
    for one in own:
        here = measured.get(one.experiment)
        if here is None:
            continue
        # of encoder and decoder positions, of one GPU
        there, slow, fast = (SEQUENCES * sum(LENGTHS) / (s * one.gpus) for s in (one.seconds, one.high, one.low))
        outside = "slower than projected" if here < slow else "faster than projected"
        rows.append(
            {
                "experiment": one.experiment,
                "measured": f"{here:.0f}",
                "projected": f"{there:.0f} [{slow:.0f} .. {fast:.0f}]",
                "measured over projected": f"{here / there:.2f}",
                "": "within the range" if slow <= here <= fast else outside,
            }
        )
    text = [
        "Positions a second of one GPU. Measured: a micro-batch's forward, backward and AdamW. Projected: a step of "
        "1024 sequences, with gradient exchange where there are several GPUs."
    ]
    if not rows:
        text = ["No experiment is both measured and projected."]
    return Section(title, "GPU time; projection", text, rows)
