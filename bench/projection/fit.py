"""Efficiencies from published seconds: least squares of relative errors, within bounds, with physical priors.

The residuals are (projected / published - 1) / NOISE for each run, and ln(value / expected) / spread for each
efficiency. Runs of equal arithmetic took 2 to 7% different times, hence NOISE. Twelve runs do not tell the tensor
efficiency, the bandwidth's and the host's share apart (docs/projection.md shows how far), so the priors decide where
the runs cannot: they are measurements of others on cards of the same architecture, stated with each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.projection.model import NAMES, Efficiencies, Work

NOISE = 0.03


@dataclass(frozen=True)
class Prior:
    """Expected value, its spread as a standard deviation of the logarithm, bounds, and where it is from."""

    expected: float
    spread: float
    low: float
    high: float
    source: str


_TORCH = "torch.matmul of large squares on cards of sm_86, posted by users (zzc0721/torch-performance-test-data)"
PRIORS = {
    "tensor": Prior(0.76, 0.08, 0.20, 0.80, f"{_TORCH}: A6000 123 of 155 TFLOP/s, A4000 56 to 63 of 77"),
    "unaligned": Prior(0.45, 0.50, 0.05, 0.80, "none: wide"),
    "fp32": Prior(0.61, 0.10, 0.20, 0.80, f"{_TORCH}: A6000 23.9 of 38.7 TFLOP/s, A4000 9 to 12 of 19"),
    "bandwidth": Prior(0.70, 0.20, 0.30, 0.85, "elementwise kernels of torch, half of them on rows of odd length"),
    "host": Prior(0.004, 1.00, 1e-5, 0.02, "none: wide"),
}


@dataclass(frozen=True)
class Fit:
    """efficiencies; covariance of their logarithms; projected seconds of each run."""

    efficiencies: Efficiencies
    covariance: np.ndarray
    seconds: dict[str, float]

    def spread(self, work: Work) -> float:
        """Standard deviation of the logarithm of a step's seconds that the efficiencies' uncertainty implies."""
        slope = _slopes(lambda x: np.array([np.log(work.seconds(np.exp(x)))]), np.log(self.efficiencies.array()))[0]
        return float(np.sqrt(slope @ self.covariance @ slope))


def _slopes(function, x: np.ndarray) -> np.ndarray:
    """Jacobian by central differences; rows: outputs."""
    step = 1e-4
    columns = []
    for i in range(len(x)):
        shift = np.zeros_like(x)
        shift[i] = step
        columns.append((function(x + shift) - function(x - shift)) / (2 * step))
    return np.stack(columns, 1)


def fit(works: Mapping[str, Work], published: Mapping[str, float], priors: Mapping[str, Prior] = PRIORS) -> Fit:
    """Efficiencies for the runs in `published` (seconds a step), whose works are given. Levenberg-Marquardt in
    logarithms; a value that would leave its bounds stays on them."""
    names = list(published)
    chosen = [priors[name] for name in NAMES]
    expected = np.log([prior.expected for prior in chosen])
    spread = np.array([prior.spread for prior in chosen])
    low, high = (np.log([getattr(prior, side) for prior in chosen]) for side in ("low", "high"))

    def residuals(x: np.ndarray) -> np.ndarray:
        values = np.exp(x)
        errors = [(works[name].seconds(values) / published[name] - 1) / NOISE for name in names]
        return np.concatenate([errors, (x - expected) / spread])

    x = np.clip(expected, low, high)
    damping, current = 1e-3, residuals(x)
    for _ in range(200):
        slopes = _slopes(residuals, x)
        normal, gradient = slopes.T @ slopes, slopes.T @ current
        # what stands on a bound and is pushed further out is left alone
        free = ~(((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)))
        step = np.zeros_like(x)
        inner = normal[np.ix_(free, free)]
        step[free] = -np.linalg.solve(inner + damping * np.diag(np.diag(inner)), gradient[free])
        tried = np.clip(x + step, low, high)
        found = residuals(tried)
        if found @ found < current @ current:
            gain = current @ current - found @ found
            x, current, damping = tried, found, damping / 4
            if gain < 1e-10:
                break
        elif damping > 1e8:
            break
        else:
            damping *= 4
    slopes = _slopes(residuals, x)
    values = np.exp(x)
    return Fit(
        Efficiencies(*map(float, values)),
        np.linalg.inv(slopes.T @ slopes),
        {name: works[name].seconds(values) for name in names},
    )


@dataclass(frozen=True)
class LeftOut:
    """A run projected by a fit without it; guess: the constant guess of the others, the median of their seconds."""

    name: str
    published: float
    projected: float
    guess: float
    efficiencies: Efficiencies

    @property
    def error(self) -> float:
        return self.projected / self.published - 1

    @property
    def guess_error(self) -> float:
        return self.guess / self.published - 1


def leave_one_out(
    works: Mapping[str, Work], published: Mapping[str, float], priors: Mapping[str, Prior] = PRIORS
) -> list[LeftOut]:
    """Each run projected by a fit to the others."""
    rows = []
    for name, seconds in published.items():
        others = {other: value for other, value in published.items() if other != name}
        found = fit(works, others, priors).efficiencies
        guess = float(np.median(list(others.values())))
        rows.append(LeftOut(name, seconds, works[name].seconds(found.array()), guess, found))
    return rows


def mean_error(errors: Sequence[float]) -> float:
    return float(np.mean(np.abs(errors)))


def root_mean_square(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
