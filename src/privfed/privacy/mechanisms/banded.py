"""Correlated noise: banded matrix factorisation (Choquette-Choo et al. 2023, "(Amplified) Banded MF").

arXiv 2306.08153. Round t releases x_t + (C^-1 z)_t: x_t is the cohort's sum, z independent Gaussian noise, and C lower
triangular, Toeplitz with b bands of norm 1 (``privfed.privacy.toeplitz``). Later noise takes back part of earlier
noise, so that the model, a running sum of the releases, is off by less. What is released is an invertible map of
C x + z, also where x_t depends on earlier releases (Denisov et al. 2022, arXiv 2202.08312, Theorem 2.1).

Two ways to choose who takes part:

* ``cyclic_poisson``: the clients form b groups; round t takes a Poisson sample of group t mod b. One client's
  contributions lie b rounds apart, so they fall into disjoint blocks of b rows of C x + z, and each block is a Gaussian
  mechanism of sensitivity clip * ||column|| = clip that sees the client with the sampling probability. So n rounds are
  at most ceil(n / b) Poisson-sampled Gaussians (arXiv 2306.08153, section 5): with b = 1 this is DP-FedAvg. One step is
  charged before the first release of each cycle of b rounds, in which every client can be chosen once: what is charged
  is at no moment less than what was released.
* ``min_separation``: a public schedule takes the clients in turn, so that any two turns of a client are at least
  floor(N / cohort) rounds apart. Nothing is hidden about who takes part; the whole phase is *one* Gaussian mechanism
  with the exact sensitivity of C for such participation, charged before its first release.

Rounds after the one that is charged are recorded in the ledger with no steps, for their input: see ``AtWork.release``.
The noise of past rounds is drawn again from the holder's streams, under the inputs that the ledger recorded: no buffer
is kept, and a restart gives the same bits. A lost round takes part with x_t = 0, in noise and in cost.

Shape suffixes: D trained values, B bands, N rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.errors import ConfigError, ResumeError
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
from privfed.privacy.mechanisms.gaussian import PUBLIC_COUNT
from privfed.privacy.noise import gaussian_noise, on_grid
from privfed.privacy.toeplitz import check_decreasing, inverse, optimised, prefix_error, sensitivity, square_root
from privfed.rng import experiment_rng
from privfed.table import Table
from privfed.types import Float32, PrivacyEvent, Relation

if TYPE_CHECKING:
    from privfed.privacy.plan import PhasePlan

_CYCLIC: Final = {"coefficients", "deviation", "groups"}
_SCHEDULED: Final = {"coefficients", "deviation", "participations", "rounds", "separation"}
USUAL_BANDS = 8
_SLACK = 1 + 1e-9


class BandedConfig(Table):
    """Options.

    Attributes:
        bands: Bands of C (1: independent noise); under ``cyclic_poisson`` also the number of groups. More bands cancel
            more noise and amplify less: ``privfed budget`` tells the error of each choice. None: 8, or as many as
            groups of a cohort's size allow.
        sampling: Who takes part; see the module.
        coefficients: ``optimized`` for prefix sums over the planned rounds, or the closed form ``square_root``.
    """

    name: Literal["banded"] = "banded"
    bands: int | None = Field(default=None, ge=1, le=512)
    sampling: Literal["cyclic_poisson", "min_separation"] = "cyclic_poisson"
    coefficients: Literal["optimized", "square_root"] = "optimized"


class Banded:
    """Banded noise with one of the two ways to choose cohorts."""

    def __init__(self, config: BandedConfig) -> None:
        self._config = config
        self._cyclic = config.sampling == "cyclic_poisson"
        self.sampling: Sampling = "poisson" if self._cyclic else "scheduled"

    def stage(self, phase: PhasePlan) -> Stage:
        """Return a step a cycle of Poisson-sampled Gaussians, or one Gaussian for the whole phase.

        Raises:
            ConfigError: If a group would be smaller than a cohort.
        """
        if not self._cyclic:
            scale = phase.noise_scale / self._sensitivity(phase)
            return Stage(sampling_probability=1.0, steps=1, noise_scale=scale)
        bands = self.bands(phase)
        if bands * phase.cohort_size > phase.clients:
            raise ConfigError(
                f"privacy.mechanism.bands = {bands} makes groups of {phase.clients // bands} clients, of which a "
                f"cohort of {phase.cohort_size} cannot be taken: use at most "
                f"{phase.clients // phase.cohort_size} bands, or a smaller server.cohort_size."
            )
        probability = bands * phase.cohort_size / phase.clients
        steps = self.steps_by(phase, phase.rounds)
        return Stage(sampling_probability=probability, steps=steps, noise_scale=phase.noise_scale)

    def bands(self, phase: PhasePlan) -> int:
        """Return the number of bands."""
        if self._config.bands is not None:
            return self._config.bands
        return min(USUAL_BANDS, _separation(phase)) if self._cyclic else USUAL_BANDS

    def steps_by(self, phase: PhasePlan, rounds: int) -> int:
        """Return the cycles begun, or one step as soon as there is a round."""
        return math.ceil(rounds / self.bands(phase)) if self._cyclic else min(rounds, 1)

    def event(self, phase: PhasePlan, noise_multiplier: float, relation: Relation) -> PrivacyEvent:
        """Return the phase as an event, with all that its noise multiplier follows from."""
        stage = self.stage(phase)
        coefficients = tuple(float(value) for value in self.coefficients(phase))
        deviation = noise_multiplier * phase.noise_scale
        told: dict[str, float | tuple[float, ...]] = {"coefficients": coefficients, "deviation": deviation}
        if self._cyclic:
            told["groups"] = float(self.bands(phase))
        else:
            told |= {
                "participations": float(phase.participations),
                "rounds": float(phase.rounds),
                "separation": float(_separation(phase)),
            }
        return PrivacyEvent(
            unit="client",
            mechanism="banded",
            noise_multiplier=noise_multiplier * stage.noise_scale,
            sampling_probability=stage.sampling_probability,
            steps=stage.steps,
            relation=relation,
            parameters=tuple(sorted(told.items())),
        )

    def others(self, phase: PhasePlan) -> tuple[int, float] | None:
        """Return the smallest group without one client; a schedule draws nobody."""
        if not self._cyclic:
            return None
        return phase.clients // self.bands(phase) - 1, self.stage(phase).sampling_probability

    def running_error(self, phase: PhasePlan, noise_multiplier: float) -> float:
        """Return the error of sums of correlated noises."""
        error = prefix_error(self.coefficients(phase), phase.rounds)
        return noise_multiplier * phase.noise_scale * error / phase.cohort_size

    def at_work(self, site: Site) -> AtWork:
        """Return the mechanism for one phase."""
        event = self.event(site.plan, site.noise_multiplier, site.relation)
        coefficients_B = self.coefficients(site.plan)
        bound = site.bound(site.l2_clip_norm, site.size)
        return BandedAtWork(
            event=event,
            cyclic=self._cyclic,
            coefficients_B=coefficients_B,
            inverse_N=inverse(coefficients_B, site.plan.rounds),
            clip=site.l2_clip_norm,
            deviation=site.noise_multiplier * site.plan.noise_scale * bound,
            plan=site.plan,
            seed=site.seed,
        )

    def coefficients(self, phase: PhasePlan) -> NDArray[np.float64]:
        """Return the first column of C [B], of norm 1."""
        bands = self.bands(phase)
        if self._config.coefficients == "square_root":
            return square_root(bands)
        most, apart = (1, phase.rounds) if self._cyclic else (phase.participations, _separation(phase))
        return np.array(optimised(bands, phase.rounds, most, apart))

    def description(self) -> str:
        """Return the mechanism in a clause."""
        who = "Poisson-sampled clients of one group a round" if self._cyclic else "clients that take turns"
        return f"DP-FedAvg with correlated noise: banded matrix factorisation on the sum of clipped updates of {who}"

    def assumptions(self) -> tuple[str, ...]:
        """Return what the guarantee rests on."""
        roster = "The list of clients is public: a client that is removed stays on it and sends nothing."
        if self._cyclic:
            apart = "A client can be chosen in one round of each cycle only; the server enforces it."
        else:
            apart = "A public schedule keeps any two turns of a client apart as accounted; the server enforces it."
        return (PUBLIC_COUNT, roster, apart)

    def _sensitivity(self, phase: PhasePlan) -> float:
        return sensitivity(self.coefficients(phase), phase.rounds, phase.participations, _separation(phase))


@dataclass(frozen=True, slots=True, kw_only=True)
class BandedAtWork:
    """The mechanism in one phase.

    Attributes:
        event: What the phase costs a client.
        cyclic: Whether cohorts are Poisson samples of groups, or the schedule's.
        coefficients_B: First column of C.
        inverse_N: First column of C^-1.
        clip: Bound on a client's update.
        deviation: Standard deviation of each value of z.
        plan: The phase.
        seed: Of the public division into groups, or of the schedule.
    """

    event: PrivacyEvent
    cyclic: bool
    coefficients_B: NDArray[np.float64] = field(repr=False)
    inverse_N: NDArray[np.float64] = field(repr=False)
    clip: float
    deviation: float
    plan: PhasePlan
    seed: int
    extra: int = 0

    def sampled(self, clients: Sequence[str], round_number: int) -> tuple[Sequence[str], float]:
        """Return the round's group and the sampling probability, or exactly those whose turn it is."""
        order = experiment_rng(self.seed, "turns", self.plan.name).permutation(len(clients))
        if self.cyclic:
            bands = len(self.coefficients_B)
            chosen = order[(round_number - 1) % bands :: bands]
        else:
            size = self.plan.cohort_size
            chosen = order[(np.arange(size) + (round_number - 1) * size) % len(clients)]
        return sorted(clients[int(i)] for i in chosen), self.event.sampling_probability

    def terms(self, memory: Memory) -> Terms:  # noqa: ARG002
        """Return nothing: the clip is fixed."""
        return ()

    def bounded(self, delta_D: Float32, terms: Terms) -> tuple[Float32, float]:  # noqa: ARG002
        """Return the clipped update."""
        return clip_update(delta_D, self.clip), self.clip

    def release(self, sum_M: NDArray[np.float64] | None, moment: Moment, keeper: Keeper, memory: Memory) -> Release:
        """Return the mean with correlated noise; a lost round is charged too, since later noise builds on it."""
        digests = self._digests(memory, moment.round)
        digest = moment.digest(sum_M)
        kept = committed(keeper, moment, digest, self._charge(moment.round))
        digests.append(bytes.fromhex(kept))
        after = {
            "coefficients": self.coefficients_B,
            "inputs": np.frombuffer(b"".join(digests), dtype=np.uint8).astype(np.float64),
        }
        if sum_M is None or kept != digest:
            return Release(mean_D=None, memory=after, lost=moment.lost if kept == digest else REPEATED)
        noise_D = self._noise(keeper, moment.phase, digests, len(sum_M))
        # given all earlier releases, what is new is c_0^-1 z_t
        noised_D = on_grid(sum_M, noise_D, standard_deviation=self.deviation * float(self.inverse_N[0]))
        return Release(mean_D=noised_D / self.plan.cohort_size, memory=after)

    def _charge(self, round_number: int) -> PrivacyEvent:
        """Return what is charged in a round: a cycle in its first, or the phase in its first."""
        first = (round_number - 1) % len(self.coefficients_B) == 0 if self.cyclic else round_number == 1
        return replace(self.event, steps=1 if first else 0)

    def _digests(self, memory: Memory, round_number: int) -> list[bytes]:
        """Return the inputs' digests of all rounds before this one.

        Raises:
            ResumeError: If the memory is of another course: noise that does not cancel would be private, and wrong.
        """
        raw = memory["inputs"].astype(np.uint8).tobytes() if "inputs" in memory else b""
        same = round_number == 1 or np.array_equal(memory.get("coefficients", np.empty(0)), self.coefficients_B)
        if len(raw) != 32 * (round_number - 1) or not same:
            raise ResumeError(
                f"The checkpoint does not hold what correlated noise needs in round {round_number} (its coefficients "
                "or the rounds before are other ones): resume with the version of privfed and scipy that wrote it."
            )
        return [raw[start : start + 32] for start in range(0, len(raw), 32)]

    def _noise(self, keeper: Keeper, phase: str, digests: Sequence[bytes], size: int) -> NDArray[np.float64]:
        """Return (C^-1 z)_t [D], from z drawn again for every round so far: one draw of D values each."""
        total_D = np.zeros(size)
        for number, digest in enumerate(digests, start=1):
            stream = keeper.stream("noise", phase, number, digest.hex())
            total_D += self.inverse_N[len(digests) - number] * gaussian_noise(stream, size, self.deviation)
        return total_D


