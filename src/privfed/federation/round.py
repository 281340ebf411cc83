"""One round, from one server state to the next.

Shape suffix: D trained values.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.compression import Codec
from privfed.errors import BudgetExceededError, ConfigError, LedgerError, ThresholdError
from privfed.federation.client import Broadcast, Client, Holder
from privfed.federation.cohort import balanced_cohort, poisson_cohort
from privfed.federation.collect import Collected, Link, MaskedLink, PlainLink
from privfed.federation.progress import Progress
from privfed.federation.state import ServerState, server_step
from privfed.privacy.noise import privatise_sum
from privfed.privacy.plan import PhasePlan
from privfed.schedule import ServerConfig
from privfed.secagg import Identity, Requirements
from privfed.types import EncodedSum, ParamLayout, PrivacyEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class CentralNoise:
    """Client-level privacy by a trusted server (DP-FedAvg).

    Attributes:
        event: What one round costs a client.
        sensitivity: Largest change of the decoded sum when one client joins or leaves: the clip, through the codec.
        noise_multiplier: Standard deviation of the noise over the sensitivity.
    """

    event: PrivacyEvent
    sensitivity: float
    noise_multiplier: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Everything one phase of a run needs, fixed over its rounds.

    Attributes:
        masked: Whether updates are summed by secure aggregation.
        requirements: What a masked sum has to stand.
        ring_bits: The ring that a masked sum is taken in.
        identities: The clients' signing keys, whose public halves are the roster that every round pins.
    """

    plan: PhasePlan
    server: ServerConfig
    clients: Mapping[str, Client]
    codec: Codec
    codec_name: str
    layout: ParamLayout
    masked: bool
    requirements: Requirements
    ring_bits: int
    identities: Mapping[str, Identity]
    weighted: bool
    central: CentralNoise | None
    poisson_clients: bool
    seed: int
    config_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What happened in a round; nothing in it was computed from one client's data alone, but for who dropped."""

    phase: str
    round: int
    cohort: int
    survivors: int
    dropped: tuple[tuple[str, str], ...]
    lost: str | None
    seconds: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    update_norm: float
    saturated: int | None


@dataclass(slots=True)
class _Tally:
    """Running figures of one round."""

    dropped: list[tuple[str, str]] = field(default_factory=list)
    saturated: int = 0
    train_seconds: float = 0.0
    link_seconds: float = 0.0


def run_round(state: ServerState, phase: Phase, holder: Holder, progress: Progress) -> tuple[ServerState, RoundReport]:
    """Return the state after the next round and what happened in it.

    A client that raises, passes its deadline or returns NaN costs the round only itself. A round that fewer than
    the threshold survive is lost: parameters stay as they are.

    Raises:
        BudgetExceededError: If a charge would pass the holder's cap; the run has to stop.
    """
    started = time.perf_counter()
    number = state.round + 1
    cohort = _cohort(state, phase, holder)
    progress.round_started(phase.plan.name, number, phase.plan.rounds, len(cohort))
    broadcast = Broadcast(
        run_id=holder.run_id,
        phase=phase.plan.name,
        round=number,
        layout_digest=phase.layout.digest,
        params_D=state.params_D,
    ).to_bytes()
    tally = _Tally()
    collected, lost = _exchange(cohort, broadcast, number, phase, holder, progress, tally)
    taken = {**state.taken, **{client: state.taken.get(client, 0) + 1 for client in cohort}}
    mean_D = None if lost else _mean(collected.total, phase, holder, number, broadcast)
    after = _advance(state, mean_D, phase, taken)
    report = RoundReport(
        phase=phase.plan.name,
        round=number,
        cohort=len(cohort),
        survivors=len(collected.survivors),
        dropped=tuple(tally.dropped),
        lost=lost,
        seconds={
            "total": time.perf_counter() - started,
            "train": tally.train_seconds,
            "secagg": tally.link_seconds,
        },
        bytes_up=collected.bytes_up,
        bytes_down=collected.bytes_down + len(broadcast) * len(cohort),
        update_norm=0.0 if mean_D is None else float(np.linalg.norm(mean_D)),
        saturated=None if phase.central else tally.saturated,
    )
    return after, report


def _cohort(state: ServerState, phase: Phase, holder: Holder) -> tuple[str, ...]:
    names = sorted(phase.clients)
    plan = phase.plan
    number = state.round + 1
    if phase.poisson_clients:
        stream = holder.stream("cohort", plan.name, number)
        return poisson_cohort(names, plan.cohort_size / plan.clients, stream)
    return balanced_cohort(names, state.taken, plan.cohort_size, seed=phase.seed, phase=plan.name, round_number=number)


