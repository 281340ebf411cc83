"""No compression: float32 values, or 32-bit fixed point where updates are masked and must add up in a ring."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import CODECS, BaseCodec, CodecPlugin, Properties, Ring, Wire
from privfed.compression.fixed_point import check_finite, largest_step_count, scaled_sum, to_ring
from privfed.errors import ClientError, ConfigError
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32


class IdentityConfig(Table):
    """Options.

    Attributes:
        max_value: Under masking, the largest magnitude of an update's value; a client whose update exceeds it
            fails loudly. The fixed-point step is this over 2^31 / clients: 16 and 32 clients give 2.4e-7.
    """

    name: Literal["identity"] = "identity"
    max_value: float = Field(default=16.0, gt=0)


class Identity(BaseCodec):
    """Sends values as they are (float32), or rounded to the nearest fixed-point step in a ring.

    ``l2_bound``: rounding to the nearest step moves each of D values by at most half a step, so the norm grows
    by at most step * sqrt(D) / 2 (triangle inequality); float32 leaves it unchanged.
    """

    name = "identity"

    def __init__(self, config: IdentityConfig, ring: Ring | None) -> None:
        self._ring = ring
        self._max_value = config.max_value
        self.properties = _declare(config, ring is not None)
        self._step = 1.0 if ring is None else config.max_value / self._step_count(ring)

    @staticmethod
    def _step_count(ring: Ring) -> int:
        """Return how many steps ``max_value`` may be: n times as many stay inside the ring, so no sum ever wraps."""
        steps = largest_step_count(ring.bits, ring.clients)
        if steps < 1:
            raise ConfigError(f"A ring of {ring.bits} bits cannot sum {ring.clients} clients: raise secagg.ring_bits.")
        return steps

    def l2_bound(self, bound: float, length: int) -> float:
        """Return the bound; see the class."""
        return bound if self._ring is None else bound + self._step * length**0.5 / 2

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:  # noqa: ARG002
        """Return the message.

        Raises:
            ClientError: If a value is not finite or, under masking, beyond ``max_value``.
        """
        largest = check_finite(vector_D)
        if self._ring is None:
            return Encoded(
                values_M=vector_D,
                codec="identity",
                num_bits=32,
                scale=1.0,
                length=len(vector_D),
                l2_bound=None,
            )
        if largest > self._max_value:
            raise ClientError(
                f"A value of the update is beyond compression.max_value = {self._max_value:g}: "
                "raise max_value or lower the learning rate."
            )
        steps_M = np.rint(vector_D.astype(np.float64) / self._step).astype(np.int64)
        values_M = to_ring(steps_M, self._ring.bits)
        return Encoded(
            values_M=values_M,
            codec="identity",
            num_bits=self._ring.bits,
            scale=self._step,
            length=len(vector_D),
            l2_bound=None,
        )

    def wire(self, length: int) -> Wire:
        """Return D float32 values, or integers of the ring's size."""
        if self._ring is None:
            return Wire(values=length, num_bits=32, kind="float32")
        return Wire(values=length, num_bits=self._ring.bits, kind="integer")

    def linear_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the sum of the vectors [D]."""
        if self._ring is None:
            return encoded_sum.sum_M.astype(np.float64)
        return scaled_sum(encoded_sum, self._ring.bits)


def _declare(_config: IdentityConfig, masked: bool) -> Properties:
    # nearest rounding, in a ring, is off by less than half a step
    return Properties(summable=True, shared_support=True, unbiased=not masked, downlink=True)


def _carries(config: IdentityConfig, masked: bool) -> float | None:
    return config.max_value if masked else None


CODECS.register("identity")(CodecPlugin(config=IdentityConfig, build=Identity, declare=_declare, carries=_carries))
