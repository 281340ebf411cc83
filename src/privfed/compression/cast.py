"""Values in half the bits: bfloat16 or IEEE half precision, rounded to nearest."""

from __future__ import annotations

from typing import Literal

import numpy as np

from privfed.compression import CODECS, BaseCodec, CodecPlugin, Properties, Ring, Wire
from privfed.compression.fixed_point import check_finite
from privfed.errors import ClientError, ConfigError
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, Float32

# (largest magnitude, relative rounding, absolute rounding of subnormal values)
_LIMITS = {"bfloat16": (3.3895313892515355e38, 2.0**-8, 2.0**-134), "float16": (65504.0, 2.0**-11, 2.0**-25)}


class CastConfig(Table):
    """Options.

    Attributes:
        dtype: ``bfloat16`` keeps the range of float32 and 8 bits of precision; ``float16`` keeps 11 bits between 6e-8
            and 65504.
    """

    name: Literal["cast"] = "cast"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


class Cast(BaseCodec):
    """Rounds each value to the nearest of the smaller type, ties to even.

    ``l2_bound``: a value moves by at most 2^-8 of itself (bfloat16; 2^-11 for float16), or by 2^-134 (2^-25) where it
    is subnormal; so the norm grows by at most that share of itself, or by that times sqrt(D).
    """

    name = "cast"

    def __init__(self, config: CastConfig, ring: Ring | None) -> None:
        if ring is not None:
            raise ConfigError(
                'compression.name = "cast" sends floats, which do not add up in the ring of secagg.name = "masked": '
                'use compression.name = "stochastic_quantizer" or secagg.name = "none".'
            )
        self._dtype = config.dtype
        self.properties = _declare(config, False)

    def l2_bound(self, bound: float, length: int) -> float:
        """Return the bound; see the class."""
        _, share, least = _LIMITS[self._dtype]
        return float(bound * (1 + share) + least * length**0.5)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:  # noqa: ARG002
        """Return the message.

        Raises:
            ClientError: If a value is not finite or too large for the type.
        """
        limit = _LIMITS[self._dtype][0]
        if check_finite(vector_D) > limit:
            raise ClientError(
                f'A value of the update is beyond {limit:g}, the largest of compression.dtype = "{self._dtype}": '
                "lower the learning rate."
            )
        values_M = vector_D.astype(np.float16) if self._dtype == "float16" else _to_bfloat16(vector_D)
        return Encoded(values_M=values_M, codec=self.name, num_bits=16, scale=1.0, length=len(vector_D), l2_bound=None)

    def wire(self, length: int) -> Wire:
        """Return D values of 16 bits."""
        return Wire(values=length, num_bits=16, kind=self._dtype)


def _to_bfloat16(vector_D: Float32) -> Float32:
    """Return the nearest values whose lower 16 bits are zero, ties to even."""
    bits = vector_D.view(np.uint32)
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded &= np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _declare(_config: CastConfig, _masked: bool) -> Properties:
    return Properties(summable=False, shared_support=True, unbiased=False, downlink=True)


def _carries(config: CastConfig, _masked: bool) -> float | None:
    return _LIMITS[config.dtype][0] if config.dtype == "float16" else None


CODECS.register("cast")(
    CodecPlugin(config=CastConfig, build=Cast, declare=_declare, carries=_carries, instead="stochastic_quantizer")
)
