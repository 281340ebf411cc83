"""Who trains how long: the ``[client]``, ``[server]`` and ``[head_warm_start]`` tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from privfed.registry import Registry
from privfed.table import Table

RULES: Registry[Any] = Registry("aggregation rule", "privfed.rules")
"""The aggregation rules, with their types in ``privfed.rules``; here as well because ``[server]`` picks one."""


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
        proximal_mu: FedProx (Li et al. 2020, arXiv 1812.06127): adds mu * (w - w_round_start) to each gradient; 0 for
            none. With privacy it is added after clipping and noise, so it changes neither.
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
    proximal_mu: float = Field(default=0.0, ge=0)
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


def rule_table(value: Any) -> Table:
    """Return the table of a rule that is given by its name alone, or by a table with a name.

    Raises:
        UnknownNameError: If there is no such rule.
        ValueError: If it is neither.
    """
    if isinstance(value, Table):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"expected the name of an aggregation rule or a table with one, got {value!r}")
    raw = {"name": "fedavg", **value}
    if not isinstance(raw["name"], str):
        raise ValueError(f"name must be a string, got {raw['name']!r}")
    found: Table = RULES.get(raw["name"]).config.model_validate(raw)
    return found


class ServerConfig(Table):
    """How the server combines updates.

    Attributes:
        aggregation: The rule, by its name, or a table of its name and options (``[server.aggregation]``);
            ``privfed ls rules`` lists them.
        personal: Trained tensors that stay with each client: ``head``, or patterns of tensor names with ``*``;
            one, or a list.
        weighting: ``uniform``, or ``examples``: in proportion to the client's number of examples.
        optimizer: On the averaged update: ``sgd`` (with ``momentum``; learning rate 1 is plain averaging), ``adam``
            (with bias correction, as in torch), ``fedavgm`` (Hsu et al. 2019, arXiv 1909.06335), or ``fedadagrad``,
            ``fedadam``, ``fedyogi`` (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2).
        momentum: Of ``sgd`` and ``fedavgm``.
        beta1: Of ``adam``, ``fedadagrad``, ``fedadam`` and ``fedyogi``: decay of the first moment.
        beta2: Of ``adam``, ``fedadam`` and ``fedyogi``: decay of the second moment.
        epsilon: Added to the denominator by ``adam``.
        tau: Adaptivity of ``fedadagrad``, ``fedadam``, ``fedyogi``: added to the denominator, and the square root of
            the second moment's start.
        rounds: Rounds of training.
        cohort_size: Clients a round: exactly, or expected under client-level privacy (Poisson sampling).
            None for all clients.
        evaluate_every: Evaluate on the test split each so many rounds (and after the last).
        evaluate_clients: Where parts are personal, score at most so many clients: each needs a pass of its own.
        ranks: Ranks of the clients' LoRA adapters, dealt out in turn over the clients in the order of their names
            (HetLoRA); none is above the tuning's. Empty: all have the tuning's.
        layers: Groups of numbers of transformer blocks, such as ``[[0, 1], [2, 3]]``, dealt out as the ranks are: a
            client trains the blocks of its group, and what is in no block, such as the head. The average of a tensor
            is over those that trained it. Empty: all train all.
        meter: Record how far the average of the factors is from the average of the products. It reads what single
            clients sent: a simulator's figure, marked as such in metrics.jsonl and no part of the release.
    """

    aggregation: Annotated[SerializeAsAny[Table], BeforeValidator(rule_table)] = Field(
        default_factory=lambda: rule_table("fedavg")
    )
    personal: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        default_factory=list
    )
    weighting: Literal["uniform", "examples"] = "uniform"
    optimizer: Literal["sgd", "adam", "fedavgm", "fedadagrad", "fedadam", "fedyogi"] = "sgd"
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    tau: float = Field(default=1e-3, gt=0)
    rounds: int = Field(default=10, ge=1)
    cohort_size: int | None = Field(default=None, ge=1)
    evaluate_every: int = Field(default=5, ge=1)
    evaluate_clients: int = Field(default=100, ge=1)
    meter: bool = False
    ranks: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    layers: list[list[int]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optimizer == "fedavgm" and not self.momentum:
            raise ValueError(
                'optimizer = "fedavgm" with momentum = 0.0 is plain averaging; set momentum (0.9 is usual), '
                'or optimizer = "sgd"'
            )
        if min((number for group in self.layers for number in group), default=0) < 0:
            raise ValueError(f"layers = {self.layers} has a number below 0, expected numbers of blocks from 0")
        return self

    @property
    def rule(self) -> str:
        """The name of the aggregation rule."""
        return str(getattr(self.aggregation, "name", ""))


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
