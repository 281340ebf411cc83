"""One round, from one server state to the next.

Shape suffixes: D trained values, M values sent in the round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privfed.compression import Codec, CodecState
from privfed.errors import RoundError
from privfed.federation.client import Client, Holder
from privfed.federation.codecs import (
    Downlink,
    Place,
    between,
    bound_of,
    codec_at,
    decoded_alone,
    second_codec,
    state_of,
    with_state,
)
from privfed.federation.cohort import cohort_of, with_cohort
from privfed.federation.collect import Collected
from privfed.federation.distributed import Shares
from privfed.federation.exchange import Connect, Exchange
from privfed.federation.layers import Layers, moving, over_trained
from privfed.federation.messages import Broadcast, Interim
from privfed.federation.meter import Meter, MeterReading
from privfed.federation.personal import PersonalStore
from privfed.federation.progress import Progress
from privfed.federation.recorder import Recorder
from privfed.federation.sharing import Selection, Sharing
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
        downlink: How the broadcast's parameters are encoded, or None.
        recorder: Writes down what goes over the wire, where the run is recorded.
        layers: Who trains what, or None where all train all.
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
    downlink: Downlink | None = None
    recorder: Recorder | None = None
    layers: Layers | None = None

    @property
    def layout(self) -> ParamLayout:
        """All tensors that clients train."""
        return self.sharing.layout

    def message_size(self, round_number: int) -> int:
        """Return the values given to the codec in a round: those sent, and what the mechanism sends behind them."""
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


def run_round(
    state: ServerState, phase: Phase, holder: Holder, progress: Progress, connect: Connect = Exchange
) -> tuple[ServerState, RoundReport]:
    """Return the state after the next round and what happened in it.

    ``connect`` makes the path that the round's messages take; the rest is the same for every engine.

    A client that raises, passes its deadline or returns NaN costs the round only itself. A round that fewer than
    the threshold survive is lost: parameters stay as they are.

    Raises:
        BudgetExceededError: If a charge would pass the holder's cap; the run has to stop.
    """
    started = time.perf_counter()
    number = state.round + 1
    cohort = cohort_of(phase, holder, state.taken, number)
    progress.round_started(phase.plan.name, number, phase.plan.rounds, len(cohort))
    place = Place(seed=phase.seed, run_id=holder.run_id, phase=phase.plan.name, round=number)
    broadcast, given = _broadcast(state, phase, place)
    sent = broadcast.to_bytes()
    if phase.recorder:
        phase.recorder.opened(number, sent, phase.sharing.shared.take(given.params_D) if phase.downlink else None)
    exchange = connect(
        phase=phase,
        holder=holder,
        progress=progress,
        given=given,
        broadcast=sent,
        meter=phase.meter() if phase.meter else None,
    )
    codec = codec_at(phase.codec, place, phase.sharing.part(number).sent, broadcast.codec, given.params_D)
    done = _combined(_gathered(exchange, cohort, codec), phase)
    after = _advance(replace(state, mechanism=done.memory), given, done, phase)
    if phase.recorder:
        phase.recorder.closed(
            sent=phase.sharing.part(number).sent.layout,
            total=done.collected.total if phase.masked else None,
            survivors=done.collected.survivors,
            mean_M=None if phase.central else done.mean_M,
            lost=done.lost,
        )
    if phase.central is None:  # whom Poisson sampling chose is nobody's business, and nothing depends on it
        after = replace(after, taken=with_cohort(state.taken, cohort))
    report = RoundReport(
        phase=phase.plan.name,
        round=number,
        cohort=len(cohort),
        survivors=len(done.collected.survivors),
        dropped=tuple(exchange.dropped),
        lost=done.lost,
        seconds={
            "total": time.perf_counter() - started,
            "train": exchange.train_seconds,
            "secagg": exchange.link_seconds,
            **exchange.extra_seconds(),
        },
        bytes_up=done.collected.bytes_up,
        bytes_down=done.collected.bytes_down + len(sent) * len(cohort),
        update_norm=0.0 if done.mean_M is None else float(np.linalg.norm(done.mean_M)),
        saturated=None if phase.central or phase.shares else exchange.saturated,
        meter=exchange.meter.read(number) if exchange.meter and not done.lost else None,
        terms=broadcast.terms,
    )
    return after, report


def _broadcast(state: ServerState, phase: Phase, place: Place) -> tuple[Broadcast, ServerState]:
    """Return what is broadcast, and the state with the parameters that clients read in it."""
    sharing, codec = phase.sharing, phase.codec
    params_S = sharing.shared.take(state.params_D)
    packed, given = None, state
    if phase.downlink is not None:
        packed, decoded_S = phase.downlink.encode(params_S, place.run_id, place.phase, place.round)
        given = replace(state, params_D=sharing.shared.put(state.params_D, decoded_S))
    public = codec.public_state(state_of(state.codec, codec, sharing.part(place.round).sent))
    broadcast = Broadcast(
        run_id=place.run_id,
        phase=place.phase,
        round=place.round,
        layout_digest=phase.layout.digest,
        params_D=params_S,
        carried=state.carried,
        terms=phase.central.terms(state.mechanism) if phase.central else (),
        codec=public,
        packed=packed,
    )
    return broadcast, given


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """A round after its last exchange.

    Attributes:
        mean_M: The averaged update, decoded; None for a lost round.
        codec: The codec's state on the server.
        deltas: (share of the average, update [M]) of each survivor, where the rule needs them.
        memory: What the mechanism keeps.
        weights_T: Weight of the clients that trained each tensor, where they train different ones: of those that came,
            or under client level, where who came is protected, by their share of all.
    """

    mean_M: NDArray[np.float64] | None
    codec: CodecState
    deltas: Sequence[tuple[float, NDArray[np.float64]]]
    memory: Memory
    lost: str | None
    collected: Collected
    weights_T: NDArray[np.float64] | None = None


def _gathered(exchange: Exchange, cohort: Sequence[str], codec: Codec) -> _Done:
    """Exchange, sum, noise, average, decode: in this order, for what noise is added to is the codec's linear sum."""
    state, phase, number = exchange.given, exchange.phase, exchange.round
    sent, length = phase.sharing.part(number).sent, phase.message_size(number)
    collected, lost = exchange.first(cohort, codec)
    release = _release(exchange, codec, collected, lost, state.mechanism)
    if codec.properties.second_pass and release.mean_D is not None:
        told = Interim(phase=phase.plan.name, round=number, values=between(codec, release.mean_D, length))
        codec, interim = second_codec(codec, told.values, length, release.mean_D), told.to_bytes()
        again, lost = exchange.second(collected.survivors, codec, interim)
        release = _release(exchange, codec, again, lost, release.memory, interim)
        collected = replace(
            again,
            bytes_up=collected.bytes_up + again.bytes_up,
            bytes_down=collected.bytes_down + again.bytes_down,
        )
    mean_M, states, weights_T = release.mean_D, state.codec, None
    if mean_M is not None and phase.shares is None:
        mean_M, after = codec.expand(mean_M, state_of(states, phase.codec, sent), sent.size)
        states = with_state(states, after, sent)
        mean_M, weights_T = _by_tensor(mean_M, phase, collected, sent)
    return _Done(
        mean_M=mean_M,
        codec=states,
        deltas=_deltas(collected, codec),
        memory=release.memory,
        lost=release.lost,
        collected=collected,
        weights_T=weights_T,
    )


