"""Stochastic k-bit quantisation onto a uniform grid that all clients share.

QSGD (Alistarh et al. 2017, arXiv 1610.02132) and FedPAQ (Reisizadeh et al. 2020, arXiv 1909.13014), with one
public range in place of each client's own norm, so that integers add up under masking.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import CODECS, BaseCodec, CodecPlugin, Properties, Ring, Wire
from privfed.compression.fixed_point import (
    check_finite,
    largest_step_count,
    least_ring,
    norm_of,
    scaled_sum,
    stochastic_signs,
    stochastic_steps,
)
from privfed.compression.one_bit import signs, sum_of_signs
from privfed.errors import ConfigError
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32

_ROUNDING = 2.0**-22  # value / step is computed in float32: the product and its factor are each off by 2^-24


class StochasticQuantizerConfig(Table):
    """Options.

    Attributes:
        bits: Bits a value; the grid has 2^bits - 1 points from -max to max, and two for 1 bit.
        range: ``linf``: ``max_value`` bounds each value (larger ones are cut, counted and reported). ``l2``:
            ``max_value`` bounds the whole vector's norm (a longer vector is scaled down to it first).
        max_value: The public bound that fixes the grid for all clients.
    """

    name: Literal["stochastic_quantizer"] = "stochastic_quantizer"
    bits: int = Field(default=8, ge=1, le=16)
    range: Literal["linf", "l2"] = "linf"
    max_value: float = Field(default=0.05, ge=1e-30, le=1e30)


class StochasticQuantizer(BaseCodec):
    """Rounds each value up or down at random to a grid of 2^bits - 1 points, without bias inside the range.

    With 1 bit the two points are -max and max. The expectation is right to 2^-16 of a step.

    ``l2_bound``: each of D values moves by less than one step, beside a share of 2^-22 of itself that float32 adds, so
    the norm grows by less than step * sqrt(D) and that share (triangle inequality); and no vector on the grid is longer
    than max_value * sqrt(D). The smaller of the two is returned. Cutting to the range never makes a vector longer.
    """

    name = "stochastic_quantizer"

    def __init__(self, config: StochasticQuantizerConfig, ring: Ring | None) -> None:
        self._config = config
        self._ring = ring
        self._levels = max(1, 2 ** (config.bits - 1) - 1)
        self._step = config.max_value / self._levels
        self.properties = _declare(config, ring is not None)
        if ring is not None and self._levels > largest_step_count(ring.bits, ring.clients):
            raise ConfigError(
                f"compression.bits = {config.bits} with {ring.clients} clients does not fit a ring of {ring.bits} "
                "bits: use fewer bits or a smaller cohort."
            )

    @property
    def step(self) -> float:
        """What one integer is worth: ``scale`` of every message."""
        return float(self._step)

    def l2_bound(self, bound: float, length: int) -> float:
        """Return the bound; see the class."""
        longest = float(self._config.max_value * length**0.5)
        if self._config.bits == 1:
            return longest
        return float(min(bound * (1 + _ROUNDING) + self._step * length**0.5, longest))

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message; values beyond the range are cut and counted in ``saturated``.

        Raises:
            ClientError: If a value is not finite.
        """
        largest = check_finite(vector_D)
        if self._config.range == "l2":
            vector_D = self._within(vector_D)
        bits = self._config.bits if self._ring is None else self._ring.bits
        return Encoded(
            values_M=self._one_bit(vector_D, stream)
            if self._config.bits == 1
            else stochastic_steps(vector_D, self._step, self._levels, stream, bits, largest=largest),
            codec=self.name,
            num_bits=bits,
            scale=self._step,
            length=len(vector_D),
            l2_bound=None,
            saturated=self._beyond(vector_D, largest),
        )

    def wire(self, length: int) -> Wire:
        """Return D values of ``bits`` bits, or of the ring's."""
        bits = self._config.bits if self._ring is None else self._ring.bits
        return Wire(values=length, num_bits=bits, kind="integer")

    def linear_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the sum of the vectors [D], each within its rounding error."""
        if self._config.bits == 1:
            return sum_of_signs(encoded_sum, self._ring) * encoded_sum.scale
        return scaled_sum(encoded_sum, None if self._ring is None else self._ring.bits)

    def _one_bit(self, vector_D: Float32, stream: PrivateStream) -> NDArray[np.uint32]:
        """Return signs that are -1 with probability (1 - x / max) / 2."""
        return signs(stochastic_signs(vector_D, self._config.max_value, stream), self._ring)

    def _within(self, vector_D: Float32) -> Float32:
        norm = norm_of(vector_D)
        return vector_D * np.float32(self._config.max_value / norm) if norm > self._config.max_value else vector_D

    def _beyond(self, vector_D: Float32, largest: float) -> int:
        top = self._config.max_value
        if self._config.range == "l2" or largest <= top:
            return 0
        return int(np.count_nonzero(np.abs(vector_D) > top))


def _declare(_config: StochasticQuantizerConfig, _masked: bool) -> Properties:
    return Properties(summable=True, shared_support=True, unbiased=True, downlink=True)


def stochastic_ring_bits(config: Any, clients: int) -> int:
    """Return the smallest ring that holds the sum of ``clients`` grid points of ``config.bits`` bits."""
    return least_ring(max(1, 2 ** (config.bits - 1) - 1), clients)


CODECS.register("stochastic_quantizer")(
    CodecPlugin(
        config=StochasticQuantizerConfig, build=StochasticQuantizer, declare=_declare, ring_bits=stochastic_ring_bits
    )
)
