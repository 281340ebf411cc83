"""Integer noise as privacy events that a third party can account from their parameters alone.

A :class:`~privfed.types.PrivacyEvent` of mechanism ``"skellam"`` or ``"discrete_gaussian"`` has these parameters, all
in integer steps: ``variance`` of the honest noise, ``shares`` it is made of, ``length`` of the vector, ``l1`` and
``l2`` bounds on what one unit adds, ``rounding_delta`` and ``sampler_distance`` a step. Its noise multiplier is
sqrt(variance) / l2. No Gaussian mechanism of that noise multiplier dominates it, so it is composed by its own Renyi
divergences; Gaussian events beside it are composed by theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.privacy.discrete import LAWS
from privfed.privacy.discrete.accounting import Accountable, DiscreteEvent
from privfed.privacy.discrete.accounting import epsilon as composed_epsilon
from privfed.privacy.discrete.sampler import LARGEST_DISTANCE
from privfed.privacy.discrete.sensitivity import rounded_l1
from privfed.types import PrivacyEvent, Relation, Unit

PARAMETERS = ("l1", "l2", "length", "rounding_delta", "sampler_distance", "shares", "variance")
_SLACK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gaussian:
    """A Gaussian event by its Renyi divergences, to be composed with integer noise."""

    noise_multiplier: float
    unit: Unit
    sampling_probability: float
    steps: int
    relation: Relation
    rounding_delta: float = 0.0
    sampler_distance: float = 0.0

    def curve(self, orders: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the divergences of one step without sampling."""
        factor = 2 if self.relation == "replace_one" else 1
        result: NDArray[np.float64] = orders * factor**2 / (2 * self.noise_multiplier**2)
        return result


def event_of(event: DiscreteEvent) -> PrivacyEvent:
    """Return what happened as the ledger stores it."""
    values = {name: float(getattr(event, name)) for name in PARAMETERS}
    return PrivacyEvent(
        unit=event.unit,
        mechanism=event.mechanism,
        noise_multiplier=math.sqrt(event.variance) / event.l2,
        sampling_probability=event.sampling_probability,
        steps=event.steps,
        relation=event.relation,
        parameters=tuple(sorted(values.items())),
    )


def discrete_of(event: PrivacyEvent) -> DiscreteEvent:
    """Return the event that ``event_of`` stored.

    Raises:
        ConfigError: If it is of another mechanism, a parameter is missing, unknown or out of range, or sampling is
            claimed for ``replace_one``.
    """
    told = dict(event.parameters)
    if event.mechanism not in LAWS or tuple(sorted(told)) != PARAMETERS:
        raise ConfigError(
            f"Expected integer noise with the parameters {', '.join(PARAMETERS)}, got {event.mechanism!r} with "
            f"{', '.join(sorted(told)) or 'none'}."
        )
    values = {name: value for name, value in told.items() if isinstance(value, float) and 0 <= value < math.inf}
    if len(values) < len(PARAMETERS) or values["length"] < 1 or values["l2"] <= 0:
        raise ConfigError(f"Expected finite parameters of at least 0 of {event.mechanism!r}, got {told}.")
    return DiscreteEvent(
        mechanism="skellam" if event.mechanism == "skellam" else "discrete_gaussian",
        variance=values["variance"],
        shares=int(values["shares"]),
        length=int(values["length"]),
        l1=values["l1"],
        l2=values["l2"],
        unit=event.unit,
        sampling_probability=event.sampling_probability,
        steps=event.steps,
        relation=event.relation,
        rounding_delta=values["rounding_delta"],
        sampler_distance=values["sampler_distance"],
    )


def check(event: PrivacyEvent) -> None:
    """Refuse an event that claims more noise, or less influence of one unit, than its parameters give.

    Raises:
        ConfigError: If it does, or its parameters cannot be read.
    """
    found = discrete_of(event)
    noise = math.sqrt(found.variance) / found.l2
    if not math.isclose(event.noise_multiplier, noise, rel_tol=_SLACK):
        raise ConfigError(
            f"Expected the noise multiplier {noise:.6g} of {event.mechanism!r} with variance {found.variance:g} and "
            f"l2 = {found.l2:g}, got {event.noise_multiplier:.6g}."
        )
    least_l1 = rounded_l1(round(found.l2**2), found.length)
    if found.l1 < least_l1 * (1 - _SLACK):
        raise ConfigError(
            f"Expected l1 of at least {least_l1:g} for integers with l2 = {found.l2:g}, got {found.l1:g}."
        )
    least_distance = found.shares * found.length * LARGEST_DISTANCE
    if found.sampler_distance < least_distance * (1 - _SLACK):
        raise ConfigError(
            f"Expected a sampler_distance of at least {least_distance:g}, got {found.sampler_distance:g}."
        )


def epsilon(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Return the epsilon at ``delta`` of integer and Gaussian noise composed by Renyi divergences.

    Raises:
        ConfigError: If units or relations are mixed, or ``replace_one`` neighbours are sampled.
    """
    return composed_epsilon([_accountable(event) for event in events], delta)


def delta_for(events: Sequence[PrivacyEvent], epsilon_value: float) -> float:
    """Return a delta, within a factor of 1.01 of the least, at which the events cost at most ``epsilon_value``; or 1.

    Raises:
        ConfigError: As ``epsilon``.
    """
    accountable = [_accountable(event) for event in events]
    low, high = -40.0, -1e-6
    if composed_epsilon(accountable, 10**high) > epsilon_value:
        return 1.0
    while high - low > 0.004:
        middle = (low + high) / 2
        low, high = (low, middle) if composed_epsilon(accountable, 10**middle) <= epsilon_value else (middle, high)
    return float(10**high)


def _accountable(event: PrivacyEvent) -> Accountable:
    if event.mechanism in LAWS:
        return discrete_of(event)
    if event.relation == "replace_one" and event.sampling_probability < 1:
        raise ConfigError(
            "Gaussian noise under Poisson sampling and integer noise cannot be composed for replace_one neighbours: "
            "account them as add_or_remove_one, or keep them to different data."
        )
    return _Gaussian(
        noise_multiplier=event.noise_multiplier,
        unit=event.unit,
        sampling_probability=event.sampling_probability,
        steps=event.steps,
        relation=event.relation,
    )
