"""Each matrix of the update by its largest singular values: two factors travel instead of it.

The best approximation of a rank (Eckart and Young 1936); in federated learning FedDLR (Qiao et al. 2021). Products of
factors do not add up as factors do, so the server multiplies out each message by itself.

Shape suffixes: D values of an update, M values of all factors and of the tensors sent as they are.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import CODECS, BaseCodec, CodecPlugin, Properties, Ring, RoundContext, Wire, no_context
from privfed.compression.fixed_point import check_finite
from privfed.compression.matrices import Blocks, blocks_of, concatenated
from privfed.errors import ConfigError
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32


class SvdTruncateConfig(Table):
    """Options.

    Attributes:
        rank: How many singular values of each matrix are kept.
        error_feedback: Whether a client keeps what was left out and adds it to its next update.
    """

    name: Literal["svd_truncate"] = "svd_truncate"
    rank: int = Field(default=4, ge=1)
    error_feedback: bool = False


class SvdTruncate(BaseCodec):
    """Sends U S and V of each matrix's truncated singular value decomposition U S V^T.

    ``l2_bound``: dropping singular values never makes a matrix longer. Rounding A = U S to float32 changes the product
    by at most 2^-24 |A| |V|_2, and rounding V by 2^-24 |A| |V|, with |V|_2 = 1 and |V| = sqrt(rank): a share of
    2^-24 (1 + sqrt(rank)) of the norm, of which twice as much is allowed.
    """

    name = "svd_truncate"

    def __init__(self, config: SvdTruncateConfig, ring: Ring | None, context: RoundContext | None = None) -> None:
        if ring is not None:
            raise ConfigError(
                'compression.name = "svd_truncate" sends factors, whose sums are not factors of the sum, under '
                'secagg.name = "masked": use compression.name = "powersgd", or secagg.name = "none".'
            )
        self._config = config
        self._context = context
        self.properties = _declare(config, False)

    def at(self, context: RoundContext) -> Self:
        """Return this codec for the shapes of a round."""
        return type(self)(self._config, None, context)

    def wire(self, length: int) -> Wire:
        """Return the factors' values and the others."""
        blocks = self._blocks(length)
        return Wire(values=blocks.left + blocks.right + blocks.plain, num_bits=32, kind="float32")

    def l2_bound(self, bound: float, length: int) -> float:
        """Return the bound; see the class."""
        return float(bound * (1 + 2.0**-23 * (2 + self._config.rank**0.5)) + 2.0**-140 * (1 + bound) * length**0.5)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:  # noqa: ARG002
        """Return the message.

        Raises:
            ClientError: If a value is not finite.
            ConfigError: If the round's shapes are missing.
        """
        check_finite(vector_D)
        blocks = self._blocks(len(vector_D))
        lefts, rights = [], []
        for matrix in blocks.matrices:
            u, s, v = np.linalg.svd(matrix.of(vector_D), full_matrices=False)
            lefts.append(u[:, : matrix.rank] * s[: matrix.rank])
            rights.append(v[: matrix.rank].T)
        values = np.concatenate([concatenated(lefts), concatenated(rights), blocks.take_rest(vector_D)])
        return Encoded(
            values_M=values.astype(np.float32),
            codec=self.name,
            num_bits=32,
            scale=1.0,
            length=len(vector_D),
            l2_bound=None,
        )

    def decode_one(self, encoded: Encoded) -> NDArray[np.float64]:
        """Return the vector [D] of one message's factors."""
        blocks = self._blocks(encoded.length)
        values = encoded.values_M.astype(np.float64)
        lefts = blocks.lefts(values)
        rights = blocks.rights(values[blocks.left :])
        products = [left @ right.T for left, right in zip(lefts, rights, strict=True)]
        return blocks.assembled(products, values[blocks.left + blocks.right :])

    def linear_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the sum of the messages' vectors [D]."""
        return encoded_sum.sum_M.astype(np.float64)

    def _blocks(self, length: int) -> Blocks:
        if self._context is None:
            raise no_context(self.name)
        return blocks_of(self._context, length, self._config.rank)


def _declare(config: SvdTruncateConfig, _masked: bool) -> Properties:
    return Properties(
        summable=False,
        shared_support=True,
        unbiased=False,
        needs_context=True,
        stateful=config.error_feedback,
        needs_individual=True,
        downlink=True,
    )


CODECS.register("svd_truncate")(
    CodecPlugin(config=SvdTruncateConfig, build=SvdTruncate, declare=_declare, instead="powersgd")
)
