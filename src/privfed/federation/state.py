"""The server's state between rounds, and the pure step from one to the next.

Shape suffix: D trained values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.schedule import ServerConfig
from privfed.types import Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Everything that training carries from round to round.

    Attributes:
        phase: Name of the phase.
        round: Completed rounds of the phase.
        params_D: Global parameters.
        optimizer: The server optimiser's vectors by name.
        mechanism: What the privacy mechanism keeps, by name.
        taken: How often each client was chosen in this phase.
    """

    phase: str
    round: int
    params_D: Float32 = field(repr=False)
    optimizer: Mapping[str, Float32] = field(default_factory=dict, repr=False)
    mechanism: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    taken: Mapping[str, int] = field(default_factory=dict, repr=False)


def server_step(state: ServerState, mean_D: NDArray[np.float64], config: ServerConfig) -> ServerState:
    """Return the state after one more round, given the averaged update (new minus old).

    The server optimiser treats the negative average as a gradient (FedOpt, Reddi et al. 2021, arXiv 2003.00295,
    Algorithm 2); it sees only what was released, so it costs no privacy.

    Args:
        state: Before the round.
        mean_D: The averaged update.
        config: The ``[server]`` table.
    """
    update = mean_D.astype(np.float32)
    vectors = dict(state.optimizer)
    if config.optimizer == "adam":
        first = vectors.get("m", np.zeros_like(update))
        second = vectors.get("v", np.zeros_like(update))
        first = np.float32(config.beta1) * first + np.float32(1 - config.beta1) * update
        second = np.float32(config.beta2) * second + np.float32(1 - config.beta2) * update**2
        vectors = {"m": first, "v": second}
        steps = state.round + 1
        corrected = first / np.float32(1 - config.beta1**steps)
        scale = np.sqrt(second / np.float32(1 - config.beta2**steps)) + np.float32(config.epsilon)
        update = corrected / scale
    elif config.momentum:
        velocity = np.float32(config.momentum) * vectors.get("velocity", np.zeros_like(update)) + update
        vectors = {"velocity": velocity}
        update = velocity
    return ServerState(
        phase=state.phase,
        round=state.round + 1,
        params_D=(state.params_D + np.float32(config.learning_rate) * update).astype(np.float32),
        optimizer=vectors,
        mechanism=state.mechanism,
        taken=state.taken,
    )
