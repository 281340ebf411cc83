"""Codecs, one file each: how an update becomes a message, and what stays true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from privfed.registry import Registry
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """What a masked sum leaves room for.

    Attributes:
        bits: Ring size; sums are taken modulo 2^bits.
        clients: At most so many encodings are added.
    """

    bits: int
    clients: int


class Codec(Protocol):
    """A codec for one layout and one ring (or none)."""

    summable: bool
    unbiased: bool
    shared_support: bool

    def l2_bound(self, bound: float, length: int) -> float | None:
        """Return a bound on the norm of decode(encode(x)) for every x of norm <= bound, or None."""

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message for ``vector_D``."""

    def decode_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the sum of the encoded vectors [D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecPlugin:
    """A codec's table and its builder; ``ring`` is None where updates are not masked.

    Attributes:
        ring_bits: The ring that ``secagg.ring_bits = "auto"`` takes for this table and so many clients.
    """

    config: type[Table]
    build: Callable[[Any, Ring | None], Codec]
    ring_bits: Callable[[Any, int], int] = lambda _config, _clients: 32


CODECS: Registry[CodecPlugin] = Registry("codec", "privfed.compression")
