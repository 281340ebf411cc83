"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from privfed.rng import PrivateStream, experiment_rng

if TYPE_CHECKING:
    from privfed.federation.client import Holder
    from privfed.federation.round import Phase


def cohort_of(phase: Phase, holder: Holder, taken: Mapping[str, int], number: int) -> tuple[str, ...]:
    """Return who takes part in a round of a phase.

    Args:
        phase: The phase.
        holder: Whose private stream draws the cohort, where it is drawn at random.
        taken: How often each client was chosen in the phase before this round.
        number: The round, counted from 1.
    """
    names, plan = sorted(phase.clients), phase.plan
    if phase.central:
        eligible, probability = phase.central.sampled(names, number)
        return poisson_cohort(eligible, probability, holder.stream("cohort", plan.name, number))
    return balanced_cohort(names, taken, plan.cohort_size, seed=phase.seed, phase=plan.name, round_number=number)


def with_cohort(taken: Mapping[str, int], cohort: Sequence[str]) -> dict[str, int]:
    """Return how often each client was chosen, with one more cohort."""
    return {**taken, **{client: taken.get(client, 0) + 1 for client in cohort}}


def balanced_cohort(
    clients: Sequence[str], taken: Mapping[str, int], size: int, *, seed: int, phase: str, round_number: int
) -> tuple[str, ...]:
    """Return ``size`` clients among those that took part least, ties broken at random; sorted.

    After R rounds no client was chosen more than ceil(R * size / len(clients)) times: the accountant relies on it.

    Args:
        clients: All clients.
        taken: How often each was chosen so far in this phase.
        size: Clients a round, at most ``len(clients)``.
        seed: The run's seed.
        phase: Name of the phase.
        round_number: The round, counted from 1.
    """
    order = experiment_rng(seed, "cohort", phase, round_number).permutation(len(clients))
    counts = np.fromiter((taken.get(client, 0) for client in clients), dtype=np.int64, count=len(clients))
    ranked = np.lexsort((order, counts))
    return tuple(sorted(clients[int(i)] for i in ranked[:size]))


def poisson_cohort(clients: Sequence[str], probability: float, stream: PrivateStream) -> tuple[str, ...]:
    """Return each client independently with ``probability``, drawn from a cryptographic stream; may be empty."""
    chosen = np.flatnonzero(stream.bernoulli(probability, len(clients)))
    return tuple(clients[int(i)] for i in chosen)
