"""Projected seconds of a training step, from counted work and fitted efficiencies. A projection, never a measurement.

`collect` counts what a step dispatches and launches, the eager one of `march.predecessor` and the fused one of march,
and keeps the counts on disk; `model` gives each call its time; `fit` finds the efficiencies on the published seconds;
`project` applies them; `tables` prints. `python -m bench.projection` is the command.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """The projected step of one experiment, as a file has it. impl: "eager" or "triton". seconds, low, high: of a step
    on `gpus` devices `device`, with the range that the fit's error implies; by_operator: what adds up to it."""

    experiment: str
    impl: str
    device: str
    gpus: int
    seconds: float
    low: float
    high: float
    by_operator: dict[str, float]
    published_seconds: float | None
