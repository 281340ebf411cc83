"""What a run claims: per view the accounted epsilon, and the events that it is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.privacy.accountant import epsilon, gaussian_mu
from privfed.privacy.discrete import LAWS
from privfed.report.verify import events_of
from privfed.types import PrivacyEvent, View
from privfed_attacks.roc import Accounted, accounted

Events = tuple[PrivacyEvent, ...]
PROFILE = tuple(float(d) for d in (*np.logspace(-9, -2, 15), *np.linspace(0.015, 0.985, 60)))
"""Where a privacy profile is read to draw a trade-off curve of it."""
UNCLAIMED_DELTA = 1e-5
"""Where a bound is stated for a run, or a view, that claims nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What is promised to one view.

    Attributes:
        epsilon: None where nothing is promised.
        delta: At which it is.
        unit: What is protected; ``"none"`` where nothing is.
        events: What happened to the most exposed unit; none where nothing is promised.
    """

    view: View
    epsilon: float | None
    delta: float | None
    unit: str
    events: Events = field(default=(), repr=False)

    @property
    def bound_delta(self) -> float:
        """The delta at which a lower bound is stated."""
        return UNCLAIMED_DELTA if self.delta is None else self.delta

    @property
    def gaussian(self) -> bool:
        """Whether the mechanism is a Gaussian without sampling, or integer noise that stands for one."""
        mu = gaussian_mu(self.events) if self.events else None
        if self.events and mu is None:
            return all(event.sampling_probability == 1 for event in self.events)
        return mu is None or mu.exact

    def tradeoff(self) -> Accounted | None:
        """Return the accounted curve; None where nothing is promised."""
        return tradeoff_of(self.events) if self.events else None


@lru_cache(maxsize=256)
def tradeoff_of(events: Events) -> Accounted:
    """Return the accounted trade-off curve of events."""
    return accounted(events, PROFILE)


@lru_cache(maxsize=256)
def epsilon_of(events: Events, delta: float) -> float:
    """Return the epsilon of events."""
    return epsilon(events, delta)


def with_noise(events: Events, factor: float) -> Events:
    """Return the events with ``factor`` times the noise.

    Raises:
        ValueError: If the noise is of integers, whose size is bound up with their other parameters.
    """
    if any(event.mechanism in LAWS for event in events):
        raise ValueError("The noise of these events cannot be scaled by itself.")
    return tuple(
        replace(event, mechanism="gaussian", parameters=(), noise_multiplier=event.noise_multiplier * factor)
        for event in events
    )


def claim_of(receipt: Mapping[str, Any], view: View, *, as_if_secret: bool = False) -> Claim:
    """Return what a receipt claims for a view.

    Args:
        receipt: The receipt.
        view: The view.
        as_if_secret: Of an experiment whose noise is reproducible, which claims nothing, return what it would claim.
    """
    entry = receipt["views"][view]
    simulated = receipt.get("simulated", {})
    if as_if_secret and view in simulated.get("epsilon", {}):
        return Claim(
            view=view,
            epsilon=float(simulated["epsilon"][view]),
            delta=float(simulated["delta"]),
            unit=str(receipt["setting"]["unit"]),
            events=events_of(receipt),
        )
    if entry["epsilon"] is None:
        return Claim(view=view, epsilon=None, delta=None, unit=str(receipt["setting"]["unit"]))
    return Claim(
        view=view,
        epsilon=float(entry["epsilon"]),
        delta=float(entry["delta"]),
        unit=str(entry["unit"]),
        events=events_of(receipt),
    )


def curve_points(claim: Claim, points: int = 200) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (fpr, tpr) of the accounted curve on logarithmic axes; everything is allowed where nothing is claimed."""
    fpr = np.concatenate([[0.0], np.geomspace(1e-6, 1.0, points - 1)])
    found = claim.tradeoff()
    return fpr, np.ones_like(fpr) if found is None else found.tpr(fpr)
