"""What codecs share that choose or mix values and leave their encoding to a nested codec.

Chains are written by nesting, as in ``[compression] name = "random_k"`` with
``inner = {name = "stochastic_quantizer", bits = 4}``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from privfed.compression import (
    BaseCodec,
    Codec,
    Properties,
    Ring,
    RoundContext,
    Wire,
    build_inner,
    declare_inner,
    no_context,
    public_stream,
    renamed,
)
from privfed.errors import ConfigError
from privfed.rng import PrivateStream
from privfed.types import Encoded, EncodedSum

Positions = NDArray[np.int64]


class Nested(BaseCodec):
    """A codec whose values [M] are encoded by another one.

    Args:
        config: Its table, with the nested codec's under ``inner``.
        ring: The ring of a masked sum, or None.
        context: The round, or None before ``at``.
    """

    def __init__(self, config: Any, ring: Ring | None, context: RoundContext | None = None) -> None:
        self._config = config
        self._ring = ring
        self._context = context
        self._inner: Codec = build_inner(config.inner, ring)
        self._bound: dict[int, Codec] = {}  # by M
        self.properties = self.declared(config, ring is not None)

    @staticmethod
    def declared(config: Any, masked: bool) -> Properties:
        """Return what is true of it."""
        raise NotImplementedError

    def values(self, length: int) -> int:
        """Return M, the number of values given to the nested codec."""
        raise NotImplementedError

    def at(self, context: RoundContext) -> Self:
        """Return this codec for one round."""
        return type(self)(self._config, self._ring, context)

    def sum_length(self, length: int) -> int:
        """Return the number of values that the nested codec makes of M."""
        return self.inner(length).sum_length(self.values(length))

    def wire(self, length: int) -> Wire:
        """Return what the nested codec makes of M values."""
        return self.inner(length).wire(self.values(length))

    def linear_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the nested codec's linear part."""
        length = encoded_sum.length
        return self.inner(length).linear_sum(replace(encoded_sum, length=self.values(length)))

    def inner(self, length: int) -> Codec:
        """Return the nested codec, for the round where there is one."""
        if self._context is None:
            return self._inner
        values = self.values(length)
        if values not in self._bound:
            self._bound[values] = self._inner.at(self._context.inner(values))
        return self._bound[values]

    def inner_expand(self, mean: NDArray[np.float64], length: int) -> NDArray[np.float64]:
        """Return the M values that the nested codec's linear part stands for."""
        return self.inner(length).expand(mean, {}, self.values(length))[0]

    def inner_encode(self, values_M: NDArray[np.floating], length: int, stream: PrivateStream) -> Encoded:
        """Return the message for M values of a vector of D = ``length``."""
        encoded = self.inner(length).encode(values_M.astype(np.float32, copy=False), stream)
        return renamed(encoded, self.name, length)

    def inner_bound(self, bound: float, length: int) -> float | None:
        """Return the nested codec's bound for M values of norm at most ``bound``."""
        return self.inner(length).l2_bound(bound, self.values(length))

    def context(self) -> RoundContext:
        """Return the round.

        Raises:
            ConfigError: If there is none yet.
        """
        if self._context is None:
            raise no_context(self.name)
        return self._context


def drawn(seed: bytes, length: int, count: int) -> tuple[Positions, Positions]:
    """Return one position of each of ``count`` equal runs of ``length`` values, and the lengths of the runs.

    Each position of a run is equally likely, to within 2^-52 of its probability times the run's length.
    """
    edges = np.arange(count + 1, dtype=np.int64) * length // count
    runs_K = np.diff(edges)
    within_K = public_stream(seed, "positions", length, count).uniform(count) * runs_K
    return edges[:-1] + within_K.astype(np.int64), runs_K


def kept(density: float, length: int) -> int:
    """Return how many of ``length`` values a share of ``density`` is: at least one."""
    return min(length, max(1, round(density * length)))


def nested_properties(config: Any, masked: bool, **own: bool) -> Properties:
    """Return what is true of a codec of this module: what its nested codec leaves true, and its ``own`` entries."""
    inner = declare_inner(config.inner, masked, config.name)
    mine = Properties(
        summable=inner.summable,
        shared_support=True,
        unbiased=inner.unbiased,
        bounded=inner.bounded,
        needs_context=True,
        needs_round_seed=inner.needs_round_seed,
        steady=False,
        dense=inner.dense,
    )
    return replace(mine, **own)


def seeded_properties(config: Any, masked: bool) -> Properties:
    """Return what is true of a codec that sends what the round's seed picks.

    Raises:
        ConfigError: If it is unbiased and has error feedback.
    """
    if config.error_feedback and config.unbiased:
        raise ConfigError(
            "compression.error_feedback = true with compression.unbiased = true: values that count several times make "
            "the residual grow without end; set compression.unbiased = false."
        )
    found = nested_properties(config, masked, needs_round_seed=True, stateful=config.error_feedback)
    return replace(found, unbiased=config.unbiased and found.unbiased)


def led_properties(config: Any, masked: bool) -> Properties:
    """Return what is true of a codec whose server picks what counts and remembers it from round to round."""
    return nested_properties(config, masked, unbiased=False, linear=False, server_state=True, dense=False)
