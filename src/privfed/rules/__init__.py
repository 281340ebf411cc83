"""Aggregation rules, one file each: what clients train and send, and how the server combines it.

A rule is pure: it maps the tensors before a round, and what arrived, to the tensors after it. Everything that it
computes from what arrived is post-processing of what was released, so no rule costs privacy by itself; what it
*needs to see* decides which guarantees it can be combined with. No rule imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from privfed import schedule
from privfed.registry import Registry
from privfed.schedule import ClientConfig, ServerConfig
from privfed.table import Table
from privfed.types import Float32

Tensors = Mapping[str, Float32]

PERIOD = 2
"""Every rule asks for the same after so many rounds."""
LORA_TUNINGS = frozenset({"lora", "rslora", "pissa", "federa"})
"""Tunings that train both factors of plain LoRA pairs."""
RANKED_TUNINGS = frozenset({"lora", "rslora", "ffa_lora"})
"""Tunings whose adapter starts as nothing, so that a part of its rank is an adapter as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One LoRA pair of a model: the layer computes with ``weight + scale * B A``.

    Attributes:
        a: Name of A, [r, ...]; flattened to [r, in].
        b: Name of B, [out, r, ...]; flattened to [out, r].
        weight: Name of the base weight.
        scale: What the product is multiplied by.
        transposed: Whether the base weight is stored as [in, out].
        core: Name of an [r, r] matrix R between the two, where there is one (Fed-SB: B R A).
    """

    a: str
    b: str
    weight: str
    scale: float
    transposed: bool = False
    core: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One client's tensors after its training, and its share of the average; the shares of a round sum to 1."""

    share: float
    tensors: Tensors = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a rule's step knows beside the tensors: the model's pairs, the run's seed, and the round (from 1)."""

    pairs: tuple[Pair, ...]
    seed: int
    round: int


class NoOptions(Table):
    """The table of a rule that has no options."""

    name: str


