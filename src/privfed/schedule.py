"""Who trains how long: the ``[client]``, ``[server]`` and ``[head_warm_start]`` tables."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from privfed.table import Table


class ClientConfig(Table):
    """How a client trains between two rounds.

    Attributes:
        optimizer: ``adamw`` or ``sgd``; fresh in every round.
        learning_rate: For everything but the head.
        head_learning_rate: For the classification head; None for the same as the rest.
        batch_size: Expected size of a batch under Poisson sampling (each client's sampling probability is this
            over its number of examples), or the exact size without privacy.
        sampling_probability: The other way to say it: each example takes part in a step with this probability,
            the same for all clients, so expected batches grow with the shard. Give one of the two.
        local_steps: Optimiser steps a round.
        physical_batch_size: Examples that go through the model at once: memory, not privacy or results.
        deadline_s: Seconds after which a client counts as dropped.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    batch_size: int | None = Field(default=None, ge=1)
    sampling_probability: float | None = Field(default=None, gt=0, le=1)
    local_steps: int = Field(default=5, ge=1)
    physical_batch_size: int = Field(default=32, ge=1)
    deadline_s: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size is not None and self.sampling_probability is not None:
            raise ValueError(
                f"batch_size = {self.batch_size} and sampling_probability = {self.sampling_probability:g} are both "
                "given, expected one of them; unset the other (-s client.sampling_probability=unset)"
            )
        return self

    def probability(self, shard_size: int) -> float:
        """Return the sampling probability of one example on a client with ``shard_size`` examples."""
        if self.sampling_probability is not None:
            return self.sampling_probability
        return (self.batch_size or 32) / shard_size

    def expected_batch(self, shard_size: int) -> float:
        """Return the expected number of examples a step on a client with ``shard_size`` examples."""
        return self.probability(shard_size) * shard_size


class ServerConfig(Table):
    """How the server combines updates.

    Attributes:
        aggregation: ``fedavg`` (McMahan et al. 2017).
        weighting: ``uniform``, or ``examples``: in proportion to the client's number of examples.
        optimizer: ``sgd`` (with ``momentum``; learning rate 1 is plain averaging) or ``adam`` (FedOpt, Reddi et
            al. 2021) on the averaged update.
        rounds: Rounds of training.
        cohort_size: Clients a round: exactly, or expected under client-level privacy (Poisson sampling).
            None for all clients.
        evaluate_every: Evaluate on the test split each so many rounds (and after the last).
    """

    aggregation: Literal["fedavg"] = "fedavg"
    weighting: Literal["uniform", "examples"] = "uniform"
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    rounds: int = Field(default=10, ge=1)
    cohort_size: int | None = Field(default=None, ge=1)
    evaluate_every: int = Field(default=5, ge=1)


class HeadWarmStart(Table):
    """Train the head first, on cached features of the frozen model; every step is charged like any other.

    Under privacy a cold head costs the adapter most of its budget; a probe's steps cost almost no time, since
    the frozen model runs once over the data.

    Attributes:
        name: ``dp_probe`` or ``none``.
        rounds: Rounds of head training before the main phase.
        sampling_probability: As in ``[client]``; None for the main phase's.
        noise_scale: The probe's noise multiplier over the main phase's: how the one budget is shared out. A
            probe that samples every example needs a scale of several, or it leaves nothing for the rest.
        server_optimizer: As in ``[server]``, for this phase; likewise ``server_learning_rate``.
    """

    name: Literal["none", "dp_probe"] = "none"
    rounds: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    local_steps: int = Field(default=1, ge=1)
    sampling_probability: float | None = Field(default=None, gt=0, le=1)
    noise_scale: float = Field(default=1.0, gt=0)
    server_optimizer: Literal["sgd", "adam"] = "sgd"
    server_learning_rate: float = Field(default=1.0, gt=0)
