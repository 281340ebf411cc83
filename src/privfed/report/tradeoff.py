"""What an (epsilon, delta) curve says about the best possible attacker.

A mechanism that is (epsilon, delta)-private for every point of a curve limits each test of "was this unit in
the data?": at a false alarm rate ``a`` it finds at most ``min(e^eps a + delta, 1 - e^-eps (1 - delta - a))``
of the units that really were there. The least of these over the curve is the bound used in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

FALSE_ALARM = 0.01
_LARGEST_EXPONENT = 700.0  # e^709 is the largest power that fits a float

Curve = Sequence[tuple[float, float]]


def clean_curve(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return the points that mean something (finite, epsilon >= 0, delta in [0, 1]), by rising epsilon."""
    kept = {
        (float(epsilon), float(delta))
        for epsilon, delta in points
        if math.isfinite(epsilon) and epsilon >= 0 and 0 <= delta <= 1
    }
    return tuple(sorted(kept))


def hit_rate_bound(curve: Curve, false_alarm: float) -> float:
    """Return the largest share of true members that any attacker can find at this false alarm rate.

    Args:
        curve: Points (epsilon, delta) that all hold for the mechanism; an empty curve bounds nothing.
        false_alarm: Share of non-members that the attacker wrongly accuses.
    """
    bound = 1.0
    for epsilon, delta in curve:
        small = min(epsilon, _LARGEST_EXPONENT)
        bound = min(
            bound,
            math.exp(small) * false_alarm + delta,
            1.0 - math.exp(-small) * (1.0 - delta - false_alarm),
        )
    return max(min(bound, 1.0), false_alarm)


def odds_factor(epsilon: float) -> float:
    """Return e^epsilon, infinite where a float cannot hold it."""
    return math.exp(epsilon) if epsilon < _LARGEST_EXPONENT else math.inf
