"""What the first hour measured beside what was projected for this device."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.cache import LENGTHS, ROOT
from bench.projection import Projection
from bench.report.load import ReportError, benchmark, projections, read_projections
from march.cost import DEVICES, find_device
from march.predecessor.runs import SEQUENCES


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
    return [] if done.returncode else read_projections(done.stdout, "bench.projection")


def beside_the_projection(results: Path, cuda: bool, found: Sequence[Projection]) -> tuple[list[dict[str, Any]], str]:
    """(measured positions/s of a GPU beside what was projected for it, by experiment; why there is none)."""
    if not cuda:
        return (
            [],
            "The projections are of GPUs; a CPU's times are not comparable with them, so nothing is compared here.",
        )
    listed = machine.listed()
    own = [p for p in found if p.impl == "triton" and listed is not None and find_device(p.device) == listed]
    if not own:
        name = listed.name if listed else f"{machine.device_name()}, which march.cost.devices does not list"
        return [], f"No projection of the fused step is there for {name}."
    try:
        rows = benchmark(results).suite("experiments", implementation="triton")
    except ReportError as error:
        return [], f"Nothing measured to compare: {error}"
    measured = {row["experiment"]: row["tokens_per_second"] for row in rows}
    compared = []
    for one in (p for p in own if p.experiment in measured):
        here = measured[one.experiment]
        # of encoder and decoder positions, of one GPU
        there, slow, fast = (SEQUENCES * sum(LENGTHS) / (s * one.gpus) for s in (one.seconds, one.high, one.low))
        outside = "slower than projected" if here < slow else "faster than projected"
        numbers = {"measured": here, "projected": there, "slow": slow, "fast": fast, "ratio": here / there}
        verdict = "within the range" if slow <= here <= fast else outside
        compared.append({"experiment": one.experiment, **numbers, "verdict": verdict})
    return compared, "No experiment is both measured and projected."
