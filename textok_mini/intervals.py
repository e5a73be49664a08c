"""How sure we may be of a figure: 95% intervals over images, and over training seeds.

paired_bootstrap(metrics["psnr"], twin["psnr"])     # over images: +0.81 [+0.78, +0.84]
seeds_interval([0.84, 0.78, 0.80, 0.83, 0.79])      # over seeds: +0.81 [+0.78, +0.84]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval. Prints as a difference, `+0.81 [+0.78, +0.84]`; f"{x:.1f}" as a level."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str = "") -> str:
        spec = spec or "+.2f"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    __str__ = __format__


def bootstrap_mean(values: Sequence[float], n: int = 10_000, seed: int = 0) -> Interval:
    """The mean over images and its 95% percentile-bootstrap interval, from `n` resamples.
    It speaks of these weights on other images; of another training speaks `seeds_interval`.
    Raises ValueError for fewer than two values or one that is not finite (two identical images' PSNR)."""
    values, rng = _checked(values), np.random.default_rng(seed)
    lots = [min(100, n - start) for start in range(0, n, 100)]  # of 50,000 images all would take gigabytes
    means = np.concatenate([values[rng.integers(len(values), size=(lot, len(values)))].mean(1) for lot in lots])
    return Interval(float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist())


def paired_bootstrap(a: Sequence[float], b: Sequence[float], n: int = 10_000, seed: int = 0) -> Interval:
    """The same of `a - b`, measured on the same images in one order, which removes how hard each image is."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: a pair needs both")
    return bootstrap_mean(np.asarray(a, float) - np.asarray(b, float), n, seed)


def seeds_interval(values: Sequence[float]) -> Interval:
    """The mean over training seeds and its 95% interval by Student's t: mean +- t * s / sqrt(n)."""
    values = _checked(values)
    mean, half = values.mean(), special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(mean), float(mean - half), float(mean + half))


def _checked(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs two or more finite values, not {values}")
    return values
