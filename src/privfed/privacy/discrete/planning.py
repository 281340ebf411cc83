"""From a configuration to the parameters of each phase's sums, and the noise that keeps the budget.

Which clients take part is known to the server that sums their vectors, so nothing is amplified by it: under client
level each participation is one step without sampling, under example level one Poisson-sampled step. The noise is
calibrated so that the budget holds if no more than ``n_min`` clients survive any round and the declared fraction of
the cohort adds no noise that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from privfed.errors import ConfigError
from privfed.hadamard import padded_length
from privfed.privacy.accountant import epsilon
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.discrete.accounting import DiscreteEvent, calibrate_variance
from privfed.privacy.discrete.accounting import epsilon as epsilon_of
from privfed.privacy.discrete.config import DistributedConfig
from privfed.privacy.discrete.discrete_gaussian import SMALLEST_SHARE_VARIANCE
from privfed.privacy.discrete.events import event_of
from privfed.privacy.discrete.params import DiscreteParams, honest_survivors
from privfed.privacy.discrete.sensitivity import recommended_scale, smallest_ring
from privfed.privacy.plan import PhasePlan, Plan, Sums
from privfed.types import PrivacyEvent

_MARGIN = 1e-6
_LEAST = 1e-4
_UNSEEDED = b"planned, not used"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """A phase of the plan: its parameters without noise, and how often a unit takes part.

    Attributes:
        weight: The phase's noise multiplier over the run's.
    """

    params: DiscreteParams
    honest: int
    weight: float
    sampling_probability: float
    steps: int

    def event(self, squared_noise: float, privacy: PrivacyConfig) -> DiscreteEvent:
        """Return the phase at a squared noise multiplier of the run."""
        return self.params.event_at(
            squared_noise * self.weight**2 * self.params.integer_l2_squared,
            self.honest,
            sampling_probability=self.sampling_probability,
            steps=self.steps,
            relation=privacy.neighboring_relation,
        )


def make_discrete_plan(privacy: PrivacyConfig, phases: Sequence[PhasePlan]) -> Plan:
    """Solve for the noise (or the epsilon) of a run whose clients add it in shares.

    The noise multiplier is the standard deviation of the honest noise of ``n_min`` survivors over the largest norm of
    what one unit adds to the sum of integers.

    Raises:
        ConfigError: If no noise reaches the target, or a sum fits no ring.
    """
    squared = _squared_noise(privacy, _worst(privacy, phases))
    noise = math.sqrt(squared)
    charged = [charged_event(privacy, phase, noise) for phase in phases]
    events = {
        client: tuple(
            replace(event, sampling_probability=_probability(privacy, phase, client))
            for event, phase in zip(charged, phases, strict=True)
        )
        for client in phases[0].probabilities
    }
    most = [max(_probability(privacy, phase, client) for client in phase.probabilities) for phase in phases]
    exposed = [replace(event, sampling_probability=q) for event, q in zip(charged, most, strict=True)]
    return Plan(
        noise_multiplier=noise,
        epsilon=epsilon(exposed, privacy.target_delta, accountant=privacy.accountant),
        delta=privacy.target_delta,
        lost_rounds_delta=0.0,
        events_by_client=events,
    )


def affordable_discrete_rounds(privacy: PrivacyConfig, phases: Sequence[PhasePlan]) -> int:
    """Return how many rounds of the last phase the target affords at the given noise multiplier.

    Raises:
        ConfigError: If either is not given.
    """
    if privacy.noise_multiplier is None or privacy.target_epsilon is None:
        raise ConfigError("Rounds follow from both a noise multiplier and an epsilon: give both.")
    squared, target = privacy.noise_multiplier**2, privacy.target_epsilon
    *before, last = _worst(privacy, phases)

    def fits(steps: int) -> bool:
        events = [stage.event(squared, privacy) for stage in (*before, replace(last, steps=steps))]
        return epsilon_of(events, privacy.target_delta) <= target

    low, high = 0, 1
    while high < 1_000_000 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * phases[-1].clients // phases[-1].cohort_size


def discrete_params(privacy: PrivacyConfig, phase: PhasePlan, noise_multiplier: float) -> DiscreteParams:
    """Return what the parties of a phase's rounds agree on; the seed of a rotation is to be set in each round.

    Args:
        privacy: The ``[privacy]`` table.
        phase: The phase.
        noise_multiplier: The run's, before the phase's own scale.

    Raises:
        ConfigError: If the sums fit no ring, or not the one that was asked for.
    """
    bare, sums = _bare(privacy, phase), _sums(phase)
    variance = (noise_multiplier * phase.noise_scale) ** 2 * bare.integer_l2_squared
    share = variance / _honest(bare)
    most = _options(privacy).overflow
    if sums.ring_bits is None:
        bits = smallest_ring(
            most,
            clients=bare.n,
            contribution=bare.contribution_norm * bare.scale,
            variance=bare.n * share,
            noise=bare.noise,
            length=bare.encoded_length,
            rotated=bare.rotate,
        )
        return replace(bare, local_variance=share, ring_bits=bits)
    params = replace(bare, local_variance=share, ring_bits=sums.ring_bits)
    overflow = params.overflow_probability(params.n)
    if overflow > most:
        raise ConfigError(
            f"secagg.ring_bits = {sums.ring_bits}: a sum of {params.n} clients at a scale of {params.scale:.4g} may "
            f"leave the ring with probability {overflow:.1g}, more than privacy.distributed.overflow = {most:g}; use "
            'secagg.ring_bits = "auto", or a lower privacy.distributed.scale.'
        )
    return params


def charged_event(privacy: PrivacyConfig, phase: PhasePlan, noise_multiplier: float) -> PrivacyEvent:
    """Return what a phase does to a unit that takes part in each step, if only ``n_min`` clients survive each."""
    params = discrete_params(privacy, phase, noise_multiplier)
    return event_of(params.event(params.n_min, steps=_steps(phase), relation=privacy.neighboring_relation))


def survivors_event(params: DiscreteParams, survivors: int, privacy: PrivacyConfig) -> PrivacyEvent:
    """Return the record, of no steps and so of no cost, that a sum over so many survivors was revealed."""
    return event_of(params.event(survivors, steps=0, relation=privacy.neighboring_relation))


def survivors_events(privacy: PrivacyConfig, plan: Plan, phases: Sequence[PhasePlan]) -> tuple[PrivacyEvent, ...]:
    """Return all records that a run may write, so that a ledger may approve them beforehand."""
    found = []
    for phase in phases:
        params = discrete_params(privacy, phase, plan.noise_multiplier)
        found += [survivors_event(params, k, privacy) for k in range(params.n_min, params.n + 1)]
    return tuple(dict.fromkeys(found))


def _squared_noise(privacy: PrivacyConfig, stages: Sequence[_Stage]) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier**2
    if privacy.target_epsilon is None:
        raise ConfigError("give exactly one of privacy.target_epsilon and privacy.noise_multiplier")
    least = _LEAST
    if _options(privacy).noise == "discrete_gaussian":
        floors = (SMALLEST_SHARE_VARIANCE * s.honest / s.params.integer_l2_squared / s.weight**2 for s in stages)
        least = max(_LEAST, *floors)
    return calibrate_variance(
        lambda squared: [stage.event(squared, privacy) for stage in stages],
        privacy.target_epsilon * (1 - _MARGIN),
        privacy.target_delta,
        least=least,
    )


def _worst(privacy: PrivacyConfig, phases: Sequence[PhasePlan]) -> list[_Stage]:
    """Return the phases for the client that samples its examples most often."""
    found = []
    for phase in phases:
        params = _bare(privacy, phase)
        probability = max(phase.probabilities.values()) if privacy.unit == "example" else 1.0
        found.append(
            _Stage(
                params=params,
                honest=_honest(params),
                weight=phase.noise_scale,
                sampling_probability=probability,
                steps=_steps(phase),
            )
        )
    return found


def _bare(privacy: PrivacyConfig, phase: PhasePlan) -> DiscreteParams:
    """Return the phase's parameters without noise, in the largest ring."""
    options, sums = _options(privacy), _sums(phase)
    clip = privacy.l2_clip_norm
    encoded = padded_length(sums.length) if options.rotate else sums.length
    return DiscreteParams(
        length=sums.length,
        l2_clip_norm=clip,
        contribution_norm=clip * (sums.most_examples if privacy.unit == "example" else 1.0),
        scale=options.scale or recommended_scale(clip, encoded),
        ring_bits=32,
        local_variance=0.0,
        n=phase.cohort_size,
        n_min=sums.n_min,
        corrupt=sums.corrupt,
        # what may drop is what n_min leaves; secure aggregation has checked that the fractions can be safe
        dropped=(phase.cohort_size - sums.n_min) / phase.cohort_size,
        unit="client" if privacy.unit == "client" else "example",
        noise=options.noise,
        rotate=options.rotate,
        rotation_seed=_UNSEEDED if options.rotate else b"",
    )


def _honest(params: DiscreteParams) -> int:
    return honest_survivors(params.n_min, params.n, params.corrupt)


def _steps(phase: PhasePlan) -> int:
    return phase.participations  # one sum a participation, whatever a client did to get at it


def _probability(privacy: PrivacyConfig, phase: PhasePlan, client: str) -> float:
    return phase.probabilities[client] if privacy.unit == "example" else 1.0


def _options(privacy: PrivacyConfig) -> DistributedConfig:
    if privacy.distributed is None:
        raise ConfigError('Noise in shares is planned for privacy.placement = "distributed" only.')
    return privacy.distributed


def _sums(phase: PhasePlan) -> Sums:
    if phase.sums is None:
        raise ConfigError("Noise in shares is planned for a known number of trained values: load the model first.")
    return phase.sums
