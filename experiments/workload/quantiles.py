"""Distributions through published percentiles, with the published means.

A quantity with a long tail is drawn through the standard normal quantile z of its percentile: the
logarithm of the value is a line between two published points, so the pieces are log-normal.

    ln value |                    . '     tail: steeper or flatter than its neighbour
             |               . P95
             |        . P75
             |   . P50
             | .'                         tail
             +----------------------- z

Nothing is published past the outermost points but the mean. Each tail goes on as the piece beside
it does, the upper one `tilt` times as steep and the lower one that many times less; the mean tells
`tilt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from experiments.workload.published import Counts, Spread

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NORMAL = NormalDist()
_MOST_TILT = 8.0
_HALVINGS = 60  # of an interval, to the precision of a float


@dataclass(frozen=True)
class Quantiles:
    """A distribution by its quantile function: pieces between `at` (standard normal quantiles)
    where the logarithm of the value is `logs`; `slopes` has one more entry than they, for the two
    tails. No value is above `most`, which lies in the upper tail."""

    at: tuple[float, ...]
    logs: tuple[float, ...]
    slopes: tuple[float, ...]
    most: float = math.inf

    def values(self, shares: Floats) -> Floats:
        """The values at these shares of the distribution, each between 0 and 1."""
        z = np.fromiter(map(_NORMAL.inv_cdf, shares), float, len(shares))
        piece = np.searchsorted(self.at, z)
        knot = np.maximum(piece - 1, 0)
        rise = np.take(self.slopes, piece) * (z - np.take(self.at, knot))
        values: Floats = np.minimum(np.exp(np.take(self.logs, knot) + rise), self.most)
        return values

    def moment(self, order: int) -> float:
        """The mean of the values to this power."""
        total = 0.0
        edges = (-math.inf, *self.at, math.inf)
        for piece, (low, high) in enumerate(pairwise(edges)):
            knot, slope = max(piece - 1, 0), self.slopes[piece]
            start = self.logs[knot] - slope * self.at[knot]
            if high == math.inf and self.most < math.inf:
                high = (math.log(self.most) - start) / slope
                total += self.most**order * (1 - _NORMAL.cdf(high))
            # The part of a log-normal's moment that lies between two of its quantiles.
            deviation = order * slope
            part = _below(high - deviation) - _below(low - deviation)
            total += math.exp(order * start + deviation**2 / 2) * part
        return total

    @property
    def squared_variation(self) -> float:
        """The variance divided by the squared mean."""
        return self.moment(2) / self.moment(1) ** 2 - 1


def through(published: Spread, most: float = math.inf) -> Quantiles:
    """The distribution through all published percentiles that has the published mean."""
    at = tuple(_NORMAL.inv_cdf(percent / 100) for percent, _ in published.percentiles)
    logs = tuple(math.log(value) for _, value in published.percentiles)
    inner = [(y1 - y0) / (z1 - z0) for (z0, y0), (z1, y1) in pairwise(zip(at, logs, strict=True))]

    def tilted(tilt: float) -> Quantiles:
        slopes = (inner[0] / tilt, *inner, inner[-1] * tilt)
        return Quantiles(at, logs, slopes, most)

    tilt = _solve(lambda tilt: tilted(tilt).moment(1), published.mean, 1 / _MOST_TILT, _MOST_TILT)
    return tilted(tilt)


def log_normal(mean: float, squared_variation: float) -> Quantiles:
    """The log-normal distribution with this mean and variance, divided by the squared mean."""
    deviation = math.sqrt(math.log1p(squared_variation))
    return Quantiles((0.0,), (math.log(mean) - deviation**2 / 2,), (deviation, deviation))


@dataclass(frozen=True)
class WholeNumbers:
    """A distribution of the whole numbers from `least` on: `below[i]` is the share of those up to
    `least + i`."""

    least: int
    below: tuple[float, ...]

    def values(self, shares: Floats) -> Ints:
        """The values at these shares of the distribution, each between 0 and 1."""
        return self.least + np.searchsorted(self.below, shares)

    @property
    def squared_variation(self) -> float:
        """The variance divided by the squared mean."""
        values = np.arange(self.least, self.least + len(self.below))
        shares = np.diff(self.below, prepend=0.0)
        mean = float(values @ shares)
        return float(values**2 @ shares) / mean**2 - 1


def counted(published: Counts, drawn: int) -> WholeNumbers:
    """Whole numbers with the published median and mean, whose least and most are those of `drawn`
    draws: the values at 1 and `drawn` - 1 in `drawn`.

    Rounded from a line in z on both sides of the median, of the logarithm where the mean is above
    the median (a skewed distribution). Where in [median - 0.5, median + 0.5] the line has its
    middle follows from the mean.
    """
    skewed = published.mean > published.median
    edge = _NORMAL.inv_cdf(1 - 1 / drawn)

    def scale(value: float) -> float:
        return math.log(value) if skewed else value

    def rounded(middle: float) -> WholeNumbers:
        line = [scale(published.least), scale(middle), scale(published.most)]
        borders = [scale(value + 0.5) for value in range(published.least, published.most)]
        z = np.interp(borders, line, [-edge, 0.0, edge])
        return WholeNumbers(published.least, (*map(_NORMAL.cdf, z), 1.0))

    def mean(middle: float) -> float:
        below = rounded(middle).below
        return published.most - sum(below[:-1])

    low, high = published.median - 0.5, published.median + 0.5
    return rounded(_solve(mean, published.mean, low, high))


def stratified(rng: np.random.Generator, count: int) -> Floats:
    """So many shares between 0 and 1 in random order, one in each of as many equal parts: what is
    drawn by them has its distribution's percentiles with little of chance."""
    shares = (rng.permutation(count) + 1 - rng.random(count)) / count
    return np.clip(shares, 1e-12, 1 - 1e-12)


def _below(z: float) -> float:
    return _NORMAL.cdf(z) if math.isfinite(z) else float(z > 0)


def _solve(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a rising function has the wanted value; the nearer end if it is nowhere between."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if rising(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
