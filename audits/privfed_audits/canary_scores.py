"""Scores of canaries from what each round moved along them.

The adversary of these scores knows every canary's gradient (a white box) and not its coin. Which of the scores is best
depends on what, if anything, is wrong with the noise: a sum over rounds is best against independent noise, the range
over rounds against noise that repeats, the largest against noise that is missing now and then.

Shape suffixes: R rounds, M canaries, D trained values, T tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.federation.planted import Given, RandomDirections
from privfed.types import ParamLayout

Floats = NDArray[np.float64]
_TINY = 1e-9


def along(update_D: NDArray[np.floating[Any]], given: Given, rows: NDArray[np.int64] | None = None) -> Floats:
    """Return minus the update's component along each gradient, or those of ``rows`` [M]: a step goes against it."""
    return -given.components(update_D, rows)


def spread_of(update_D: NDArray[np.floating[Any]], given: Given, layout: ParamLayout) -> Floats:
    """Return the spread of the update in each canary's tensor, where no canary is [M]: what its noise is like there.

    Along a random direction it is that of all values alike.
    """
    if isinstance(given, RandomDirections):
        return np.full(len(given), max(_deviation(update_D), _TINY))
    free = np.ones(layout.size, dtype=np.bool_)
    free[given.flat_M] = False
    ends = np.cumsum(layout.sizes)
    spreads_T = np.array(
        [_deviation(update_D[end - n : end][free[end - n : end]]) for end, n in zip(ends, layout.sizes, strict=True)]
    )
    floor = _TINY * max(float(spreads_T.max(initial=0.0)), float(np.abs(update_D).max(initial=0.0)), _TINY)
    return np.asarray(np.maximum(spreads_T[given.tensors_M], floor), dtype=np.float64)


def scores_of(along_RM: Floats, spread_RM: Floats | None = None) -> dict[str, Floats]:
    """Return the scores by attack, each [M].

    Args:
        along_RM: What each round moved along each canary; NaN where nothing of its client was seen.
        spread_RM: The spread of the noise there, where it is known.
    """
    seen = ~np.isnan(along_RM)
    found = {"gradient_dot": np.where(seen, along_RM, 0.0).sum(axis=0)}
    if len(along_RM) > 1:
        largest_M = np.where(seen, along_RM, -np.inf).max(axis=0)
        least_M = np.where(seen, along_RM, np.inf).min(axis=0)
        ever_M = seen.any(axis=0)
        found["gradient_dot_largest"] = np.where(ever_M, largest_M, 0.0)
        found["gradient_dot_range"] = np.where(ever_M, largest_M, 0.0) - np.where(ever_M, least_M, 0.0)
    if spread_RM is not None:
        scaled_RM = np.where(seen, along_RM / spread_RM, 0.0)
        found["gradient_dot_scaled"] = scaled_RM.sum(axis=0)
        if len(along_RM) > 1:
            found["gradient_dot_scaled_largest"] = scaled_RM.max(axis=0)
    return found


def _deviation(values: NDArray[np.floating[Any]]) -> float:
    """Return a robust standard deviation: ordinary examples may have moved a few values far."""
    if not len(values):
        return 0.0
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
