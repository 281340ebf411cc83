"""Intervals over seeds, and tests of many comparisons at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from privfed.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: Over ``n`` values.
        low: Lower end; equal to ``high`` where there is no interval.
        high: Upper end.
        n: How many values.
        over: What the interval is over: ``seeds``, ``test rows``, ``the bound``, or ``nothing`` for a lone value.
    """

    mean: float
    low: float
    high: float
    n: int
    over: str = "seeds"


def t_half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Return half of Student's t-interval of the mean (Student 1908); None for fewer than two values.

    Raises:
        ConfigError: If there is no value, or the confidence is not between 0 and 1.
    """
    if not values or not 0 < confidence < 1:
        raise ConfigError(
            f"An interval needs a value and a confidence in (0, 1), got {len(values)} values and {confidence}."
        )
    if len(values) < 2:
        return None
    quantile = float(student.ppf((1 + confidence) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean of independent values with Student's t-interval; of one value, the value alone.

    Raises:
        ConfigError: If there is no value.
    """
    half = t_half_width(values, confidence)
    mean = statistics.fmean(values)
    if half is None:
        return Estimate(mean=mean, low=mean, high=mean, n=1, over="nothing")
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=len(values))


def t_test(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value that paired differences have mean 0; None for fewer than two of them.

    Differences that are all the same leave nothing to test: 1 where they are 0, else 0.
    """
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences)
    mean = statistics.fmean(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    statistic = mean / (spread / math.sqrt(len(differences)))
    return float(2 * student.sf(abs(statistic), len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being so many (Holm 1979): below alpha together with probability at most alpha."""
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    adjusted, worst = [0.0] * count, 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


__all__ = ["Estimate", "holm", "t_half_width", "t_interval", "t_test"]
