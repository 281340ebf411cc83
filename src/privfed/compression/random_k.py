"""Some of the values, at positions drawn from a seed that all clients share: no positions travel, and sums add up.

One position is drawn uniformly from each of K equal runs of the vector, which takes K draws instead of D and has the
variance of K positions drawn without replacement. Source: Konecny et al. 2016 (arXiv 1610.05492, random masks); Stich
et al. 2018 (arXiv 1809.07599, rand-k).

Shape suffixes: D values of an update, K values sent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import (
    CODECS,
    CodecPlugin,
    CodecState,
    Inner,
    Properties,
    Ring,
    RoundContext,
    inner_carries,
    inner_ring_bits,
    plain_inner,
)
from privfed.compression.fixed_point import check_finite
from privfed.compression.nested import Nested, drawn, kept, seeded_properties
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, Float32


class RandomKConfig(Table):
    """Options.

    Attributes:
        density: Share of the values that is sent.
        unbiased: Whether the server multiplies each value by the number of positions it was drawn from.
        error_feedback: Whether a client keeps what was not sent and adds it to its next update; needs
            ``unbiased = false``.
        inner: How the values that remain are encoded.
    """

    name: Literal["random_k"] = "random_k"
    density: float = Field(default=0.1, gt=0, le=1)
    unbiased: bool = True
    error_feedback: bool = False
    inner: Inner = Field(default_factory=plain_inner)


class RandomK(Nested):
    """Sends the values at the round's positions.

    Unbiased: position i of a run of s is drawn with probability 1 / s and counts s times.

    ``l2_bound``: leaving values out never makes a vector longer, so the nested codec gets K values of norm at most
    ``bound``. The multiplication comes after the sum and its noise.
    """

    name = "random_k"

    def __init__(self, config: RandomKConfig, ring: Ring | None, context: RoundContext | None = None) -> None:
        super().__init__(config, ring, context)
        self._drawn: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @staticmethod
    def declared(config: RandomKConfig, masked: bool) -> Properties:
        """Return what is true of it."""
        return replace(seeded_properties(config, masked), dense=False)

    def values(self, length: int) -> int:
        """Return K."""
        return kept(self._config.density, length)

    def l2_bound(self, bound: float, length: int) -> float | None:
        """Return the bound; see the class."""
        return self.inner_bound(bound, length)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message of K values.

        Raises:
            ClientError: If a value of the whole update is not finite.
            ConfigError: If the round's seed is missing.
        """
        check_finite(vector_D)
        return self.inner_encode(vector_D[self._positions(len(vector_D))[0]], len(vector_D), stream)

    def expand(
        self, mean_M: NDArray[np.float64], state: CodecState, length: int
    ) -> tuple[NDArray[np.float64], CodecState]:
        """Return the values in their places, times the length of their run where unbiased [D]."""
        values_K = self.inner_expand(mean_M, length)
        positions_K, runs_K = self._positions(length)
        vector_D = np.zeros(length)
        vector_D[positions_K] = values_K * runs_K if self._config.unbiased else values_K
        return vector_D, state

    def _positions(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the round's positions [K], ascending, and the lengths of the runs they were drawn from [K]."""
        if length not in self._drawn:
            self._drawn[length] = drawn(self.context().round_seed, length, self.values(length))
        return self._drawn[length]


CODECS.register("random_k")(
    CodecPlugin(
        config=RandomKConfig,
        build=RandomK,
        declare=RandomK.declared,
        ring_bits=inner_ring_bits,
        carries=inner_carries,
    )
)
