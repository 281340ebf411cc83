"""The distributed mechanism: a client's real vector to noisy residues, and the sum of residues to a real vector.

    encode:  project to the norm bound -> (rotate) -> scale -> round at random -> add a share of noise -> mod 2^bits
    decode:  sum mod 2^bits -> nearest to 0 -> unscale -> (rotate back)

No party ever adds the whole noise. Each honest client adds a share of variance total / ((1 - dropped - corrupt) n), so
that the honest survivors' shares make up the total when as many drop out as declared and the corrupt ones add nothing.
If fewer drop out there is more noise, and ``event(survivors)`` says so.

What a unit moves the sum by:

``unit = "client"``: the vector *is* the unit. Its rounding is conditional: the integers that leave have a squared norm
of at most ``integer_l2_squared``, whatever the input.
``unit = "example"``: the vector is a sum of clipped examples, and no check of its norm says anything about one of them.
Rounding is plain, and one example moves the rounded sum by at most ``integer_l2_squared`` except with probability
``beta`` a step (see ``rounding.stochastic_round``), which is charged to delta: ``beta`` has to be far below delta over
the number of steps. The examples must have been clipped and summed in at least single precision (``NORM_SLACK``).

The reduction modulo 2^bits comes after the noise and costs no privacy. It can cost correctness:
``overflow_probability``.

Source: Kairouz, Liu and Steinke 2021 (arXiv 2102.06387), Algorithms 1 and 2; Agarwal, Kairouz and Liu 2021 (arXiv
2110.04995), Algorithm 1.

Shape legend: D values of a vector; M encoded values (D, or the next power of two if rotated).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError, RoundError
from privfed.hadamard import rotate, unrotate
from privfed.privacy.discrete.accounting import DiscreteEvent, calibrate_variance
from privfed.privacy.discrete.discrete_gaussian import SMALLEST_SHARE_VARIANCE
from privfed.privacy.discrete.params import DiscreteParams, honest_survivors
from privfed.privacy.discrete.rounding import (
    Float64,
    Int64,
    UInt32,
    conditional_round,
    project,
    stochastic_round,
    unwrap,
    wrap,
)
from privfed.privacy.discrete.sampler import make_sampler
from privfed.rng import PrivateStream
from privfed.types import Relation

__all__ = ["DiscreteParams", "calibrate_local_variance", "decode_sum", "encode"]


def encode(values_D: NDArray[np.floating[Any]], params: DiscreteParams, stream: PrivateStream) -> UInt32:
    """Return a client's residues [M], its share of the noise included.

    Args:
        values_D: The client's vector; at client level clipped to the clip norm already (it is projected once more).
        params: What all parties agreed on.
        stream: A private stream whose names cover everything that ``values_D`` depends on. The same stream and vector
            give the same residues.

    Raises:
        ClientError: If the vector has values that are not finite, or no rounding was within the bound.
        ConfigError: If it has another length than the parameters say.
    """
    rounded_M = _rounded(values_D, params, stream)
    if params.local_variance > 0:
        rounded_M += make_sampler(params.noise, params.local_variance).draw(stream, rounded_M.size)
    return wrap(rounded_M, params.ring_bits)


def decode_sum(residue_sum_M: NDArray[np.unsignedinteger[Any]], params: DiscreteParams, survivors: int) -> Float64:
    """Return the noisy sum [D] of the survivors' vectors from the sum of their residues modulo 2^ring_bits.

    Raises:
        RoundError: If there are fewer survivors than ``n_min``, or more than ``n``.
        ConfigError: If the sum has another length than the parameters say.
    """
    if not params.n_min <= survivors <= params.n:
        raise RoundError(f"Got a sum of {survivors} survivors, expected {params.n_min} to {params.n}.")
    if residue_sum_M.shape != (params.encoded_length,):
        raise ConfigError(f"Got a sum of shape {residue_sum_M.shape}, expected ({params.encoded_length},).")
    sum_M = unwrap(residue_sum_M, params.ring_bits) / params.scale
    return unrotate(sum_M, params.length, params.rotation_seed) if params.rotate else sum_M


def calibrate_local_variance(
    params: DiscreteParams,
    *,
    target_epsilon: float,
    delta: float,
    steps: int,
    sampling_probability: float = 1.0,
    relation: Relation = "add_or_remove_one",
    survivors: int | None = None,
) -> float:
    """Return the variance of each client's share at which ``steps`` sums cost at most ``target_epsilon``.

    It is total / (honest survivors): for n_min = (1 - dropped) n that is total / ((1 - dropped - corrupt) n), up to
    whole clients.

    Args:
        params: The parameters; their ``local_variance`` is not looked at.
        target_epsilon: Above 0.
        delta: In (0, 1).
        steps: Sums that the unit's data can enter.
        sampling_probability: Poisson probability with which the unit enters each.
        relation: The neighbouring relation.
        survivors: How many have to survive each round for the target to hold; None takes n_min, below which no sum is
            revealed.

    Raises:
        ConfigError: If no honest noise is left among so few survivors, or no noise reaches the target.
    """
    fewest = params.n_min if survivors is None else survivors
    honest = honest_survivors(fewest, params.n, params.corrupt)
    if honest < 1:
        raise ConfigError(
            f"With {fewest} survivors of {params.n} and a fraction of {params.corrupt:g} corrupt no honest noise is "
            "left: declare fewer dropped or corrupt clients, or more clients."
        )

    def events_at(total: float) -> list[DiscreteEvent]:
        event = params.event_at(
            total, honest, sampling_probability=sampling_probability, steps=steps, relation=relation
        )
        return [event]

    least = SMALLEST_SHARE_VARIANCE * honest if params.noise == "discrete_gaussian" else 1e-3
    return calibrate_variance(events_at, target_epsilon, delta, least=least) / honest


def _rounded(values_D: NDArray[np.floating[Any]], params: DiscreteParams, stream: PrivateStream) -> Int64:
    if values_D.shape != (params.length,):
        raise ConfigError(f"Got a vector of shape {values_D.shape}, expected ({params.length},).")
    values_M = project(values_D, params.contribution_norm)
    if params.rotate:
        values_M = rotate(values_M, params.rotation_seed)
    values_M *= params.scale
    if params.unit == "example":
        return stochastic_round(values_M, stream)
    return conditional_round(values_M, params.integer_l2_squared, stream)[0]
