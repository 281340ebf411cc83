"""Server optimisers on the averaged update; they see only what was released, so they cost no privacy.

Shape suffix: M values sent in a round.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from privfed.schedule import ServerConfig
from privfed.types import Float32

Vectors = Mapping[str, Float32]


def optimizer_step(
    update_M: Float32, vectors: Vectors, config: ServerConfig, turns: NDArray[np.float64] | int
) -> tuple[Float32, dict[str, Float32]]:
    """Return the direction to add, times the learning rate, to the parameters, and the optimiser's vectors after it.

    The negative average is treated as a gradient (FedOpt, Reddi et al. 2021, arXiv 2003.00295, Algorithm 2).

    Args:
        update_M: The averaged update.
        vectors: The optimiser's vectors, each [M]; those not there yet are at their start.
        config: The ``[server]`` table.
        turns: How many steps this is, with this one: for ``adam``'s bias correction.
    """
    if config.optimizer in ("sgd", "fedavgm"):
        return _momentum(update_M, vectors, config)
    if config.optimizer == "adam":
        return _adam(update_M, vectors, config, turns)
    return _adaptive(update_M, vectors, config)


def start_of(name: str, config: ServerConfig) -> np.float32:
    """Return the value at which a vector of the optimiser starts: tau^2 for Reddi et al.'s second moment, else 0."""
    second = name == "v" and config.optimizer in ("fedadagrad", "fedadam", "fedyogi")
    return np.float32(config.tau**2 if second else 0.0)


def _vector(name: str, vectors: Vectors, like: Float32, config: ServerConfig) -> Float32:
    found = vectors.get(name)
    return np.full_like(like, start_of(name, config)) if found is None else found


def _momentum(update_M: Float32, vectors: Vectors, config: ServerConfig) -> tuple[Float32, dict[str, Float32]]:
    if not config.momentum:
        return update_M, {}
    velocity = np.float32(config.momentum) * _vector("velocity", vectors, update_M, config) + update_M
    return velocity, {"velocity": velocity}


def _adam(
    update_M: Float32, vectors: Vectors, config: ServerConfig, turns: NDArray[np.float64] | int
) -> tuple[Float32, dict[str, Float32]]:
    first = np.float32(config.beta1) * _vector("m", vectors, update_M, config)
    first = first + np.float32(1 - config.beta1) * update_M
    second = np.float32(config.beta2) * _vector("v", vectors, update_M, config)
    second = second + np.float32(1 - config.beta2) * update_M**2
    corrected = first / _correction(config.beta1, turns)
    scale = np.sqrt(second / _correction(config.beta2, turns)) + np.float32(config.epsilon)
    return corrected / scale, {"m": first, "v": second}


def _correction(beta: float, turns: NDArray[np.float64] | int) -> Float32:
    return np.asarray(1 - np.power(beta, turns), dtype=np.float32)


def _adaptive(update_M: Float32, vectors: Vectors, config: ServerConfig) -> tuple[Float32, dict[str, Float32]]:
    """Return FedAdagrad's, FedAdam's or FedYogi's step; the second moment starts at tau^2."""
    square = update_M**2
    first = np.float32(config.beta1) * _vector("m", vectors, update_M, config)
    first = first + np.float32(1 - config.beta1) * update_M
    second = _vector("v", vectors, update_M, config)
    share = np.float32(1 - config.beta2)
    if config.optimizer == "fedadagrad":
        second = second + square
    elif config.optimizer == "fedadam":
        second = np.float32(config.beta2) * second + share * square
    else:
        second = second - share * square * np.sign(second - square)
    return first / (np.sqrt(second) + np.float32(config.tau)), {"m": first, "v": second}
