"""The phases of a run: the head alone where asked for, then the tuning. No torch here: budgets need only this."""

from __future__ import annotations

import math
from collections.abc import Mapping

from privfed.config import RunConfig
from privfed.privacy.plan import PhasePlan, Sums
from privfed.rules import made
from privfed.schedule import ClientConfig, ServerConfig, rule_table

WARM_START, TRAIN = "warm_start", "train"
_DEVIATIONS = 8.0


def phases(config: RunConfig) -> list[tuple[str, ClientConfig, ServerConfig]]:
    """Return (name, client settings, server settings) of each phase, in order."""
    warm = config.head_warm_start
    main = (TRAIN, config.client, config.server)
    if warm.name == "none":
        return [main]
    client = config.client.model_copy(
        update={
            "optimizer": warm.optimizer,
            "learning_rate": warm.learning_rate,
            "head_learning_rate": None,
            "local_steps": warm.local_steps,
            "physical_batch_size": 1024,
        }
    )
    if warm.sampling_probability is not None:
        client = client.model_copy(update={"sampling_probability": warm.sampling_probability, "batch_size": None})
    robust = made(config.server.aggregation).combines
    server = config.server.model_copy(
        update={
            # the head has no factors, and is shared while it is warmed up
            "aggregation": config.server.aggregation if robust else rule_table("fedavg"),
            "personal": [],
            "ranks": [],
            "layers": [],
            "meter": False,
            "optimizer": warm.server_optimizer,
            "learning_rate": warm.server_learning_rate,
            "momentum": 0.0,
            "rounds": warm.rounds,
            "evaluate_every": max(1, warm.rounds // 2),
        }
    )
    return [(WARM_START, client, server), main]


def phase_plans(
    config: RunConfig, sizes: Mapping[str, int], lengths: Mapping[str, int] | None = None
) -> list[PhasePlan]:
    """Return the phases of a run over clients of these sizes, as the accountant needs them.

    Args:
        config: The run.
        sizes: Examples of each client.
        lengths: Values that a client sends, by phase; distributed noise cannot be planned without.
    """
    cohort = config.server.cohort_size or len(sizes)
    plans = []
    for name, client, server in phases(config):
        probabilities = {c: client.probability(n) for c, n in sizes.items()}
        plans.append(
            PhasePlan(
                name=name,
                rounds=server.rounds,
                cohort_size=cohort,
                clients=len(sizes),
                local_steps=client.local_steps,
                noise_scale=config.head_warm_start.noise_scale if name == WARM_START else 1.0,
                probabilities=probabilities,
                sums=_sums(config, cohort, lengths[name], _most_examples(probabilities, sizes)) if lengths else None,
            )
        )
    return plans


def _sums(config: RunConfig, cohort: int, length: int, most: float) -> Sums:
    ring = config.secagg.ring_bits
    return Sums(
        length=length,
        n_min=config.secagg.requirements().least_survivors(cohort),
        corrupt=config.secagg.corrupt,
        ring_bits=None if ring == "auto" else ring,
        most_examples=most,
    )


def _most_examples(probabilities: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Return how many examples no client's Poisson sample passes, but for 8 standard deviations.

    A larger sample is projected, which costs no privacy.
    """

    def most(client: str) -> float:
        q, size = probabilities[client], sizes[client]
        return min(float(size), q * size + _DEVIATIONS * math.sqrt(q * (1 - q) * size) + 1)

    return max(1.0, *map(most, probabilities))
