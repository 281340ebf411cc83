"""DP-FedAvg: Poisson-sampled clients, clipped updates, independent Gaussian noise each round (McMahan et al. 2018).

"Learning Differentially Private Recurrent Language Models", arXiv 1710.06963, with fixed-denominator averaging.

Shape suffix: D trained values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.privacy.calibrate import Stage
from privfed.privacy.mechanisms import (
    MECHANISMS,
    REPEATED,
    AtWork,
    Keeper,
    Mechanism,
    Memory,
    Moment,
    Release,
    Sampling,
    Site,
    Terms,
    clip_update,
    committed,
)
from privfed.privacy.noise import privatise_sum
from privfed.table import Table
from privfed.types import Float32, PrivacyEvent, Relation

if TYPE_CHECKING:
    from privfed.privacy.plan import PhasePlan

PUBLIC_COUNT = "The expected cohort is public and fixed: it is what sums are divided by."


class GaussianConfig(Table):
    """No options: independent Gaussian noise each round."""

    name: Literal["gaussian"] = "gaussian"


class Gaussian:
    """Each round is one Gaussian mechanism on a Poisson sample of the clients."""

    sampling: Sampling = "poisson"

    def stage(self, phase: PhasePlan) -> Stage:
        """Return one step a round."""
        probability = phase.cohort_size / phase.clients
        return Stage(sampling_probability=probability, steps=phase.rounds, noise_scale=phase.noise_scale)

    def steps_by(self, phase: PhasePlan, rounds: int) -> int:  # noqa: ARG002
        """Return ``rounds``."""
        return rounds

    def event(self, phase: PhasePlan, noise_multiplier: float, relation: Relation) -> PrivacyEvent:
        """Return the phase as an event."""
        stage = self.stage(phase)
        return PrivacyEvent(
            unit="client",
            noise_multiplier=noise_multiplier * stage.noise_scale,
            sampling_probability=stage.sampling_probability,
            steps=stage.steps,
            relation=relation,
        )

    def others(self, phase: PhasePlan) -> tuple[int, float]:
        """Return all other clients."""
        return phase.clients - 1, phase.cohort_size / phase.clients

    def running_error(self, phase: PhasePlan, noise_multiplier: float) -> float:
        """Return the error of sums of independent noises."""
        return noise_multiplier * phase.noise_scale * math.sqrt((phase.rounds + 1) / 2) / phase.cohort_size

    def at_work(self, site: Site) -> AtWork:
        """Return the mechanism for one phase."""
        event = self.event(site.plan, site.noise_multiplier, site.relation)
        return GaussianAtWork(
            event=event,
            clip=site.l2_clip_norm,
            sensitivity=site.bound(site.l2_clip_norm, site.size),
            noise_multiplier=event.noise_multiplier,
            cohort_size=site.plan.cohort_size,
        )

    def description(self) -> str:
        """Return the mechanism in a clause."""
        return "DP-FedAvg: Gaussian noise on the sum of clipped updates of Poisson-sampled clients"

    def assumptions(self) -> tuple[str, ...]:
        """Return what the guarantee rests on."""
        return (PUBLIC_COUNT,)


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianAtWork:
    """The mechanism in one phase.

    Attributes:
        event: What the phase costs a client; a round costs one step of it.
        clip: Bound on a client's update.
        sensitivity: Largest change of the codec's linear sum when one client joins or leaves: the clip, through the
            codec. A round whose codec has a bound of its own brings it (``Moment.bound``).
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        cohort_size: Expected clients a round: what sums are divided by.
    """

    event: PrivacyEvent
    clip: float
    sensitivity: float
    noise_multiplier: float
    cohort_size: int
    extra: int = 0

    def sampled(self, clients: Sequence[str], round_number: int) -> tuple[Sequence[str], float]:  # noqa: ARG002
        """Return all clients and the sampling probability."""
        return clients, self.event.sampling_probability

    def terms(self, memory: Memory) -> Terms:  # noqa: ARG002
        """Return nothing: the clip is fixed."""
        return ()

    def bounded(self, delta_D: Float32, terms: Terms) -> tuple[Float32, float]:  # noqa: ARG002
        """Return the clipped update."""
        return clip_update(delta_D, self.clip), self.clip

    def release(self, sum_M: NDArray[np.float64] | None, moment: Moment, keeper: Keeper, memory: Memory) -> Release:
        """Return the noised mean; a lost round releases and costs nothing.

        A round of k sums (``moment.sums``) has noise of sqrt(k) times the multiplier on each. For the clients that were
        sampled, k Gaussian mechanisms of multiplier sqrt(k) z, each chosen after the releases before it, are together
        one of multiplier z (Dong, Roth and Su 2022, "Gaussian Differential Privacy", corollary 3.3); all of them see
        the same Poisson sample, which amplifies that one as it does any (Zhu, Dong and Wang 2022, arXiv 2106.08567,
        theorem 11). So the round costs one step, charged before its first sum; later sums are recorded with no steps,
        for one input only as the first.
        """
        if sum_M is None:
            return Release(mean_D=None, memory=memory, lost=moment.lost)
        digest = moment.digest(sum_M)
        if committed(keeper, moment, digest, replace(self.event, steps=0 if moment.charged else 1)) != digest:
            return Release(mean_D=None, memory=memory, lost=REPEATED)
        sensitivity = self.sensitivity if moment.bound is None else moment.bound(self.clip)
        noised_D = privatise_sum(
            sum_M,
            standard_deviation=self.noise_multiplier * sensitivity * math.sqrt(moment.sums),
            stream=keeper.stream("noise", moment.phase, moment.round, digest),
            sensitivity=sensitivity,
        )
        return Release(mean_D=noised_D / self.cohort_size, memory=memory)


def check(event: PrivacyEvent) -> None:
    """Refuse parameters: this mechanism has none.

    Raises:
        ConfigError: If there are any.
    """
    if event.parameters:
        raise ConfigError(f"Expected no parameters of the mechanism 'gaussian', got {event.parameters}.")


def _build(options: GaussianConfig) -> Gaussian:  # noqa: ARG001
    return Gaussian()


MECHANISMS.register("gaussian")(Mechanism(config=GaussianConfig, build=_build, check=check, two_sums=True))
