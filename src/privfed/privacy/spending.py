"""The epsilon spent so far, for whoever watches a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from privfed.privacy.accountant import epsilon
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.mechanisms import built
from privfed.privacy.plan import PhasePlan, Plan
from privfed.types import PrivacyEvent

# an accounting takes about 0.1 s: this many a phase keep the watching cheap
_POINTS = 12


def spent_so_far(
    privacy: PrivacyConfig, plan: Plan | None, phases: Sequence[PhasePlan]
) -> Callable[[str, int], float | None]:
    """Return a function from (phase, completed rounds) to the epsilon spent by then.

    Between a dozen points of a phase the value of the next point is given: never too low.

    Args:
        privacy: The ``[privacy]`` table.
        plan: The run's plan, or None without privacy.
        phases: The run's phases, in order.
    """
    if plan is None:
        return lambda _phase, _rounds: None
    whole = plan
    names = [phase.name for phase in phases]
    mechanism = built(privacy.mechanism)

    @cache
    def at(position: int, rounds: int) -> float:
        events: list[PrivacyEvent] = []
        for index, planned in enumerate(whole.events_by_client[whole.worst_client][: position + 1]):
            done = phases[index].rounds if index < position else rounds
            phase = phases[index]
            steps = (
                mechanism.steps_by(phase, done)
                if privacy.placed == "central"
                else phase.participations_by(done) * (1 if privacy.is_distributed else phase.local_steps)
            )
            events.append(replace(planned, steps=steps))
        value = epsilon(events, whole.delta - whole.lost_rounds_delta, accountant=privacy.accountant)
        return min(value, whole.epsilon)

    def spent(phase: str, rounds: int) -> float:
        position = names.index(phase)
        stride = max(1, math.ceil(phases[position].rounds / _POINTS))
        point = min(phases[position].rounds, math.ceil(rounds / stride) * stride)
        return at(position, point)

    return spent
