"""Stochastic k-bit quantisation onto a uniform grid that all clients share.

QSGD (Alistarh et al. 2017, arXiv 1610.02132) and FedPAQ (Reisizadeh et al. 2020, arXiv 1909.13014), with one
public range in place of each client's own norm, so that integers add up under masking.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import CODECS, CodecPlugin, Ring
from privfed.compression.fixed_point import check_finite, largest_step_count, least_ring, scaled_sum, to_ring
from privfed.errors import ConfigError
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32


class StochasticQuantizerConfig(Table):
    """Options.

    Attributes:
        bits: Bits a value; the grid has 2^bits - 1 points from -max to max.
        range: ``linf``: ``max_value`` bounds each value (larger ones are cut, counted and reported). ``l2``:
            ``max_value`` bounds the whole vector's norm (a longer vector is scaled down to it first).
        max_value: The public bound that fixes the grid for all clients.
    """

    name: Literal["stochastic_quantizer"] = "stochastic_quantizer"
    bits: int = Field(default=8, ge=2, le=16)
    range: Literal["linf", "l2"] = "linf"
    max_value: float = Field(default=0.05, gt=0)


class StochasticQuantizer:
    """Rounds each value up or down at random to a grid of 2^bits - 1 points, without bias inside the range.

    ``l2_bound``: each of D values moves by less than one step, so the norm grows by less than step * sqrt(D);
    and no vector on the grid is longer than max_value * sqrt(D). The smaller of the two is returned. Cutting to
    the range never makes a vector longer.
    """

    summable = True
    shared_support = True
    unbiased = True

    def __init__(self, config: StochasticQuantizerConfig, ring: Ring | None) -> None:
        self._config = config
        self._ring = ring
        self._levels = 2 ** (config.bits - 1) - 1
        self._step = config.max_value / self._levels
        if ring is not None and self._levels > largest_step_count(ring.bits, ring.clients):
            raise ConfigError(
                f"compression.bits = {config.bits} with {ring.clients} clients does not fit a ring of {ring.bits} "
                "bits: use fewer bits or a smaller cohort."
            )

    def l2_bound(self, bound: float, length: int) -> float:
        """Return the bound; see the class."""
        return float(min(bound + self._step * length**0.5, self._config.max_value * length**0.5))

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message; values beyond the range are cut and counted in ``saturated``.

        Raises:
            ClientError: If a value is not finite.
        """
        check_finite(vector_D)
        scaled = vector_D.astype(np.float64)
        if self._config.range == "l2":
            scaled *= min(1.0, self._config.max_value / max(float(np.linalg.norm(scaled)), 1e-300))
        steps = scaled / self._step
        saturated = int((np.abs(steps) > self._levels).sum())
        steps = np.clip(steps, -self._levels, self._levels)
        floor = np.floor(steps)
        up = stream.uniform(len(steps)) < steps - floor
        steps_M = (floor + up).astype(np.int64)
        # without a ring the message packs residues of ``bits`` bits; the server adds them as signed integers
        bits = self._config.bits if self._ring is None else self._ring.bits
        return Encoded(
            values_M=to_ring(steps_M, bits),
            codec="stochastic_quantizer",
            num_bits=bits,
            scale=self._step,
            length=len(vector_D),
            l2_bound=None,
            saturated=saturated,
        )

    def decode_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the sum of the vectors [D], each within its rounding error."""
        return scaled_sum(encoded_sum, None if self._ring is None else self._ring.bits)


def _ring_bits(config: StochasticQuantizerConfig, clients: int) -> int:
    """Return the smallest ring that holds the sum of ``clients`` grid points."""
    return least_ring(2 ** (config.bits - 1) - 1, clients)


CODECS.register("stochastic_quantizer")(
    CodecPlugin(config=StochasticQuantizerConfig, build=StochasticQuantizer, ring_bits=_ring_bits)
)
