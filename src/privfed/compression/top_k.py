"""Each client's largest values, with their positions; what was left out is added to its next update.

Top-k with error feedback: Stich et al. 2018, "Sparsified SGD with Memory" (arXiv 1809.07599); Lin et al. 2018, "Deep
Gradient Compression" (arXiv 1712.01887). Positions differ from client to client, so sums of messages mean nothing: the
server has to read each one.

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
    Inner,
    Properties,
    Ring,
    RoundContext,
    Wire,
    declare_inner,
    inner_carries,
    plain_inner,
)
from privfed.compression.fixed_point import check_finite
from privfed.compression.message import sum_of_one
from privfed.compression.nested import Nested, kept
from privfed.errors import ConfigError
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32


class TopKConfig(Table):
    """Options.

    Attributes:
        density: Share of the values that is sent.
        error_feedback: Whether a client keeps what was not sent and adds it to its next update.
        inner: How the values that remain are encoded.
    """

    name: Literal["top_k"] = "top_k"
    density: float = Field(default=0.01, gt=0, le=1)
    error_feedback: bool = True
    inner: Inner = Field(default_factory=plain_inner)


class TopK(Nested):
    """Sends the K values of largest magnitude.

    ``l2_bound``: leaving values out never makes a vector longer, so the nested codec gets K values of norm at most
    ``bound``. With error feedback what is encoded is the update plus the residual: that sum has to be clipped.
    """

    name = "top_k"

    def __init__(self, config: TopKConfig, ring: Ring | None, context: RoundContext | None = None) -> None:
        if ring is not None:
            raise ConfigError(
                'compression.name = "top_k" sends other positions from each client, which do not add up under '
                'secagg.name = "masked": use compression.name = "random_k" or "count_sketch", or secagg.name = "none".'
            )
        super().__init__(config, ring, context)

    @staticmethod
    def declared(config: TopKConfig, masked: bool) -> Properties:
        """Return what is true of it."""
        inner = declare_inner(config.inner, masked, "top_k")
        return Properties(
            summable=False,
            shared_support=False,
            unbiased=False,
            bounded=inner.bounded,
            needs_context=inner.needs_context,
            needs_round_seed=inner.needs_round_seed,
            stateful=config.error_feedback,
            needs_individual=True,
            steady=inner.steady,
            dense=False,
            downlink=inner.downlink,
        )

    def values(self, length: int) -> int:
        """Return K."""
        return kept(self._config.density, length)

    def sum_length(self, length: int) -> int:
        """Return D: messages are spread out before they are added."""
        return length

    def wire(self, length: int) -> Wire:
        """Return K values with their positions."""
        return replace(super().wire(length), sparse=True)

    def l2_bound(self, bound: float, length: int) -> float | None:
        """Return the bound; see the class."""
        return self.inner_bound(bound, length)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message of K values and positions; of equal magnitudes some are chosen.

        Raises:
            ClientError: If a value is not finite.
        """
        check_finite(vector_D)
        indices_K = largest(np.abs(vector_D), self.values(len(vector_D)))
        return replace(self.inner_encode(vector_D[indices_K], len(vector_D), stream), indices_M=indices_K)

    def decode_one(self, encoded: Encoded) -> NDArray[np.float64]:
        """Return the values of one message in their places [D]."""
        inner = self.inner(encoded.length)
        values = replace(encoded, codec=inner.name, length=self.values(encoded.length), indices_M=None)
        vector_D = np.zeros(encoded.length)
        vector_D[encoded.indices_M] = inner.decode_sum(sum_of_one(values, inner))
        return vector_D

    def linear_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the sum of the messages' vectors [D]."""
        return encoded_sum.sum_M.astype(np.float64)


def largest(magnitudes_D: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Return the positions of the ``count`` largest values, ascending."""
    if count >= magnitudes_D.size:
        return np.arange(magnitudes_D.size, dtype=np.int64)
    found = np.argpartition(magnitudes_D, magnitudes_D.size - count)[magnitudes_D.size - count :]
    return np.sort(found).astype(np.int64)


CODECS.register("top_k")(
    CodecPlugin(config=TopKConfig, build=TopK, declare=TopK.declared, carries=inner_carries, instead="random_k")
)
