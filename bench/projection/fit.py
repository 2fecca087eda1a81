"""Efficiencies from published seconds: least squares of relative errors, within bounds, with physical priors.

The residuals are (projected / published - 1) / NOISE for each run, and ln(value / expected) / spread for each
efficiency. Runs of equal arithmetic took 2 to 7% different times, hence NOISE. Twelve runs do not tell the tensor
efficiency, the bandwidth's and the host's share apart (docs/projection.md shows how far), so the priors decide where
the runs cannot: they are measurements of others on cards of the same architecture, stated with each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from bench.projection.model import NAMES, Efficiencies, Work

NOISE = 0.03


class Prior(NamedTuple):
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
        x, h = np.log(self.efficiencies), 1e-4
        above, below = (
            np.log([work.seconds(np.exp(x + sign * step)) for step in h * np.eye(len(x))]) for sign in (1, -1)
        )
        slope = (above - below) / (2 * h)
        return float(np.sqrt(slope @ self.covariance @ slope))


def fit(works: Mapping[str, Work], published: Mapping[str, float], priors: Mapping[str, Prior] = PRIORS) -> Fit:
    """Efficiencies for the runs in `published` (seconds per step), whose works are given."""
    chosen = pd.DataFrame(priors, index=Prior._fields)[list(NAMES)].T
    expected, low, high = (np.log(chosen[side].to_numpy(float)) for side in ("expected", "low", "high"))
    spread = chosen.spread.to_numpy(float)

    def residuals(x: np.ndarray) -> np.ndarray:
        errors = [(works[name].seconds(np.exp(x)) / seconds - 1) / NOISE for name, seconds in published.items()]
        return np.concatenate([errors, (x - expected) / spread])

    found = least_squares(
        residuals, expected, jac="3-point", bounds=(low, high), x_scale=spread, ftol=1e-12, xtol=1e-12, gtol=1e-12
    )
    values = np.exp(found.x)
    covariance = np.linalg.inv(found.jac.T @ found.jac)
    return Fit(Efficiencies(*map(float, values)), covariance, {name: works[name].seconds(values) for name in published})


def leave_one_out(
    works: Mapping[str, Work], published: Mapping[str, float], priors: Mapping[str, Prior] = PRIORS
) -> pd.DataFrame:
    """Each run, by name, projected by a fit to the others; naive: the median of the others' seconds."""
    seconds = pd.Series(published)
    rows = {}
    for name in published:
        others = seconds.drop(name)
        found = fit(works, others.to_dict(), priors).efficiencies
        rows[name] = {"published": seconds[name], "projected": works[name].seconds(found), "naive": others.median()}
    table = pd.DataFrame(rows).T
    return table.assign(error=table.projected / table.published - 1, naive_error=table.naive / table.published - 1)


def mean_error(errors: pd.Series) -> float:
    return float(errors.abs().mean())


def root_mean_square(errors: pd.Series) -> float:
    return float((errors**2).mean() ** 0.5)
