"""From a configuration to a plan: how often each example or client can take part, and how much noise that needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from privfed.errors import ConfigError
from privfed.privacy.accountant import epsilon
from privfed.privacy.calibrate import Stage, noise_for, steps_for
from privfed.privacy.cohorts import Masks, unmaskable
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.mechanisms import built
from privfed.types import EVERYONE, PrivacyEvent

# the share of delta that rounds lost to a too small cohort may use up
LOST_ROUNDS_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What distributed noise has to know of a phase's masked sums.

    Attributes:
        length: D, the values that each client sends.
        n_min: Fewest survivors of a cohort whose sum is revealed.
        corrupt: Share of the cohort whose noise counts for nothing.
        ring_bits: The ring that was asked for, or None for the smallest that will do.
        most_examples: So many examples a client's batch hardly ever passes.
    """

    length: int
    n_min: int
    corrupt: float
    ring_bits: int | None
    most_examples: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePlan:
    """One phase of a run, as the accountant needs it.

    Attributes:
        name: ``warm_start`` or ``train``.
        rounds: Rounds of the phase.
        cohort_size: (Expected) clients a round.
        clients: Clients in all.
        local_steps: Steps a client takes each time it takes part.
        probabilities: Each client's sampling probability of one example.
        noise_scale: The phase's noise multiplier over the run's.
        sums: What distributed noise needs besides; None without it.
    """

    name: str
    rounds: int
    cohort_size: int
    clients: int
    local_steps: int
    probabilities: Mapping[str, float]
    noise_scale: float = 1.0
    sums: Sums | None = None

    @property
    def participations(self) -> int:
        """The most rounds that any client takes part in; balanced cohorts make it exact."""
        return self.participations_by(self.rounds)

    def participations_by(self, rounds: int) -> int:
        """Return the most rounds that any client has taken part in after ``rounds`` rounds."""
        return math.ceil(rounds * self.cohort_size / self.clients)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will cost if it goes as planned.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        epsilon: At ``delta``, for the most exposed example or client.
        delta: The stated delta; the accountant gets ``delta - lost_rounds_delta``.
        lost_rounds_delta: Probability that a round of client sampling cannot be masked (unit client only).
        events_by_client: What each client will have been charged at most, by phase; key ``"*"`` under client level.
    """

    noise_multiplier: float
    epsilon: float
    delta: float
    lost_rounds_delta: float
    events_by_client: Mapping[str, tuple[PrivacyEvent, ...]]

    @property
    def worst_client(self) -> str:
        """The client with the largest sampling probabilities: epsilon grows with them."""
        return max(
            self.events_by_client,
            key=lambda c: tuple(e.sampling_probability for e in reversed(self.events_by_client[c])),
        )


def make_plan(privacy: PrivacyConfig, phases: Sequence[PhasePlan], *, masks: Masks | None) -> Plan:
    """Solve for the noise (or the epsilon) of a run.

    Under example level a client takes part in at most ``participations`` rounds and is charged each of its local
    steps as one Poisson-sampled Gaussian; the server knows who takes part, so client sampling amplifies nothing.
    Under client level the mechanism says what a phase does to a client (``privfed.privacy.mechanisms``). Noise that
    clients add in shares is planned by ``privfed.privacy.discrete.planning``.

    Args:
        privacy: The ``[privacy]`` table.
        phases: The phases in order.
        masks: Which cohorts can be masked; None where rounds are not masked.

    Raises:
        ConfigError: If no noise reaches the target, or rounds cannot surely be masked under client level.
    """
    if privacy.unit == "none":
        raise ConfigError('A run with privacy.unit = "none" has nothing to plan.')
    if privacy.is_distributed:
        from privfed.privacy.discrete.planning import make_discrete_plan  # it plans with this module's types

        return make_discrete_plan(privacy, phases)
    lost = _lost_rounds(privacy, phases, masks=masks)
    delta = privacy.target_delta - lost
    stages = _worst_stages(privacy, phases)
    if privacy.noise_multiplier is not None:
        noise = privacy.noise_multiplier
    elif privacy.target_epsilon is not None:
        noise = noise_for(
            stages,
            unit=privacy.unit,
            target_epsilon=privacy.target_epsilon,
            target_delta=delta,
            accountant=privacy.accountant,
            relation=privacy.neighboring_relation,
        )
    else:
        raise ConfigError("give exactly one of privacy.target_epsilon and privacy.noise_multiplier")
    by_client = _events_by_client(privacy, phases, noise)
    exposed = [_event(privacy, phase, noise, max(phase.probabilities.values())) for phase in phases]
    spent = epsilon(exposed, delta, accountant=privacy.accountant)
    return Plan(
        noise_multiplier=noise,
        epsilon=spent,
        delta=privacy.target_delta,
        lost_rounds_delta=lost,
        events_by_client=by_client,
    )


def affordable_rounds(privacy: PrivacyConfig, phases: Sequence[PhasePlan], *, masks: Masks | None) -> int:
    """Return how many rounds of the last phase the budget affords at the given noise multiplier.

    Raises:
        ConfigError: If the configuration has no noise multiplier or no target, or so many rounds cannot surely
            be masked under client level.
    """
    if privacy.unit == "none" or privacy.noise_multiplier is None or privacy.target_epsilon is None:
        raise ConfigError("Rounds follow from both a noise multiplier and an epsilon: give both.")
    if privacy.is_distributed:
        from privfed.privacy.discrete.planning import affordable_discrete_rounds

        return affordable_discrete_rounds(privacy, phases)
    *before, last = _worst_stages(privacy, phases)
    mechanism = built(privacy.mechanism)

    def stages(size: int) -> list[Stage]:
        if privacy.unit == "client":
            return [*before, mechanism.stage(replace(phases[-1], rounds=size))]
        return [*before, replace(last, steps=size * phases[-1].local_steps)]

    solve = partial(
        steps_for,
        stages,
        noise_multiplier=privacy.noise_multiplier,
        unit=privacy.unit,
        target_epsilon=privacy.target_epsilon,
        accountant=privacy.accountant,
        relation=privacy.neighboring_relation,
    )
    most = solve(target_delta=privacy.target_delta)
    if privacy.unit == "example":
        return most * phases[-1].clients // phases[-1].cohort_size
    # fewer rounds lose less of delta, so what the most rounds lose is enough to set aside
    lost = _lost_rounds(privacy, [*phases[:-1], replace(phases[-1], rounds=most)], masks=masks)
    return solve(target_delta=privacy.target_delta - lost) if lost else most


def _worst_stages(privacy: PrivacyConfig, phases: Sequence[PhasePlan]) -> list[Stage]:
    return [_stage(privacy, phase, max(phase.probabilities.values())) for phase in phases]


def _stage(privacy: PrivacyConfig, phase: PhasePlan, probability: float) -> Stage:
    """Return what a phase does to one unit; ``probability`` is the example's, within its client."""
    if privacy.unit == "client":
        return built(privacy.mechanism).stage(phase)
    steps = phase.participations * phase.local_steps
    return Stage(sampling_probability=probability, steps=steps, noise_scale=phase.noise_scale)