class Rule:
    """What is true of a rule, and its steps; the base does what federated averaging does.

    Args:
        options: The rule's table; None for its defaults.

    Attributes:
        config: The type of its table.
        needs_individual: The server has to see each client's update; a sum is not enough.
        takes: Names of the tunings it works with; None for any.
        plain_server: The server's step is averaging alone: factors are re-made each round, and a server
            optimiser's vectors would speak of factors that are gone.
        changes_base: It changes base weights: the result is a whole model, not an adapter.
        variates: Clients keep control variates and correct their gradients by them.
        alternates: What is sent differs from round to round.
        combines: It combines the clients' updates itself (``combined``), where others take the average.
        coordinatewise: It compares what clients send for each value by itself, so all have to send the same ones.
        ranks: Clients may have adapters of lower rank: an update of zeros for what a client does not train means that
            it is as it was.
        layers: Clients may train different tensors: the average of each is over those that trained it.
    """

    config: ClassVar[type[Table]] = NoOptions
    needs_individual: ClassVar[bool] = False
    takes: ClassVar[frozenset[str] | None] = None
    plain_server: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    variates: ClassVar[bool] = False
    alternates: ClassVar[bool] = False
    combines: ClassVar[bool] = False
    coordinatewise: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    layers: ClassVar[bool] = False

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def refusal(self, updates: int) -> str | None:  # noqa: ARG002
        """Return in a clause why so many updates are too few to combine, or None where they are enough."""
        return None

    def combined(self, updates_KM: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what stands for the average of K updates of M values; only where ``combines``.

        Raises:
            RoundError: If nothing can be made of them: the round is lost.
        """
        raise NotImplementedError(f"{type(self).__name__} does not combine {len(updates_KM)} updates by itself")

    def personal(self, pairs: Sequence[Pair]) -> frozenset[str]:  # noqa: ARG002
        """Return the names of tensors that clients train and never send."""
        return frozenset()

    def carried(self, pairs: Sequence[Pair]) -> tuple[str, ...]:
        """Return the names of tensors that the server changes and broadcasts and that no client trains.

        These are the base weights where the rule changes them.
        """
        return tuple(pair.weight for pair in pairs) if self.changes_base else ()

    def resting(self, round_number: int, pairs: Sequence[Pair]) -> frozenset[str]:  # noqa: ARG002
        """Return the names of trained tensors that stand still in this round (counted from 1).

        It repeats after ``PERIOD`` rounds.
        """
        return frozenset()

    def remade(self, pairs: Sequence[Pair]) -> frozenset[str]:  # noqa: ARG002
        """Return the names of trained tensors that ``step`` sets anew: after a round they need not have moved."""
        return frozenset()

    def start(self, tensors: Tensors, setting: Setting) -> Tensors:  # noqa: ARG002
        """Return the tensors that change before the first round, out of all shared and carried ones."""
        return {}

    def step(
        self,
        before: Tensors,  # noqa: ARG002
        averaged: Tensors,  # noqa: ARG002
        contributions: Sequence[Contribution],  # noqa: ARG002
        setting: Setting,  # noqa: ARG002
    ) -> Tensors:
        """Return the tensors that differ from ``averaged`` after a round.

        Args:
            before: All shared and carried tensors as they were broadcast.
            averaged: The same with the server optimiser's step taken.
            contributions: Each survivor's tensors where ``needs_individual``, else empty.
            setting: Pairs, seed and round.
        """
        return {}


RULES: Registry[type[Rule]] = schedule.RULES


def made(options: Table) -> Rule:
    """Return the rule that a table describes."""
    return RULES.get(str(getattr(options, "name", "")))(options)


def check_rule(server: ServerConfig, client: ClientConfig, *, tuning: str, unit: str, masked: bool) -> None:
    """Refuse what the chosen rule cannot be combined with; nothing but names is looked at.

    Args:
        server: The ``[server]`` table.
        client: The ``[client]`` table.
        tuning: Name of the tuning.
        unit: The privacy unit.
        masked: Whether sums are masked.

    Raises:
        UnknownNameError: If there is no such rule.
        ValueError: A sentence that names both sides and the nearest that works.
    """
    rule, name = made(server.aggregation), f"server.aggregation = {server.rule!r}"
    if rule.combines:
        _check_combines(name, server, unit=unit, masked=masked)
    if rule.takes is not None and tuning not in rule.takes:
        known = " or ".join(f'"{each}"' for each in sorted(rule.takes))
        raise ValueError(
            f"{name} works on LoRA factors and tuning.name = {tuning!r} does not train those it needs; "
            f'use tuning.name = {known}, or aggregation = "fedavg"'
        )
    if rule.needs_individual and masked:
        raise ValueError(
            f'{name} needs the update of each client and secagg.name = "masked" shows the server their sum only; '
            'use secagg.name = "none", or a rule that works on sums such as aggregation = "fedsvd" or "frlora"'
        )
    if rule.needs_individual and unit == "client":
        raise ValueError(
            f'{name} needs the update of each client and the noise of privacy.unit = "client" is added to their sum '
            'only; use privacy.unit = "example", or a rule that works on sums such as aggregation = "fedsvd"'
        )
    if rule.plain_server and (server.optimizer != "sgd" or server.learning_rate != 1.0 or server.momentum):
        raise ValueError(
            f"{name} makes the factors anew in each round, and a server optimiser would remember those of before; use "
            'server.optimizer = "sgd" with learning_rate = 1.0 and momentum = 0.0, or aggregation = "fedavg"'
        )
    if rule.variates:
        _check_variates(name, server, client)
    if server.ranks:
        _check_ranks(name, rule, server, tuning, protected=unit == "client" and masked)
    if server.layers:
        _check_layers(name, rule, server, unit=unit, masked=masked)


def check_cohort(server: ServerConfig, clients: int) -> None:
    """Refuse a cohort that is too small for the rule.

    Args:
        server: The ``[server]`` table.
        clients: Clients of a round.

    Raises:
        ValueError: A sentence that names both sides.
    """
    reason = made(server.aggregation).refusal(clients)
    if reason is not None:
        raise ValueError(f"server.aggregation = {server.rule!r} with rounds of {clients} clients: {reason}")


def _check_combines(name: str, server: ServerConfig, *, unit: str, masked: bool) -> None:
    """Refuse what a robust rule cannot be combined with: it reads single updates, and its result is no sum."""
    if masked:
        raise ValueError(
            f'{name} compares the updates of single clients and secagg.name = "masked" shows the server their sum '
            'only; use secagg.name = "none", or aggregation = "fedavg"'
        )
    if unit == "client":
        raise ValueError(
            f"{name} is no sum, so the clip does not bound what one client changes in it, and the noise of "
            'privacy.unit = "client" is scaled for a sum; use privacy.unit = "example", or aggregation = "fedavg"'
        )
    if server.weighting != "uniform":
        raise ValueError(
            f'{name} counts every client once and server.weighting = "examples" would let a client that claims many '
            'examples outweigh the others; use server.weighting = "uniform", or aggregation = "fedavg"'
        )
    if server.cohort_size is not None:
        check_cohort(server, server.cohort_size)


def _check_ranks(name: str, rule: Rule, server: ServerConfig, tuning: str, *, protected: bool) -> None:
    if tuning not in RANKED_TUNINGS:
        known = " or ".join(f'"{each}"' for each in sorted(RANKED_TUNINGS))
        raise ValueError(
            f"server.ranks = {server.ranks} with tuning.name = {tuning!r}: a part of its rank is no adapter of the "
            f"same model; use tuning.name = {known}, or ranks = []"
        )
    if not rule.ranks:
        raise ValueError(
            f"server.ranks = {server.ranks} with {name}: it would take the zeros of what a client does not train for "
            'its update; use aggregation = "fedavg", or ranks = []'
        )
    if protected and len(set(server.ranks)) > 1:
        raise ValueError(
            f'server.ranks = {server.ranks} with privacy.unit = "client" and secagg.name = "masked": whether enough '
            "clients of a random cohort have the largest rank to hide one another would show who was in it; use "
            'secagg.name = "none", or privacy.unit = "example"'
        )


def _check_layers(name: str, rule: Rule, server: ServerConfig, *, unit: str, masked: bool) -> None:
    given = f"server.layers = {server.layers}"
    if not rule.layers:
        raise ValueError(
            f"{given} with {name}, which does not average each tensor by itself over those that trained it; use "
            'aggregation = "fedavg", or layers = []'
        )
    if server.ranks:
        raise ValueError(
            f"{given} with server.ranks = {server.ranks}: averages are counted by tensor, and clients of lower rank "
            "train a part of one; set layers = [] or ranks = []"
        )
    if server.optimizer == "adam":
        raise ValueError(
            f'{given} with server.optimizer = "adam", which corrects its bias by the number of rounds, and a tensor '
            'that nobody trained in a round stands still in it; use server.optimizer = "fedadam"'
        )
    if server.meter:
        raise ValueError(
            f"{given} with server.meter = true, which compares averages over all clients; set meter = false"
        )
    if unit == "client" and masked:
        raise ValueError(
            f'{given} with privacy.unit = "client" and secagg.name = "masked": whether enough clients of a random '
            'cohort trained each layer to hide one another would show who was in it; use secagg.name = "none", or '
            'privacy.unit = "example"'
        )


def _check_variates(name: str, server: ServerConfig, client: ClientConfig) -> None:
    if client.optimizer != "sgd" or client.momentum or client.weight_decay or client.proximal_mu:
        raise ValueError(
            f'{name} derives its control variates from plain gradient steps; use client.optimizer = "sgd" with '
            'momentum, weight_decay and proximal_mu of 0.0, or aggregation = "fedavg"'
        )
    if server.weighting != "uniform":
        raise ValueError(
            f"{name} averages control variates over clients, which a sum weighted by examples does not give; use "
            'server.weighting = "uniform", or aggregation = "fedavg"'
        )


__all__ = [
    "LORA_TUNINGS",
    "PERIOD",
    "RANKED_TUNINGS",
    "RULES",
    "Contribution",
    "NoOptions",
    "Pair",
    "Rule",
    "Setting",
    "Tensors",
    "check_cohort",
    "check_rule",
    "made",
]
