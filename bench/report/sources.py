"""What the sections are made from, together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report.counted import Counted
from bench.report.load import Benchmark, Projection
from march.cost import DEVICES, find_device

COUNTED = "counted, not run"
OURS = ("triton", "torch")
# the device of the published runs, whose data sheet the counts are held against
REFERENCE = DEVICES["a5000"]


@dataclass(frozen=True)
class Sources:
    benchmark: Benchmark
    counted: Mapping[str, Counted]
    projections: Sequence[Projection]
    out: Path

    @property
    def ours(self) -> str:
        """Which of our implementations was measured."""
        names = {row["implementation"] for row in self.benchmark.suite("kernels") + self.benchmark.suite("experiments")}
        return next((name for name in OURS if name in names), OURS[0])

    def projected(self, impl: str) -> dict[str, Projection]:
        """Projections on the reference device, by experiment."""
        return {p.experiment: p for p in self.projections if p.impl == impl and find_device(p.device) == REFERENCE}

    def fused(self) -> dict[str, Projection]:
        return self.projected("triton")

    @property
    def sizes(self) -> str:
        """Of the measured steps."""
        return next((row["sizes"] for row in self.benchmark.suite("experiments")), "")
