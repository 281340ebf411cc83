"""The server's state between rounds, and the pure step from one to the next.

Shape suffixes: D trained values, S shared values, M values sent in a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from privfed.compression import CodecState
from privfed.federation.optimizers import optimizer_step, start_of
from privfed.federation.sharing import Selection, Sharing
from privfed.rules import Contribution, Setting, Tensors
from privfed.rules.scaffold import CONTROL, variate_change
from privfed.schedule import ServerConfig
from privfed.types import Float32, ParamLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Everything that training carries from round to round.

    Attributes:
        phase: Name of the phase.
        round: Completed rounds of the phase.
        params_D: Global parameters; personal tensors stay at their start here.
        optimizer: The server optimiser's vectors by name, [D] each.
        mechanism: What the privacy mechanism keeps, by name.
        taken: How often each client was chosen in this phase; not kept where clients are Poisson-sampled.
        carried: What is broadcast beside the shared parameters: tensors by name, and a rule's own vectors.
        codec: What the server's side of the codec keeps, by name, for each set of tensors that is sent.
    """

    phase: str
    round: int
    params_D: Float32 = field(repr=False)
    optimizer: Mapping[str, Float32] = field(default_factory=dict, repr=False)
    mechanism: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    taken: Mapping[str, int] = field(default_factory=dict, repr=False)
    carried: Mapping[str, Float32] = field(default_factory=dict, repr=False)
    codec: CodecState = field(default_factory=dict, repr=False)


def first_state(phase: str, params_D: Float32, carried: Tensors, sharing: Sharing) -> ServerState:
    """Return the state before the first round, as the rule wants it.

    Args:
        phase: Name of the phase.
        params_D: The trained tensors as they are.
        carried: The carried tensors as they are.
        sharing: The rule and its tensors.
    """
    state = ServerState(phase=phase, round=0, params_D=params_D, carried=dict(carried))
    setting = Setting(pairs=sharing.pairs, seed=sharing.seed, round=0)
    changed = sharing.rule.start({**tensors_of(sharing.layout, params_D), **carried}, setting)
    state = _with(state, changed, sharing)
    if sharing.rule.variates:
        control = np.zeros(sharing.shared.size, dtype=np.float32)
        state = replace(state, carried={**state.carried, CONTROL: control})
    return state


def server_step(
    state: ServerState,
    mean_M: NDArray[np.float64],
    config: ServerConfig,
    *,
    sent: Selection | None = None,
    turns: NDArray[np.float64] | int | None = None,
) -> ServerState:
    """Return the state after the server optimiser's step with the averaged update (new minus old), one round on.

    Args:
        state: Before the round.
        mean_M: The averaged update.
        config: The ``[server]`` table.
        sent: Which of the trained values it is of; None for all.
        turns: How many steps these values have had, with this one; None for the number of the round.
    """
    whole = sent is None or sent.whole
    vectors = dict(state.optimizer)
    params_D, now = state.params_D, vectors
    if sent is not None and not whole:
        params_D, now = sent.take(params_D), {name: sent.take(value) for name, value in vectors.items()}
    steps = state.round + 1 if turns is None else turns
    update, after = optimizer_step(mean_M.astype(np.float32), now, config, steps)
    params_D = (params_D + np.float32(config.learning_rate) * update).astype(np.float32)
    if sent is not None and not whole:
        params_D = sent.put(state.params_D, params_D)
        after = {name: sent.put(_all(vectors, name, state.params_D, config), each) for name, each in after.items()}
    return replace(state, round=state.round + 1, params_D=params_D, optimizer=after)


def rule_step(
    before: ServerState,
    averaged: ServerState,
    deltas: Sequence[tuple[float, NDArray[np.float64]]],
    sharing: Sharing,
    given_D: Float32 | None = None,
) -> ServerState:
    """Return ``averaged`` with what the rule does after averaging.

    Args:
        before: The state before the round.
        averaged: After the server optimiser's step.
        deltas: (share of the average, update) of each survivor, where the rule needs them.
        sharing: The rule and its tensors.
        given_D: The parameters that clients trained from, where a codec on the way down changed them; else None.
    """
    if not sharing.pairs:
        return averaged
    setting = Setting(pairs=sharing.pairs, seed=sharing.seed, round=averaged.round)
    sent = sharing.part(averaged.round).sent
    start_D = before.params_D if given_D is None else given_D
    contributions = [
        Contribution(share=share, tensors=_state_tensors(before, sharing, _moved(start_D, delta, sent)))
        for share, delta in deltas
    ]
    changed = sharing.rule.step(
        _state_tensors(before, sharing, before.params_D),
        _state_tensors(averaged, sharing, averaged.params_D),
        contributions,
        setting,
    )
    return _with(averaged, changed, sharing)


def variates_step(state: ServerState, mean_S: NDArray[np.float64], share: float, sharing: Sharing) -> ServerState:
    """Return ``state`` with SCAFFOLD's server variate moved.

    Args:
        state: Where the variate is the one that was broadcast.
        mean_S: The averaged update.
        share: Clients averaged over all clients.
        sharing: The rule and its tensors.
    """
    control_S = state.carried[CONTROL]
    change_S = share * variate_change(control_S, mean_S, sharing.rates_S)
    moved = (control_S.astype(np.float64) + change_S).astype(np.float32)
    return replace(state, carried={**state.carried, CONTROL: moved})


def _all(vectors: Mapping[str, Float32], name: str, like: Float32, config: ServerConfig) -> Float32:
    found = vectors.get(name)
    return np.full_like(like, start_of(name, config)) if found is None else found


def _moved(params_D: Float32, delta_M: NDArray[np.float64], sent: Selection) -> Float32:
    return sent.put(params_D, (sent.take(params_D) + delta_M).astype(np.float32))


def tensors_of(layout: ParamLayout, values_D: Float32) -> dict[str, Float32]:
    """Return views of the flat vector by name."""
    parts = np.split(values_D, np.cumsum(layout.sizes)[:-1])
    return {name: part.reshape(shape) for name, shape, part in zip(layout.names, layout.shapes, parts, strict=True)}


def _state_tensors(state: ServerState, sharing: Sharing, params_D: Float32) -> dict[str, Float32]:
    return {**tensors_of(sharing.layout, params_D), **state.carried}


def _with(state: ServerState, changed: Tensors, sharing: Sharing) -> ServerState:
    if not changed:
        return state
    layout = sharing.layout
    carried = {name: changed.get(name, value) for name, value in state.carried.items()}
    old = tensors_of(layout, state.params_D)
    params_D = np.concatenate([np.ravel(changed.get(name, old[name])) for name in layout.names])
    return replace(state, params_D=params_D.astype(np.float32, copy=False), carried=carried)