def _exchange(
    cohort: tuple[str, ...],
    broadcast: bytes,
    number: int,
    phase: Phase,
    holder: Holder,
    progress: Progress,
    tally: _Tally,
) -> tuple[Collected, str | None]:
    """Return what the server got, and why the round is lost where it is."""
    nothing = Collected(total=None, survivors=(), bytes_up=0, bytes_down=0)
    if not cohort or (phase.masked and len(cohort) < 2):
        return nothing, None if phase.central else "fewer than two clients for a masked sum"
    try:
        link = _link(cohort, number, phase, holder)
    except ConfigError as error:  # a cohort drawn at random can be too small for secagg.n_min
        return nothing, str(error)
    with _timed(tally):
        link.open()
    for client_id in cohort:
        _serve(link, phase.clients[client_id], broadcast, progress, tally)
    try:
        with _timed(tally):
            collected = link.close()
    except ThresholdError as error:
        return nothing, str(error)
    if collected.total is None:
        return collected, "no client survived"
    return collected, None


def _link(cohort: tuple[str, ...], number: int, phase: Phase, holder: Holder) -> Link:
    if not phase.masked:
        return PlainLink(phase.codec_name, phase.layout.size)
    # a fresh nonce: keys of a round that a crash cut short never meet those of its repetition
    label = f"{holder.run_id}/{phase.plan.name}/{number}/{time.time_ns()}"
    return MaskedLink(
        {client: phase.identities[client] for client in cohort},
        requirements=phase.requirements,
        round_id=hashlib.sha256(label.encode()).digest(),
        config_digest=bytes.fromhex(phase.config_digest),
        codec=phase.codec_name,
        length=phase.layout.size,
        weighted=phase.weighted,
        ring_bits=phase.ring_bits,
    )


def _serve(link: Link, client: Client, broadcast: bytes, progress: Progress, tally: _Tally) -> None:
    """Let one client train and send; whatever goes wrong in it drops it from the round."""
    client_id = client.shard.client_id
    started = time.perf_counter()
    try:
        encoded = client.respond(broadcast, lambda step, steps: progress.step_done(client_id, step, steps))
        tally.train_seconds += time.perf_counter() - started
        with _timed(tally):
            link.send(client_id, encoded, client.weight)
        tally.saturated += encoded.saturated
    except (BudgetExceededError, LedgerError):
        raise
    except Exception as error:  # noqa: BLE001  (any failure of one client must cost the round only that client)
        # under client level a message could carry a figure of the protected client: its kind has to do
        reason = type(error).__name__ if client.clip is not None else f"{type(error).__name__}: {error}"
        tally.dropped.append((client_id, reason))
        progress.client_dropped(client_id, reason)
    progress.client_done(client_id)


def _mean(total: EncodedSum | None, phase: Phase, holder: Holder, number: int, broadcast: bytes) -> NDArray[np.float64]:
    """Return the averaged update [D]; under client level noised, charged, and over a public denominator."""
    sum_D = np.zeros(phase.layout.size) if total is None else phase.codec.decode_sum(total)
    if phase.central is None:
        return sum_D / (total.total_weight if total else 1.0)
    digest = hashlib.sha256(broadcast + sum_D.tobytes()).hexdigest()
    noised_D = privatise_sum(
        sum_D,
        standard_deviation=phase.central.noise_multiplier * phase.central.sensitivity,
        stream=holder.stream("noise", phase.plan.name, number, digest),
        sensitivity=phase.central.sensitivity,
    )
    holder.charge("*", phase.plan.name, number, digest, phase.central.event)
    return noised_D / phase.plan.cohort_size


def _advance(
    state: ServerState, mean_D: NDArray[np.float64] | None, phase: Phase, taken: Mapping[str, int]
) -> ServerState:
    before = ServerState(
        phase=state.phase,
        round=state.round,
        params_D=state.params_D,
        optimizer=state.optimizer,
        taken=taken,
    )
    if mean_D is not None:
        return server_step(before, mean_D, phase.server)
    return ServerState(
        phase=state.phase,
        round=state.round + 1,
        params_D=state.params_D,
        optimizer=state.optimizer,
        taken=taken,
    )


class _timed:  # noqa: N801
    """Add the body's time to the tally's link seconds."""

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_exc: object) -> None:
        self._tally.link_seconds += time.perf_counter() - self._started
