"""Medians of paired measurements, and how sure their ratio is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.float64]

_RESAMPLES = 2000
_FEWER_RESAMPLES = 500  # where there are so many pairs that their edges hardly move
_MANY_PAIRS = 2000
_SEED = 0
_TAIL = 0.025


@dataclass(frozen=True)
class Interval:
    """A ratio or a difference with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.value)} ({_short(self.low)} to {_short(self.high)})"


def ratio_of_medians(over: Sequence[float], under: Sequence[float]) -> Interval:
    """The median of `over` divided by the median of `under`; item i of both is one pair."""
    return _bootstrap(over, under, lambda a, b: median(a) / median(b))


def median_ratio(over: Sequence[float], under: Sequence[float]) -> Interval:
    """The median over all pairs of `over` divided by `under`."""
    return _bootstrap(over, under, lambda a, b: median(x / y for x, y in zip(a, b, strict=True)))


def percentile(values: Sequence[float], percent: float) -> float:
    """Of the values, with a straight line between two neighbours. Raises ValueError without any."""
    if not values:
        raise ValueError("there are no measurements")
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def ratio_of_percentiles(over: Sequence[float], under: Sequence[float], percent: float) -> Interval:
    """The percentile of `over` divided by that of `under`; item i of both is one pair."""
    return ratios_of_percentiles(over, under, (percent,))[0]


def ratios_of_percentiles(over: Values, under: Values, percents: Sequence[float]) -> list[Interval]:
    """The same for several percentiles over the same resampled pairs.

    Raises ValueError where the lengths differ or are zero.
    """
    pairs = np.array(list(zip(over, under, strict=True)), float)
    if not len(pairs):
        raise ValueError("there are no measurements")
    count = _RESAMPLES if len(pairs) < _MANY_PAIRS else _FEWER_RESAMPLES
    rng = np.random.default_rng(_SEED)

    def ratios(chosen: NDArray[np.float64]) -> list[float]:
        of_both = np.percentile(chosen, percents, axis=0)
        return [float(a / b) for a, b in of_both]

    drawn = [ratios(pairs[rng.integers(0, len(pairs), len(pairs))]) for _ in range(count)]
    edge = int(_TAIL * count)
    return [
        Interval(value, *(sorted(of)[i] for i in (edge, -1 - edge)))
        for value, of in zip(ratios(pairs), zip(*drawn, strict=True), strict=True)
    ]


def median_difference(over: Sequence[float], under: Sequence[float]) -> Interval:
    """The median over all pairs of `over` less `under`."""
    return _bootstrap(over, under, lambda a, b: median(x - y for x, y in zip(a, b, strict=True)))


def _bootstrap(
    over: Sequence[float],
    under: Sequence[float],
    statistic: Callable[[Sequence[float], Sequence[float]], float],
) -> Interval:
    """The statistic, and its percentile interval over resampled pairs.

    Raises ValueError where the lengths differ or are zero.
    """
    pairs = list(zip(over, under, strict=True))
    if not pairs:
        raise ValueError("there are no measurements")
    rng = random.Random(_SEED)
    values = sorted(
        statistic(*zip(*rng.choices(pairs, k=len(pairs)), strict=True)) for _ in range(_RESAMPLES)
    )
    edge = int(_TAIL * _RESAMPLES)
    return Interval(statistic(over, under), values[edge], values[-1 - edge])


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def verdict(met: bool) -> str:
    """How a table shows whether a goal is met."""
    return "met" if met else "[bold red]MISSED[/]"
