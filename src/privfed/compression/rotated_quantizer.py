"""Randomised Hadamard rotation, which evens out the values, then stochastic k-bit quantisation on a finer grid.

Source: Suresh et al. 2017, "Distributed Mean Estimation with Limited Communication" (arXiv 1611.00429, section 3).

Shape suffixes: D values of an update; M the next power of two.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import (
    CODECS,
    BaseCodec,
    CodecPlugin,
    CodecState,
    Properties,
    Ring,
    RoundContext,
    Wire,
    float_slack,
    no_context,
    renamed,
)
from privfed.compression.fixed_point import check_finite, norm_of
from privfed.compression.stochastic_quantizer import (
    StochasticQuantizer,
    StochasticQuantizerConfig,
    stochastic_ring_bits,
)
from privfed.hadamard import padded_length, rotate, rounding, unrotate
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32


class RotatedQuantizerConfig(Table):
    """Options.

    Attributes:
        bits: Bits a value.
        max_norm: Public bound on the norm of an update; a longer one is scaled down to it.
        spread: The grid reaches to this many times max_norm / sqrt(M), the typical size of a rotated value. At most a
            share of 2 exp(-spread^2 / 2) of the values is expected beyond it, and cut: 7e-6 for 5.
    """

    name: Literal["rotated_quantizer"] = "rotated_quantizer"
    bits: int = Field(default=8, ge=1, le=16)
    max_norm: float = Field(default=1.0, ge=1e-20, le=1e20)
    spread: float = Field(default=5.0, gt=0)


class RotatedQuantizer(BaseCodec):
    """Quantises the rotated vector; the signs of the rotation are the round's and public.

    ``l2_bound``: the rotation is orthogonal, so it leaves the norm unchanged; computing it in float32 and quantising
    it add what they add to any vector of M values (see ``privfed.hadamard.rounding`` and ``StochasticQuantizer``).
    """

    name = "rotated_quantizer"

    def __init__(self, config: RotatedQuantizerConfig, ring: Ring | None, context: RoundContext | None = None) -> None:
        self._config = config
        self._ring = ring
        self._context = context
        self._quantizer(1)  # refuses a ring that is too small
        self.properties = _declare(config, ring is not None)

    def at(self, context: RoundContext) -> Self:
        """Return this codec under the round's rotation."""
        return type(self)(self._config, self._ring, context)

    def sum_length(self, length: int) -> int:
        """Return M."""
        return padded_length(length)

    def l2_bound(self, bound: float, length: int) -> float:
        """Return the bound; see the class."""
        within = min(bound, self._config.max_norm * (1 + 2.0**-22))
        rotated = float_slack(within, padded_length(length), times=rounding(length))
        return self._quantizer(length).l2_bound(rotated, padded_length(length))

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message of M values; those beyond the grid are cut and counted in ``saturated``.

        Raises:
            ClientError: If a value is not finite.
            ConfigError: If the round's seed is missing.
        """
        check_finite(vector_D)
        norm = norm_of(vector_D)
        if norm > self._config.max_norm:
            vector_D = vector_D * np.float32(self._config.max_norm / norm)
        rotated_M = rotate(vector_D, self._seed())
        return renamed(self._quantizer(len(vector_D)).encode(rotated_M, stream), self.name, len(vector_D))

    def wire(self, length: int) -> Wire:
        """Return M values of ``bits`` bits, or of the ring's."""
        return self._quantizer(length).wire(padded_length(length))

    def linear_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the sum of the rotated vectors [M]."""
        return self._quantizer(encoded_sum.length).linear_sum(encoded_sum)

    def expand(
        self, mean_M: NDArray[np.float64], state: CodecState, length: int
    ) -> tuple[NDArray[np.float64], CodecState]:
        """Return the vector, rotated back in float32 [D]."""
        return unrotate(mean_M.astype(np.float32), length, self._seed()).astype(np.float64), state

    def _quantizer(self, length: int) -> StochasticQuantizer:
        reach = self._config.spread * self._config.max_norm / padded_length(length) ** 0.5
        return StochasticQuantizer(StochasticQuantizerConfig(bits=self._config.bits, max_value=reach), self._ring)

    def _seed(self) -> bytes:
        if self._context is None:
            raise no_context(self.name)
        return self._context.round_seed


def _declare(_config: RotatedQuantizerConfig, _masked: bool) -> Properties:
    return Properties(
        summable=True,
        shared_support=True,
        unbiased=True,
        needs_context=True,
        needs_round_seed=True,
        steady=False,
        downlink=True,
    )


CODECS.register("rotated_quantizer")(
    CodecPlugin(config=RotatedQuantizerConfig, build=RotatedQuantizer, declare=_declare, ring_bits=stochastic_ring_bits)
)
