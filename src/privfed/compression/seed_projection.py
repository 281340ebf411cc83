"""A few scalars: the update's coordinates along directions that a shared seed gives.

FedKSeed (Qin et al. 2024, arXiv 2312.06353) trains by zeroth-order steps along seeded directions and sends their
scalars. A codec does not change how a client trains: it projects any update on the round's K directions. They are K
rows of a randomised Hadamard matrix instead of Gaussian vectors: orthonormal, so that the norm has a bound and the
variance is smaller, and all K products take D log D operations.

Shape suffixes: D values of an update, M the next power of two, K directions.
"""

from __future__ import annotations

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
    float_slack,
    inner_carries,
    inner_ring_bits,
    plain_inner,
)
from privfed.compression.fixed_point import check_finite
from privfed.compression.nested import Nested, drawn, seeded_properties
from privfed.hadamard import padded_length, rotate, rounding, unrotate
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, Float32


class SeedProjectionConfig(Table):
    """Options.

    Attributes:
        directions: How many scalars a client sends; all of them where the update is shorter.
        unbiased: Whether the server multiplies by M / K, which makes the expectation over seeds the update. Without it
            the result is the update's projection, which is shorter and closer to it.
        error_feedback: Whether a client keeps what its scalars left out and adds it to its next update; needs
            ``unbiased = false``.
        inner: How the scalars are encoded.
    """

    name: Literal["seed_projection"] = "seed_projection"
    directions: int = Field(default=1024, ge=1)
    unbiased: bool = False
    error_feedback: bool = False
    inner: Inner = Field(default_factory=plain_inner)


class SeedProjection(Nested):
    """Sends K products of the update with orthonormal directions of the round.

    Unbiased: one row is drawn of each of K equal runs and counts as often as its run is long (M / K times), and all M
    rows are a basis.

    ``l2_bound``: K coordinates in an orthonormal basis are not longer than the vector; rounding them to float32 adds
    what ``float_slack`` says, and the nested codec what it says of K values.
    """

    name = "seed_projection"

    @staticmethod
    def declared(config: SeedProjectionConfig, masked: bool) -> Properties:
        """Return what is true of it."""
        return seeded_properties(config, masked)

    def values(self, length: int) -> int:
        """Return K."""
        return min(int(self._config.directions), padded_length(length))

    def l2_bound(self, bound: float, length: int) -> float | None:
        """Return the bound; see the class."""
        return self.inner_bound(float_slack(bound, self.values(length), times=rounding(length)), length)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message of K scalars.

        Raises:
            ClientError: If a value is not finite.
            ConfigError: If the round's seed is missing.
        """
        check_finite(vector_D)
        rotated_M = rotate(vector_D, self.context().round_seed)
        return self.inner_encode(rotated_M[self._rows(len(vector_D))], len(vector_D), stream)

    def expand(
        self, mean_M: NDArray[np.float64], state: CodecState, length: int
    ) -> tuple[NDArray[np.float64], CodecState]:
        """Return the directions times their scalars, added up [D]."""
        values_K = self.inner_expand(mean_M, length)
        full_M = np.zeros(padded_length(length), dtype=np.float32)
        rows_K, runs_K = self._drawn(length)
        full_M[rows_K] = values_K * runs_K if self._config.unbiased else values_K
        return unrotate(full_M, length, self.context().round_seed).astype(np.float64), state

    def _rows(self, length: int) -> NDArray[np.int64]:
        """Return which K of the M rows: one of each of K equal runs."""
        return self._drawn(length)[0]

    def _drawn(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return drawn(self.context().round_seed, padded_length(length), self.values(length))


CODECS.register("seed_projection")(
    CodecPlugin(
        config=SeedProjectionConfig,
        build=SeedProjection,
        declare=SeedProjection.declared,
        ring_bits=inner_ring_bits,
        carries=inner_carries,
    )
)
