"""How good a membership attack is: the scorer, which opens the sealed bits.

Shape suffix: N trials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed_attacks.roc import (
    Accounted,
    Band,
    FrozenRate,
    Interval,
    Roc,
    auc_interval,
    least_negatives,
    lower_band,
    roc,
    tpr_at_fpr,
)
from privfed_attacks.sealed import Sealed, unseal

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]
RATES = (0.001, 0.01, 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipScore:
    """What an attack got.

    Attributes:
        roc: The whole curve.
        auc: Its area, with a bootstrap interval.
        rates: True positive rates at thresholds frozen on the calibration, for every false positive rate that both sets
            of trials are large enough for.
        left_out: The false positive rates that they are too small for.
        band: Simultaneous lower bounds on the ROC, at thresholds from the calibration.
        above: How many points of the band lie above the accounted curve; None where none is given. Any contradicts the
            accounting.
    """

    roc: Roc
    auc: Interval
    rates: tuple[FrozenRate, ...]
    left_out: tuple[float, ...]
    band: Band
    above: int | None


def score_membership(
    scores_N: Floats,
    truth: Sealed[Bits],
    *,
    calibration: tuple[Floats, Sealed[Bits]],
    rng: np.random.Generator,
    accounted: Accounted | None = None,
    groups_N: NDArray[np.int64] | None = None,
) -> MembershipScore:
    """Return how well scores tell members from others.

    Args:
        scores_N: An attack's scores, higher for "member".
        truth: Which trials are members.
        calibration: (scores, truth) of other trials, which alone choose thresholds.
        rng: Draws the bootstrap.
        accounted: What the ledger allows.
        groups_N: The run that each trial is of, for the bootstrap.

    Raises:
        ConfigError: If there are only members, or none, or bits and scores differ in number.
    """
    members_N = unseal(truth)
    chosen = (calibration[0], unseal(calibration[1]))
    if np.shape(scores_N) != np.shape(members_N):
        raise ConfigError(f"Expected one sealed bit for each of {len(scores_N)} scores, got {len(members_N)}.")
    negatives = min(int((~members_N).sum()), int((~chosen[1]).sum()))
    possible = [rate for rate in RATES if negatives >= least_negatives(rate)]
    band = lower_band(scores_N, members_N, calibration=chosen)
    return MembershipScore(
        roc=roc(scores_N, members_N),
        auc=auc_interval(scores_N, members_N, rng, groups_N=groups_N),
        rates=tuple(tpr_at_fpr(scores_N, members_N, fpr=rate, calibration=chosen) for rate in possible),
        left_out=tuple(rate for rate in RATES if rate not in possible),
        band=band,
        above=None if accounted is None else len(band.above(accounted)),
    )