def _events_by_client(
    privacy: PrivacyConfig, phases: Sequence[PhasePlan], noise: float
) -> dict[str, tuple[PrivacyEvent, ...]]:
    clients = [EVERYONE] if privacy.unit == "client" else list(phases[0].probabilities)
    return {
        client: tuple(_event(privacy, phase, noise, phase.probabilities.get(client, 1.0)) for phase in phases)
        for client in clients
    }


def _event(privacy: PrivacyConfig, phase: PhasePlan, noise: float, probability: float) -> PrivacyEvent:
    """Return what a phase does to one unit, as an event."""
    if privacy.unit == "none":
        raise ConfigError('A run with privacy.unit = "none" has no privacy events.')
    if privacy.unit == "client":
        return built(privacy.mechanism).event(phase, noise, privacy.neighboring_relation)
    stage = _stage(privacy, phase, probability)
    return PrivacyEvent(
        unit=privacy.unit,
        noise_multiplier=noise * stage.noise_scale,
        sampling_probability=stage.sampling_probability,
        steps=stage.steps,
        relation=privacy.neighboring_relation,
    )


def _lost_rounds(privacy: PrivacyConfig, phases: Sequence[PhasePlan], *, masks: Masks | None) -> float:
    """Return a bound on the probability that any round samples a cohort that cannot be masked.

    Whether such a round is lost depends on who was sampled, which the Gaussian mechanism does not cover: the event's
    probability (:func:`privfed.privacy.cohorts.unmaskable`, by the union bound over rounds) is taken out of delta.

    Raises:
        ConfigError: If it is more than a tenth of delta.
    """
    if privacy.unit != "client" or masks is None:
        return 0.0
    mechanism = built(privacy.mechanism)
    drawn = [(phase.rounds, others) for phase in phases if (others := mechanism.others(phase)) is not None]
    lost = sum(rounds * unmaskable(*others, masks) for rounds, others in drawn)
    if lost > LOST_ROUNDS_SHARE * privacy.target_delta:
        raise ConfigError(
            f"With client-level sampling of {phases[-1].cohort_size} expected clients, some round has a cohort of "
            f"another size than [secagg] can mask with probability {lost:.1g}, more than a tenth of target_delta = "
            f"{privacy.target_delta:g}: raise server.cohort_size, leave secagg.n_min unset, or set "
            'secagg.name = "none".'
        )
    return lost
