"""The two questions asked before a run: how much noise for a budget, and how many steps for a budget.

Epsilon falls smoothly with the noise and rises smoothly with the steps, nearly along a power law, so a
bracketing search that interpolates in the logarithms needs a handful of evaluations of the accountant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from privfed.errors import ConfigError
from privfed.privacy.accountant import Accountant, check_delta, check_event, epsilon
from privfed.types import PrivacyEvent, Relation, Unit

LEAST_NOISE = 1e-2
MOST_NOISE = 1e4
TOLERANCE = 1e-3
"""Relative: the noise returned is at most this far above the least that meets the target."""
_MARGIN = 1e-6
"""The target is met with this relative margin, so that a ledger that adds up in another order agrees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """``steps`` steps, each of which samples every unit with ``sampling_probability``.

    Attributes:
        noise_scale: This stage's noise multiplier over the run's.
    """

    sampling_probability: float
    steps: int
    noise_scale: float = 1.0


def events_for(
    stages: Sequence[Stage], noise_multiplier: float, *, unit: Unit, relation: Relation = "add_or_remove_one"
) -> tuple[PrivacyEvent, ...]:
    """Return the privacy events of ``stages``, each at ``noise_multiplier`` times its own scale."""
    return tuple(
        PrivacyEvent(
            unit=unit,
            noise_multiplier=noise_multiplier * stage.noise_scale,
            sampling_probability=stage.sampling_probability,
            steps=stage.steps,
            relation=relation,
        )
        for stage in stages
    )


def noise_for(
    stages: Sequence[Stage],
    *,
    unit: Unit,
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant = "pld",
    relation: Relation = "add_or_remove_one",
) -> float:
    """Return the smallest noise multiplier, shared by all ``stages``, that keeps the target.

    It is within a relative ``TOLERANCE`` of the smallest, never below it: the result is checked once more
    with ``fine=True``. A budget that even ``LEAST_NOISE`` keeps gets ``LEAST_NOISE``.

    Raises:
        ConfigError: If a value is out of range, there is no step, or no noise up to ``MOST_NOISE`` keeps the
            target.
    """
    _check_target(target_epsilon, target_delta)
    for event in events_for(stages, 1.0, unit=unit, relation=relation):
        check_event(event)
    if sum(stage.steps for stage in stages) == 0:
        raise ConfigError("Expected at least one step to calibrate the noise for, got none.")
    goal = target_epsilon * (1 - _MARGIN)

    def cost(noise: float, quick: bool = False, fine: bool = False) -> float:
        events = events_for(stages, noise, unit=unit, relation=relation)
        return epsilon(events, target_delta, accountant="rdp" if quick else accountant, fine=fine)

    if (least := cost(MOST_NOISE)) > goal:
        raise ConfigError(
            f"A budget that no noise reaches: epsilon {target_epsilon:g} at delta {target_delta:g} was asked "
            f"for, and a noise multiplier of {MOST_NOISE:g} still costs {least:.3g}; take fewer steps or a "
            "larger budget."
        )
    rdp_counts = relation == "add_or_remove_one" or all(stage.sampling_probability == 1 for stage in stages)
    noise = _start(lambda value: cost(value, quick=True), goal) if rdp_counts else 1.0
    noise = _search_noise(cost, goal, noise)
    while cost(noise, fine=True) > target_epsilon:  # the coarse value is an upper bound too, so this hardly ever runs
        noise *= 1 + TOLERANCE
    return noise


