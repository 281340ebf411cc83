"""Mechanisms of client-level privacy, one file each: who is sampled, what is noised, what a round is charged.

Every mechanism is dominated by Poisson-sampled Gaussian mechanisms, so that its events say all that an accountant
needs: sampling probability, noise multiplier and steps. What makes it more than that (a second noise, a correlation)
is in the event's parameters, from which ``check`` computes the noise multiplier again.

Shape suffixes: D trained values, M values of a message (D, and what a mechanism sends behind them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ClientError
from privfed.registry import Registry
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import EVERYONE, Float32, PrivacyEvent, Relation

if TYPE_CHECKING:
    from privfed.privacy.calibrate import Stage
    from privfed.privacy.plan import PhasePlan

Memory = Mapping[str, NDArray[np.float64]]
"""What a mechanism carries from round to round, by name: a part of the server's state and of its checkpoint."""
Terms = tuple[float, ...]
"""What a mechanism tells the clients of a round; a part of the broadcast."""
Sampling = Literal["poisson", "scheduled"]
REPEATED = "this round was charged for another input before: a round is released once"


class Keeper(Protocol):
    """The data holder's side of a release: its secret streams and its ledger."""

    def stream(self, *names: str | int) -> PrivateStream:
        """Return the private stream of these names."""

    def charge(self, client_id: str, phase: str, round_number: int, input_digest: str, event: PrivacyEvent) -> None:
        """Write a charge to the ledger, durably, or raise."""

    def recorded(self, client_id: str, phase: str, round_number: int) -> str | None:
        """Return the input digest of the round's first charge, or None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A round at the server, after the clients' sum is in.

    Attributes:
        phase: Name of the phase.
        round: The round, counted from 1.
        broadcast: What the clients were sent; all that the round depends on besides their answers.
        lost: Why there is no sum, where there is none.
        bound: Maps the bound on a client's update to the bound on what it adds to this sum, by the codec of the round;
            None where that is the site's.
        sums: How many sums of the same clients the round releases, one after the other; only a mechanism with
            ``two_sums`` is given more than one.
        charged: Whether an earlier sum of the round was charged for this one too.
    """

    phase: str
    round: int
    broadcast: bytes = field(repr=False)
    lost: str | None = None
    bound: Callable[[float], float] | None = None
    sums: int = 1
    charged: bool = False

    def digest(self, sum_M: NDArray[np.float64] | None) -> str:
        """Return the SHA-256 of all that the round's release depends on."""
        return hashlib.sha256(self.broadcast + (b"lost" if sum_M is None else sum_M.tobytes())).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What the server may use of a round.

    Attributes:
        mean_D: The noised sum over the expected cohort, or None for a lost round.
        memory: What the mechanism keeps.
        lost: Why the round is lost, where it is.
    """

    mean_D: NDArray[np.float64] | None
    memory: Memory
    lost: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What a mechanism has to know of the place where it works.

    Attributes:
        plan: The phase.
        noise_multiplier: The run's, before the phase's own scale.
        relation: The neighbouring relation.
        l2_clip_norm: Bound on a client's update (the first one, where a mechanism moves it).
        largest_clip: No clip may pass this: the codec cannot carry larger values. None for no limit.
        size: D.
        bound: Maps (bound on a vector's L2 norm, its length) to the bound once it was encoded and decoded.
        seed: Of the public schedule of clients.
    """

    plan: PhasePlan
    noise_multiplier: float
    relation: Relation
    l2_clip_norm: float
    largest_clip: float | None
    size: int
    bound: Callable[[float, int], float]
    seed: int


