"""DP-FedAvg whose clip follows a quantile of the updates' norms (Andrew et al. 2021).

"Differentially Private Learning with Adaptive Clipping", arXiv 1905.03871, Algorithm 1. Each client tells, besides its
clipped update, one bit: whether its update was within the clip C. The noised share of such clients moves the clip
geometrically towards the quantile wanted: C <- C exp(-learning_rate (share - quantile)).

The bit travels as one more value of the message, -s/2 or s/2, so that secure aggregation, encoding and noise treat it
like the rest. With s = C z_delta / sigma_b, noise of one standard deviation C z_delta on all values is noise of
standard deviation sigma_b on the number of clients; and one client moves the whole message by at most
sqrt(C^2 + s^2/4), so the round is *exactly one* Gaussian mechanism, of noise multiplier z with

    z^-2 = z_delta^-2 + (2 sigma_b)^-2        (their Theorem 1).

z is what the run was planned with; z_delta follows from it. That the clip moves costs nothing: it is a function of what
was released, and the noise moves with it.

Shape suffixes: D trained values, M = D + 1 values of a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.errors import ConfigError, ProtocolError
from privfed.privacy.mechanisms import (
    MECHANISMS,
    REPEATED,
    AtWork,
    Keeper,
    Mechanism,
    Memory,
    Moment,
    Release,
    Site,
    Terms,
    clip_update,
    committed,
)
from privfed.privacy.mechanisms.gaussian import PUBLIC_COUNT, Gaussian
from privfed.privacy.noise import privatise_sum
from privfed.table import Table
from privfed.types import Float32, PrivacyEvent, Relation

if TYPE_CHECKING:
    from privfed.privacy.plan import PhasePlan

COHORT_OVER_COUNT_NOISE = 20
WIDEST = 1e6
"""The clip stays within this factor of the first one, so that no sum of noises can take it to 0 or infinity."""


class AdaptiveClippingConfig(Table):
    """Options; ``privacy.l2_clip_norm`` is the first clip.

    Attributes:
        quantile: The share of clients whose updates should be within the clip.
        learning_rate: How fast the clip moves: a round changes its logarithm by this times the distance to the
            quantile.
        count_noise: Standard deviation, in clients, of the noise on the number of clients within the clip (the
            paper's sigma_b). None: a twentieth of the expected cohort, as in the paper (section 3.2), but at least
            the noise multiplier, so that in small cohorts the count takes no more than a quarter of the budget.
    """

    name: Literal["adaptive_clipping"] = "adaptive_clipping"
    quantile: float = Field(default=0.5, gt=0, lt=1)
    learning_rate: float = Field(default=0.2, gt=0, le=2)
    count_noise: float | None = Field(default=None, gt=0)


def update_noise(noise_multiplier: float, count_noise: float) -> float:
    """Return the noise multiplier z_delta of the updates that, with the count's noise, makes ``noise_multiplier``.

    Raises:
        ConfigError: If the count's noise is so small that its share of the budget would pass the updates'.
    """
    # below z = sqrt(2) sigma_b the bit moves the message by less than the clip does
    if noise_multiplier > math.sqrt(2) * count_noise:
        raise ConfigError(
            f"privacy.mechanism.count_noise = {count_noise:g} is too small for a noise multiplier of "
            f"{noise_multiplier:g}: the count of clients within the clip would cost more than their updates; raise it "
            f"to at least {noise_multiplier / math.sqrt(2):.3g}, or server.cohort_size with it."
        )
    return float((noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5)


def joint_noise(update_multiplier: float, count_noise: float) -> float:
    """Return the noise multiplier of one round: both noises together."""
    return float((update_multiplier**-2 + (2 * count_noise) ** -2) ** -0.5)


class AdaptiveClipping(Gaussian):
    """Each round is one Gaussian mechanism on a Poisson sample of the clients: of the updates and the bits at once."""

    def __init__(self, config: AdaptiveClippingConfig) -> None:
        self._config = config

    def event(self, phase: PhasePlan, noise_multiplier: float, relation: Relation) -> PrivacyEvent:
        """Return the phase as an event, with both noises.

        Raises:
            ConfigError: If the count's noise is too small.
        """
        stage = self.stage(phase)
        joint = noise_multiplier * stage.noise_scale
        count_noise = self._config.count_noise or max(phase.cohort_size / COHORT_OVER_COUNT_NOISE, joint)
        return PrivacyEvent(
            unit="client",
            mechanism="adaptive_clipping",
            noise_multiplier=joint,
            sampling_probability=stage.sampling_probability,
            steps=stage.steps,
            relation=relation,
            parameters=(
                ("count_noise", count_noise),
                ("update_noise_multiplier", update_noise(joint, count_noise)),
            ),
        )

    def running_error(self, phase: PhasePlan, noise_multiplier: float) -> float:
        """Return the error of sums of independent noises, over the clip of the moment."""
        event = self.event(phase, noise_multiplier, "add_or_remove_one")
        both = _number(dict(event.parameters)["update_noise_multiplier"])
        return both * math.sqrt((phase.rounds + 1) / 2) / phase.cohort_size

    def at_work(self, site: Site) -> AtWork:
        """Return the mechanism for one phase."""
        event = self.event(site.plan, site.noise_multiplier, site.relation)
        found = dict(event.parameters)
        widest = site.l2_clip_norm * WIDEST
        return AdaptiveClippingAtWork(
            event=event,
            config=self._config,
            first_clip=site.l2_clip_norm,
            largest_clip=widest if site.largest_clip is None else min(widest, site.largest_clip),
            bit_over_clip=_number(found["update_noise_multiplier"]) / _number(found["count_noise"]),
            size=site.size,
            bound=site.bound,
            cohort_size=site.plan.cohort_size,
        )

    def description(self) -> str:
        """Return the mechanism in a clause."""
        return (
            "DP-FedAvg with adaptive clipping: Gaussian noise on the sum of clipped updates of Poisson-sampled "
            f"clients, and on the count of those within the clip, which follows the {self._config.quantile:g} quantile"
        )

    def assumptions(self) -> tuple[str, ...]:
        """Return what the guarantee rests on."""
        return (
            PUBLIC_COUNT,
            "The noise multiplier is that of updates and counts together; the clip moves by released values alone.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveClippingAtWork:
    """The mechanism in one phase.

    Attributes:
        event: What the phase costs a client; a round costs one step of it.
        first_clip: The clip of the first round; later ones are in the memory.
        largest_clip: The clip never passes this.
        bit_over_clip: s / C: what a client's bit is worth beside the clip.
        size: D.
        bound: From a bound on a message's norm and its length to the bound after encoding.
        cohort_size: Expected clients a round: what sums are divided by.
    """

    event: PrivacyEvent
    config: AdaptiveClippingConfig
    first_clip: float
    largest_clip: float
    bit_over_clip: float
    size: int
    bound: Callable[[float, int], float]
    cohort_size: int
    extra: int = 1

    def sampled(self, clients: Sequence[str], round_number: int) -> tuple[Sequence[str], float]:  # noqa: ARG002
        """Return all clients and the sampling probability."""
        return clients, self.event.sampling_probability

    def terms(self, memory: Memory) -> Terms:
        """Return the clip of the round and what a bit is worth."""
        clip = self._clip(memory)
        return clip, clip * self.bit_over_clip

    def bounded(self, delta_D: Float32, terms: Terms) -> tuple[Float32, float]:
        """Return the clipped update and the bit [M], and the bound on their norm.

        Raises:
            ProtocolError: If the broadcast does not tell the clip.
        """
        if len(terms) != 2 or not terms[0] > 0 or not 0 < terms[1] <= 2 * terms[0] * (1 + 1e-9):
            raise ProtocolError(f"The broadcast's terms are {terms}, expected the clip and what a bit is worth.")
        clip, worth = terms
        within = float(np.linalg.norm(delta_D.astype(np.float64))) <= clip
        # rounding the bit to float32 is covered by the slack that clip_update leaves, as worth / 2 <= clip
        bit = np.float32(worth / 2 if within else -worth / 2)
        return np.append(clip_update(delta_D, clip), bit), math.hypot(clip, worth / 2)

    def release(self, sum_M: NDArray[np.float64] | None, moment: Moment, keeper: Keeper, memory: Memory) -> Release:
        """Return the noised mean and the next clip; a lost round releases nothing, costs nothing and moves nothing."""
        if sum_M is None:
            return Release(mean_D=None, memory=memory, lost=moment.lost)
        digest = moment.digest(sum_M)
        if committed(keeper, moment, digest, self.event.one_step()) != digest:
            return Release(mean_D=None, memory=memory, lost=REPEATED)
        clip, worth = self.terms(memory)
        sensitivity = self.bound(math.hypot(clip, worth / 2), self.size + 1)
        noised_M = privatise_sum(
            sum_M,
            standard_deviation=self.event.noise_multiplier * sensitivity,
            stream=keeper.stream("noise", moment.phase, moment.round, digest),
            sensitivity=sensitivity,
        )
        share = noised_M[self.size] / worth / self.cohort_size + 0.5
        after = np.array([self._moved(clip, float(share))])
        return Release(mean_D=noised_M[: self.size] / self.cohort_size, memory={"clip": after})

    def _clip(self, memory: Memory) -> float:
        return float(memory["clip"][0]) if "clip" in memory else self.first_clip

    def _moved(self, clip: float, share: float) -> float:
        """Return the next clip, given the noised share of clients within this one."""
        power = -self.config.learning_rate * (share - self.config.quantile)
        widest = math.log(WIDEST)
        moved = clip * math.exp(max(-widest, min(widest, power)))
        return min(max(moved, self.first_clip / WIDEST), self.largest_clip)


def check(event: PrivacyEvent) -> None:
    """Refuse an event whose noise multiplier is above that of its two noises together.

    Raises:
        ConfigError: If it is, or a parameter is missing.
    """
    found = dict(event.parameters)
    if event.unit != "client" or set(found) != {"count_noise", "update_noise_multiplier"}:
        raise ConfigError(f"An event of adaptive clipping is incomplete: {event}.")
    both = [_number(value) for value in found.values()]
    if min(both) <= 0 or event.noise_multiplier > joint_noise(both[1], both[0]) * (1 + 1e-9):
        raise ConfigError(
            f"An event of adaptive clipping states a noise multiplier of {event.noise_multiplier:g}, which its two "
            f"noises, {both[1]:g} on updates and {both[0]:g} on counts, do not make."
        )


def _number(value: float | tuple[float, ...]) -> float:
    if isinstance(value, tuple):
        raise ConfigError(f"Expected one number as a parameter of adaptive clipping, got {value}.")
    return value


MECHANISMS.register("adaptive_clipping")(
    Mechanism(config=AdaptiveClippingConfig, build=AdaptiveClipping, check=check, codecs=("identity",))
)
