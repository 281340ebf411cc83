"""One round, from one server state to the next.

Shape suffixes: D trained values, M values sent in the round.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from privfed.compression import Codec
from privfed.errors import BudgetExceededError, ConfigError, LedgerError, ThresholdError
from privfed.federation.client import Broadcast, Client, Holder
from privfed.federation.cohort import balanced_cohort, poisson_cohort
from privfed.federation.collect import Collected, Link, MaskedLink, PlainLink
from privfed.federation.distributed import Shares
from privfed.federation.meter import Meter, MeterReading
from privfed.federation.personal import PersonalStore
from privfed.federation.progress import Progress
from privfed.federation.recorder import Recorder
from privfed.federation.sharing import Sharing
from privfed.federation.state import ServerState, rule_step, server_step, variates_step
from privfed.privacy.mechanisms import AtWork, Memory, Moment, Release, Terms
from privfed.privacy.plan import PhasePlan
from privfed.schedule import ServerConfig
from privfed.secagg import Identity, Requirements
from privfed.types import ParamLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Everything one phase of a run needs, fixed over its rounds.

    Attributes:
        masked: Whether updates are summed by secure aggregation.
        requirements: What a masked sum has to stand.
        ring_bits: The ring that a masked sum is taken in.
        identities: The clients' signing keys, whose public halves are the roster that every round pins.
        central: The mechanism of client-level privacy, at a trusted server, or None.
        shares: Noise that clients add in shares, or None.
        recorder: Writes down what goes over the wire, where the run is recorded.
    """

    plan: PhasePlan
    server: ServerConfig
    clients: Mapping[str, Client]
    codec: Codec
    codec_name: str
    sharing: Sharing
    store: PersonalStore | None
    masked: bool
    requirements: Requirements
    ring_bits: int
    identities: Mapping[str, Identity]
    weighted: bool
    central: AtWork | None
    meter: Callable[[], Meter] | None
    seed: int
    config_digest: str
    shares: Shares | None = None
    recorder: Recorder | None = None

    @property
    def layout(self) -> ParamLayout:
        """All tensors that clients train."""
        return self.sharing.layout

    def message_size(self, round_number: int) -> int:
        """Return M: the values sent in a round, and what the mechanism sends behind them."""
        if self.shares is not None:
            return self.shares.params.encoded_length
        return self.sharing.part(round_number).sent.size + (self.central.extra if self.central else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What happened in a round.

    Nothing in it was computed from one client's data alone, but for who dropped, and for the meter: a simulator's
    figure that is no part of the release.

    Attributes:
        terms: What the privacy mechanism told the clients: with adaptive clipping, the clip first.
    """

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
    meter: MeterReading | None
    terms: Terms


@dataclass(slots=True)
class _Tally:
    """Running figures of one round."""

    meter: Meter | None
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
    terms = phase.central.terms(state.mechanism) if phase.central else ()
    broadcast = Broadcast(
        run_id=holder.run_id,
        phase=phase.plan.name,
        round=number,
        layout_digest=phase.layout.digest,
        params_D=phase.sharing.shared.take(state.params_D),
        carried=state.carried,
        terms=terms,
    ).to_bytes()
    tally = _Tally(meter=phase.meter() if phase.meter else None)
    if phase.recorder:
        phase.recorder.opened(number, broadcast)
    collected, lost = _exchange(cohort, broadcast, state, phase, holder, progress, tally)
    release = _release(collected, phase, holder, state.mechanism, number, broadcast, lost)
    mean_M = release.mean_D
    after = _advance(replace(state, mechanism=release.memory), mean_M, collected, phase)
    if phase.recorder:
        phase.recorder.closed(
            sent=phase.sharing.part(number).sent.layout,
            total=collected.total if phase.masked else None,
            survivors=collected.survivors,
            mean_M=None if phase.central else mean_M,
            lost=release.lost,
        )
    if phase.central is None:  # whom Poisson sampling chose is nobody's business, and nothing depends on it
        taken = {**state.taken, **{client: state.taken.get(client, 0) + 1 for client in cohort}}
        after = replace(after, taken=taken)
    report = RoundReport(
        phase=phase.plan.name,
        round=number,
        cohort=len(cohort),
        survivors=len(collected.survivors),
        dropped=tuple(tally.dropped),
        lost=release.lost,
        seconds={
            "total": time.perf_counter() - started,
            "train": tally.train_seconds,
            "secagg": tally.link_seconds,
        },
        bytes_up=collected.bytes_up,
        bytes_down=collected.bytes_down + len(broadcast) * len(cohort),
        update_norm=0.0 if mean_M is None else float(np.linalg.norm(mean_M)),
        saturated=None if phase.central or phase.shares else tally.saturated,
        meter=tally.meter.read(number) if tally.meter and not release.lost else None,
        terms=terms,
    )
    return after, report


def _cohort(state: ServerState, phase: Phase, holder: Holder) -> tuple[str, ...]:
    names = sorted(phase.clients)
    plan = phase.plan
    number = state.round + 1
    if phase.central:
        eligible, probability = phase.central.sampled(names, number)
        return poisson_cohort(eligible, probability, holder.stream("cohort", plan.name, number))
    return balanced_cohort(names, state.taken, plan.cohort_size, seed=phase.seed, phase=plan.name, round_number=number)


def _exchange(
    cohort: tuple[str, ...],
    broadcast: bytes,
    state: ServerState,
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
        link = _link(cohort, state.round + 1, phase, holder)
    except ConfigError as error:  # a cohort drawn at random can be too small for secagg.n_min
        return nothing, str(error)
    with _timed(tally):
        link.open()
    for client_id in cohort:
        _serve(link, phase.clients[client_id], broadcast, state, progress, tally)
    if phase.shares is not None:
        refusal = phase.shares.refusal(link.sent, broadcast, state.round + 1, holder)
        if refusal is not None:
            return nothing, refusal
    try:
        with _timed(tally):
            collected = link.close()
    except ThresholdError as error:
        return nothing, str(error)
    if collected.total is None and phase.central is None:
        return collected, "no client survived"
    return collected, None


def _link(cohort: tuple[str, ...], number: int, phase: Phase, holder: Holder) -> Link:
    length = phase.message_size(number)
    if not phase.masked:
        return PlainLink(
            phase.codec_name,
            length,
            keep=phase.sharing.rule.needs_individual,
            record=phase.recorder.message if phase.recorder else None,
        )
    # a fresh nonce: keys of a round that a crash cut short never meet those of its repetition
    label = f"{holder.run_id}/{phase.plan.name}/{number}/{time.time_ns()}"
    return MaskedLink(
        {client: phase.identities[client] for client in cohort},
        requirements=phase.requirements,
        round_id=hashlib.sha256(label.encode()).digest(),
        config_digest=bytes.fromhex(phase.config_digest),
        codec=phase.codec_name,
        length=length,
        weighted=phase.weighted,
        ring_bits=phase.ring_bits,
    )


def _serve(link: Link, client: Client, broadcast: bytes, state: ServerState, progress: Progress, tally: _Tally) -> None:
    """Let one client train and send; whatever goes wrong in it drops it from the round."""
    client_id = client.shard.client_id
    started = time.perf_counter()
    try:
        encoded = client.respond(
            broadcast, lambda step, steps: progress.step_done(client_id, step, steps), state.params_D
        )
        tally.train_seconds += time.perf_counter() - started
        with _timed(tally):
            link.send(client_id, encoded, client.weight)
        if tally.meter:
            masked = isinstance(link, MaskedLink)
            tally.meter.sent(state, encoded, client.weight, len(client.shard), masked=masked)
        tally.saturated += encoded.saturated
    except (BudgetExceededError, LedgerError):
        raise
    except Exception as error:  # noqa: BLE001  (any failure of one client must cost the round only that client)
        # under client level a message could carry a figure of the protected client: its kind has to do
        guarded = client.mechanism is not None or client.shares is not None
        reason = type(error).__name__ if guarded else f"{type(error).__name__}: {error}"
        tally.dropped.append((client_id, reason))
        progress.client_dropped(client_id, reason)
    progress.client_done(client_id)


def _release(
    collected: Collected,
    phase: Phase,
    holder: Holder,
    memory: Memory,
    number: int,
    broadcast: bytes,
    lost: str | None,
) -> Release:
    """Return the round's averaged update; under client level noised, charged, and over a public denominator."""
    total = collected.total
    if phase.shares is not None:  # the clients charged, and the sum has its noise in it
        public = None if lost or total is None else (total, collected.survivors, holder.run_id, number)
        return Release(mean_D=phase.shares.update(*public) if public else None, memory=memory, lost=lost)
    sum_M = np.zeros(phase.message_size(number)) if total is None else phase.codec.decode_sum(total)
    if phase.central is None:
        return Release(mean_D=None if lost or total is None else sum_M / total.total_weight, memory=memory, lost=lost)
    moment = Moment(phase=phase.plan.name, round=number, broadcast=broadcast, lost=lost)
    return phase.central.release(None if lost else sum_M, moment, holder, memory)


def _advance(state: ServerState, mean_M: NDArray[np.float64] | None, collected: Collected, phase: Phase) -> ServerState:
    """Return the state one round on: the server optimiser's step, then the rule's; a lost round changes nothing."""
    if mean_M is None:
        return replace(state, round=state.round + 1)
    sharing, number = phase.sharing, state.round + 1
    turns = sharing.turns(number) if phase.server.optimizer == "adam" else None
    averaged = server_step(state, mean_M, phase.server, sent=sharing.part(number).sent, turns=turns)
    if sharing.rule.variates:
        # under client level who came is protected: the expected number stands for it
        came = phase.plan.cohort_size if phase.central else len(collected.survivors)
        averaged = variates_step(averaged, mean_M, came / phase.plan.clients, sharing)
    return rule_step(state, averaged, _deltas(collected, phase), sharing)


def _deltas(collected: Collected, phase: Phase) -> list[tuple[float, NDArray[np.float64]]]:
    """Return (share of the average, update [M]) of each survivor, where the rule needs them.

    Values travel multiplied by their client's weight.
    """
    whole = sum(each.total_weight for each in collected.single)
    return [(each.total_weight / whole, phase.codec.decode_sum(each) / each.total_weight) for each in collected.single]


class _timed:  # noqa: N801
    """Add the body's time to the tally's link seconds."""

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_exc: object) -> None:
        self._tally.link_seconds += time.perf_counter() - self._started