class AtWork(Protocol):
    """A mechanism in one phase.

    Attributes:
        extra: How many values a client sends behind its update.
    """

    @property
    def extra(self) -> int: ...

    def sampled(self, clients: Sequence[str], round_number: int) -> tuple[Sequence[str], float]:
        """Return who may take part in a round, and the probability with which each does."""

    def terms(self, memory: Memory) -> Terms:
        """Return what the clients of the next round are told."""

    def bounded(self, delta_D: Float32, terms: Terms) -> tuple[Float32, float]:
        """Return a client's message [M] before encoding, and the bound on its norm.

        Raises:
            ClientError: If a value is not finite.
        """

    def release(self, sum_M: NDArray[np.float64] | None, moment: Moment, keeper: Keeper, memory: Memory) -> Release:
        """Noise and charge a round's sum; None is the sum of a lost round.

        The charge is on disk before this returns, and a round is released for one input only: the noise is a
        function of the input's digest, and a second input of a round that was charged (after a crash, with other
        clients dropped) gives a lost round. So the server may be restarted from any checkpoint, as often as it
        likes, and all that it ever releases is one run of the mechanism.

        Raises:
            BudgetExceededError: If the charge would pass the holder's cap.
        """


class ClientMechanism(Protocol):
    """A mechanism as configured, before any data is read."""

    def stage(self, phase: PhasePlan) -> Stage:
        """Return what a phase does to one client, as the accountant counts it."""

    def steps_by(self, phase: PhasePlan, rounds: int) -> int:
        """Return how many of the stage's steps are charged once so many rounds are done."""

    def event(self, phase: PhasePlan, noise_multiplier: float, relation: Relation) -> PrivacyEvent:
        """Return the stage as an event; ``noise_multiplier`` is the run's, before the phase's own scale."""

    def others(self, phase: PhasePlan) -> tuple[int, float] | None:
        """Return who is Poisson-sampled in a round beside a protected client: (how many, with what probability).

        None where no cohort is drawn at random. Of groups of clients it is the smallest.
        """

    def running_error(self, phase: PhasePlan, noise_multiplier: float) -> float:
        """Return the noise in the model: root mean square over rounds of one value of all averages so far, over
        the clip."""

    def at_work(self, site: Site) -> AtWork:
        """Return the mechanism ready for the rounds of one phase."""

    def description(self) -> str:
        """Return the mechanism in a clause, for the receipt."""

    def assumptions(self) -> tuple[str, ...]:
        """Return what the guarantee rests on besides the accountant's own assumptions, one sentence each."""

    @property
    def sampling(self) -> Sampling:
        """How cohorts come about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """A mechanism's table, its builder, and the check of its events.

    Attributes:
        config: Its table.
        build: Makes the mechanism from its table.
        check: Raises ConfigError unless an event's noise multiplier follows from its parameters.
        codecs: The codecs it works with; None for all.
        correlated: Its noise spans rounds, so each round has to send the same values.
        two_sums: It can release two sums in a round.
    """

    config: type[Table]
    build: Callable[[Any], ClientMechanism]
    check: Callable[[PrivacyEvent], None]
    codecs: tuple[str, ...] | None = None
    correlated: bool = False
    two_sums: bool = False


MECHANISMS: Registry[Mechanism] = Registry("mechanism", "privfed.privacy.mechanisms")


def built(options: Table) -> ClientMechanism:
    """Return the mechanism that a table describes."""
    return MECHANISMS.get(str(getattr(options, "name", None))).build(options)


def committed(keeper: Keeper, moment: Moment, digest: str, event: PrivacyEvent) -> str:
    """Charge ``event`` for a round and return the digest that the ledger has for the round.

    It is ``digest``, unless the round was charged for another input before; nothing is charged then.

    Raises:
        BudgetExceededError: If the charge would pass the holder's cap.
    """
    recorded = keeper.recorded(EVERYONE, moment.phase, moment.round)
    if recorded is not None:
        return recorded
    keeper.charge(EVERYONE, moment.phase, moment.round, digest, event)
    return digest


def clip_update(delta_D: Float32, l2_clip_norm: float) -> Float32:
    """Return ``delta_D`` scaled down to norm <= ``l2_clip_norm``, computed in float64.

    Raises:
        ClientError: If a value is not finite.
    """
    norm = float(np.linalg.norm(delta_D.astype(np.float64)))
    if not np.isfinite(norm):
        raise ClientError("The local update is not finite (NaN or infinity): lower client.learning_rate.")
    if norm <= l2_clip_norm * (1 - 1e-6):
        return delta_D
    # the slack keeps the rounding to float32 from lifting the norm above the bound
    return (delta_D.astype(np.float64) * (l2_clip_norm * (1 - 1e-6) / norm)).astype(np.float32)
