"""How far averaging factors is from averaging products: a simulator's figure, no part of a release.

For each round and all LoRA pairs whose factors are shared: || mean(B_i A_i) - mean(B_i) mean(A_i) ||_F, without the
pairs' scales. It is 0, to rounding, wherever one factor stands still during the round. It reads what single clients
sent, which no server under secure aggregation or client-level privacy sees; metrics.jsonl says so.

The noise's product term is the size of the product of the noises on both averaged factors,
sqrt(E || N_B N_A ||_F^2) = sqrt(sum over pairs of rank * outputs * inputs) * s_A s_B for independent noise of standard
deviations s_A and s_B a value. These are *known* deviations, not measured ones: under client level the server's noise
over the cohort; under example level with plain SGD, learning rate * noise multiplier * clip / expected batch *
sqrt(steps) of each client, averaged over the survivors (what noise of one step does to the gradients of the next is
left out). With another local optimiser no such figure is known, and None is given. It is 0 where only one factor is
noised.

Shape suffixes: M outputs, N inputs, R rank, D trained values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.compression.message import sum_of_one
from privfed.errors import ConfigError
from privfed.federation.client import Answer
from privfed.federation.codecs import decoded_alone
from privfed.federation.local import LocalTrainer
from privfed.federation.pairs import read_named
from privfed.federation.sharing import Sharing
from privfed.federation.state import ServerState, tensors_of
from privfed.rules import Pair
from privfed.rules.factors import a_of, b_of
from privfed.types import Float32

NOTE = "Simulation only: computed from single clients' updates without noise. Not part of the release."
Deviation = Callable[[int], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterReading:
    """One round's figures.

    Attributes:
        error: || mean(BA) - mean(B) mean(A) ||_F.
        relative: ``error`` over || mean(BA) ||_F.
        noise_product: Size of the noise's product term; None where the noise of the update is not known.
    """

    error: float
    relative: float
    noise_product: float | None


@dataclass(slots=True)
class Meter:
    """Adds up products and factors of one round's clients, one client at a time.

    Args:
        sharing: The rule and its tensors.
        frozen: Every pair's factors that are not trained, by name; carried ones come with the round.
        deviation: Maps a client's number of examples to the noise on a value of its update; None where they add none.
        central: The noise on a value of the average, where the server adds it; else 0. None where it is not known.
    """

    sharing: Sharing
    frozen: Mapping[str, Float32]
    deviation: Deviation | None
    central: float | None
    _sums: dict[Pair, list[NDArray[np.float64]]] = field(default_factory=dict)
    _weight: float = 0.0
    _variance: float | None = 0.0

    def sent(self, state: ServerState, answer: Answer, weight: float, size: int) -> None:
        """Take in what one client's message, before masking, stands for by itself.

        Args:
            state: The state that clients trained from.
            answer: The client's (last) message, with its codec.
            weight: The client's aggregation weight, by which the values are multiplied.
            size: Its number of examples.
        """
        part = self.sharing.part(state.round + 1).sent
        delta_M = decoded_alone(answer.codec, sum_of_one(answer.encoded, answer.codec)) / weight
        params_D = part.put(state.params_D, (part.take(state.params_D) + delta_M).astype(np.float32))
        self.add(params_D, state.carried, weight, size)

    def add(self, params_D: Float32, carried: Mapping[str, Float32], weight: float, size: int) -> None:
        """Take in one client's parameters after its training.

        Args:
            params_D: The round's global parameters with the client's update.
            carried: What was broadcast beside them.
            weight: The client's aggregation weight.
            size: Its number of examples.
        """
        tensors = {**self.frozen, **carried, **tensors_of(self.sharing.layout, params_D)}
        for pair in metered(self.sharing):
            a_RN, b_MR = a_of(tensors, pair), b_of(tensors, pair)
            found = [weight * b_MR @ a_RN, weight * b_MR, weight * a_RN]
            sums = self._sums.get(pair)
            self._sums[pair] = found if sums is None else [x + y for x, y in zip(sums, found, strict=True)]
        self._weight += weight
        own = self.deviation(size) if self.deviation else 0.0
        known = own is not None and self._variance is not None
        self._variance = self._variance + (weight * own) ** 2 if known else None  # type: ignore[operator]

    def read(self, round_number: int) -> MeterReading | None:
        """Return the round's figures; None where nobody sent anything."""
        if not self._weight:
            return None
        misses, products = [], []
        for product_MN, b_MR, a_RN in self._sums.values():
            mean_MN = product_MN / self._weight
            misses.append(float(np.linalg.norm(mean_MN - (b_MR / self._weight) @ (a_RN / self._weight))))
            products.append(float(np.linalg.norm(mean_MN)))
        error, whole = math.hypot(*misses), math.hypot(*products)
        return MeterReading(
            error=error, relative=error / whole if whole else 0.0, noise_product=self._noise_product(round_number)
        )

    def _noise_product(self, round_number: int) -> float | None:
        sent = set(self.sharing.part(round_number).sent.names)
        sizes = [
            a_RN.shape[0] * a_RN.shape[1] * b_MR.shape[0]
            for pair, (_, b_MR, a_RN) in self._sums.items()
            if {pair.a, pair.b} <= sent
        ]
        if not sizes:
            return 0.0
        if self._variance is None or self.central is None:
            return None
        variance = self.central**2 + self._variance / self._weight**2
        return math.sqrt(sum(sizes)) * variance


def metered(sharing: Sharing) -> Sequence[Pair]:
    """Return the pairs of which neither factor stays with a client: the others are not averaged."""
    personal = set(sharing.personal.names)
    return [pair for pair in sharing.pairs if not {pair.a, pair.b, pair.core} & personal]


def check_meter(sharing: Sharing) -> None:
    """Check that there is anything to compare.

    Raises:
        ConfigError: If there is no pair whose factors are averaged.
    """
    if not metered(sharing):
        raise ConfigError(
            "server.meter compares averages of LoRA factors, and no pair of this run is averaged: set meter = false."
        )


def make_meter(sharing: Sharing, trainer: LocalTrainer, central: float | None) -> Callable[[], Meter]:
    """Return what makes a meter for each round of a phase.

    Args:
        sharing: The rule and its tensors.
        trainer: Its module holds the factors that are not trained, its settings say how much noise an update has.
        central: The noise on a value of the average, where the server adds it; else 0. None where it is not known.

    Raises:
        ConfigError: If there is no pair whose factors are averaged.
    """
    known = {*sharing.layout.names, *sharing.carried}
    factors = {name for pair in sharing.pairs for name in (pair.a, pair.b, pair.core) if name and name not in known}
    frozen = read_named(trainer.module, factors)

    def make() -> Meter:
        return Meter(sharing=sharing, frozen=frozen, deviation=_deviation(trainer), central=central)

    check_meter(sharing)
    return make


def _deviation(trainer: LocalTrainer) -> Deviation | None:
    dp, config = trainer.dp, trainer.config
    if dp is None or dp.noise_multiplier is None:
        return None
    if config.optimizer != "sgd" or config.momentum or config.weight_decay:
        return lambda _size: None
    noise = config.learning_rate * dp.noise_multiplier * dp.l2_clip_norm * math.sqrt(config.local_steps)
    return lambda size: noise / config.expected_batch(size)