def steps_for(
    stage_builder: Callable[[int], Sequence[Stage]],
    *,
    noise_multiplier: float,
    unit: Unit,
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant = "pld",
    relation: Relation = "add_or_remove_one",
    most: int = 1_000_000,
) -> int:
    """Return the largest n up to ``most`` for which ``stage_builder(n)`` keeps the target; 0 if none does.

    Args:
        stage_builder: The stages of a run of size n (steps or rounds); must not cost less for a larger n.
        noise_multiplier: The noise of all stages.
        unit: Whose privacy is counted.
        target_epsilon: The budget.
        target_delta: The budget's delta.
        accountant: Which accountant counts.
        relation: The neighbouring relation.
        most: Where to stop looking.

    Raises:
        ConfigError: If a value is out of range.
    """
    _check_target(target_epsilon, target_delta)
    if not noise_multiplier > 0:
        raise ConfigError(f"Expected a noise multiplier above 0, got {noise_multiplier}.")
    if most < 0:
        raise ConfigError(f"Expected at most a number of steps of at least 0, got {most}.")

    def cost(size: int) -> float:
        events = events_for(stage_builder(size), noise_multiplier, unit=unit, relation=relation)
        return epsilon(events, target_delta, accountant=accountant)

    if most == 0 or cost(1) > target_epsilon:
        return 0
    return _search_size(cost, target_epsilon, most)


def _check_target(target_epsilon: float, target_delta: float) -> None:
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(f"Expected a finite target epsilon above 0, got {target_epsilon}.")
    check_delta(target_delta)


def _start(quick: Callable[[float], float], goal: float) -> float:
    """Return roughly the noise that meets ``goal`` by the cheap accountant, which needs somewhat more of
    it."""
    low, high = LEAST_NOISE, MOST_NOISE
    if quick(low) <= goal:
        return low
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if quick(middle) <= goal else (middle, high)
    return high


def _search_noise(cost: Callable[[float], float], goal: float, start: float) -> float:
    """Return a noise that meets ``goal`` and is within ``TOLERANCE`` of one that does not."""
    noise, step = start, 1.1
    value = cost(noise)
    if value <= goal:
        high, high_value = noise, value
        while True:
            if noise <= LEAST_NOISE:
                return high
            noise = max(noise / step, LEAST_NOISE)
            value = cost(noise)
            if value > goal:
                low, low_value = noise, value
                break
            high, high_value, step = noise, value, step**2
    else:
        low, low_value = noise, value
        while value > goal:  # ends: MOST_NOISE is known to meet the goal
            low, low_value = noise, value
            noise, step = min(noise * step, MOST_NOISE), step**2
            value = cost(noise)
        high, high_value = noise, value
    while high / low > 1 + TOLERANCE:
        noise = _between(low, low_value, high, high_value, goal)
        # a little to one side of the interpolated root, so that the bracket closes from both ends
        noise *= 1 + TOLERANCE / 3 if (high / noise) > (noise / low) else 1 - TOLERANCE / 3
        if not low < noise < high:
            noise = math.sqrt(low * high)
        value = cost(noise)
        if value <= goal:
            high, high_value = noise, value
        else:
            low, low_value = noise, value
    return high


def _search_size(cost: Callable[[int], float], target: float, most: int) -> int:
    low, high, growth = 1, 1, 16
    low_value = cost(low)
    while True:
        high = min(low * growth, most)
        if high == low:
            return low
        high_value = cost(high)
        if high_value > target:
            break
        low, low_value = high, high_value
    turn = 0
    while high - low > 1:
        turn += 1
        size = round(_between(low, low_value, high, high_value, target))
        nudge = max(1, (high - low) // 16)
        size = size + nudge if high - size > size - low else size - nudge
        if turn % 3 == 0 or not low < size < high:
            size = (low + high) // 2
        value = cost(size)
        if value <= target:
            low, low_value = size, value
        else:
            high, high_value = size, value
    return low


def _between(low: float, low_value: float, high: float, high_value: float, goal: float) -> float:
    """Return where the power law through two points meets ``goal``; the geometric mean where there is
    none."""
    if not (0 < low_value < math.inf and 0 < high_value < math.inf) or low_value == high_value:
        return math.sqrt(low * high)
    share = math.log(goal / low_value) / math.log(high_value / low_value)
    return float(low * (high / low) ** min(max(share, 0.0), 1.0))