def _by_tensor(
    mean_M: NDArray[np.float64], phase: Phase, collected: Collected, sent: Selection
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return the average over those clients that trained each tensor, and their weights; as it is where all did."""
    if phase.layers is None:
        return mean_M, None
    if phase.central is not None or collected.total is None or collected.weights_T is None:
        shares_T = phase.layers.shares(sent)
        return over_trained(mean_M, 1.0, shares_T, sent), shares_T
    return over_trained(mean_M, collected.total.total_weight, collected.weights_T, sent), collected.weights_T


def _release(
    exchange: Exchange, codec: Codec, collected: Collected, lost: str | None, memory: Memory, interim: bytes = b""
) -> Release:
    """Return the average of a pass's linear sum; under client level noised, charged, and over a public denominator.

    Args:
        exchange: The round.
        codec: The codec of the pass.
        collected: What came of it.
        lost: Why the round is lost, where it is.
        memory: What the mechanism keeps.
        interim: For a second pass, what was told before it.
    """
    phase, number, total = exchange.phase, exchange.round, collected.total
    if phase.shares is not None:  # the clients charged, and the sum has its noise in it
        public = None if lost or total is None else (total, collected.survivors, exchange.holder.run_id, number)
        return Release(mean_D=phase.shares.update(*public) if public else None, memory=memory, lost=lost)
    length = phase.message_size(number)
    sum_M = np.zeros(codec.sum_length(length)) if total is None else codec.linear_sum(total)
    if phase.central is None:
        return Release(mean_D=None if lost or total is None else sum_M / total.total_weight, memory=memory, lost=lost)
    moment = Moment(
        phase=f"{phase.plan.name}, second pass" if interim else phase.plan.name,
        round=number,
        broadcast=exchange.broadcast + interim,
        lost=lost,
        bound=bound_of(codec, length) if phase.codec.properties.needs_context else None,
        sums=2 if phase.codec.properties.second_pass else 1,
        charged=bool(interim),
    )
    return phase.central.release(None if lost else sum_M, moment, exchange.holder, memory)


def _combined(done: _Done, phase: Phase) -> _Done:
    """Return the round with what the rule makes of the single updates, where it does not take their average."""
    rule = phase.sharing.rule
    if done.mean_M is None or not rule.combines:
        return done
    updates_KM = np.stack([delta_M for _, delta_M in done.deltas])
    updates_KM = updates_KM[np.isfinite(updates_KM).all(axis=1)]  # no honest client sends anything else
    try:
        reason = rule.refusal(len(updates_KM))
        if reason is not None:
            raise RoundError(f"{len(updates_KM)} finite updates: {reason}")
        return replace(done, mean_M=rule.combined(updates_KM))
    except RoundError as error:
        return replace(done, mean_M=None, lost=str(error))


def _advance(state: ServerState, given: ServerState, done: _Done, phase: Phase) -> ServerState:
    """Return the state one round on: the server optimiser's step, then the rule's; a lost round changes nothing."""
    mean_M = done.mean_M
    if mean_M is None:
        return replace(state, round=state.round + 1)
    sharing, number = phase.sharing, state.round + 1
    turns = sharing.turns(number) if phase.server.optimizer == "adam" else None
    sent = sharing.part(number).sent
    if done.weights_T is not None:  # what nobody trained stands still, whatever the optimiser remembers
        some = moving(done.weights_T, sent)
        mean_M, sent = some.take(mean_M), Selection(sharing.layout, some.names)
    averaged = server_step(state, mean_M, phase.server, sent=sent, turns=turns)
    if sharing.rule.variates:
        # under client level who came is protected: the expected number stands for it
        came = phase.plan.cohort_size if phase.central else len(done.collected.survivors)
        averaged = variates_step(averaged, mean_M, came / phase.plan.clients, sharing)
    stepped = rule_step(state, averaged, done.deltas, sharing, given.params_D)
    return replace(stepped, codec=done.codec)


def _deltas(collected: Collected, codec: Codec) -> list[tuple[float, NDArray[np.float64]]]:
    """Return (share of the average, update [M]) of each survivor, where the rule needs them.

    Values travel multiplied by their client's weight.
    """
    whole = sum(each.total_weight for each in collected.single)
    return [(each.total_weight / whole, decoded_alone(codec, each) / each.total_weight) for each in collected.single]