def _separation(phase: PhasePlan) -> int:
    """Return how far apart a client's turns are at least."""
    return max(1, phase.clients // phase.cohort_size)


def check(event: PrivacyEvent) -> None:
    """Refuse an event whose noise multiplier is above what its coefficients and participation make.

    Raises:
        ConfigError: If it is, or a parameter is missing or out of range.
    """
    found = dict(event.parameters)
    coefficients = found.get("coefficients")
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    if event.unit != "client" or not isinstance(coefficients, tuple) or set(found) != {"coefficients", *numbers}:
        raise ConfigError(f"An event of banded noise is incomplete: {event}.")
    c_B = np.array(coefficients)
    check_decreasing(c_B)
    if set(found) == _CYCLIC and len(coefficients) <= numbers["groups"]:
        largest = float(np.linalg.norm(c_B))
    elif set(found) == _SCHEDULED and event.sampling_probability == 1:
        shape = (int(numbers[name]) for name in ("rounds", "participations", "separation"))
        largest = sensitivity(c_B, *shape)
    else:
        raise ConfigError(f"An event of banded noise is incomplete or contradicts itself: {event}.")
    if event.noise_multiplier * largest > numbers["deviation"] * _SLACK:
        raise ConfigError(
            f"An event of banded noise states a noise multiplier of {event.noise_multiplier:g}, but its noise of "
            f"{numbers['deviation']:g} over a sensitivity of {largest:g} makes less."
        )


MECHANISMS.register("banded")(Mechanism(config=BandedConfig, build=Banded, check=check, correlated=True))
