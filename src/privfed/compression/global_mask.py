"""Values of one mask that the server chose from its noised aggregate, so that all clients send the same positions.

Every ``refresh`` rounds all values travel; the server keeps the positions of the largest ones of that round's decoded
(and, where there is privacy, noised) mean, tells the clients, and until the next such round only those travel.

PruneFL (Jiang et al. 2022, arXiv 1909.12326: the mask is adapted from aggregated gradients at some rounds); FLASC (Kuo
et al. 2024, arXiv 2406.05233: sparse communication of dense adapters). Choosing the mask from what was already released
costs no privacy.

Shape suffixes: D values of an update, K values in the mask.
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
    Ring,
    RoundContext,
    inner_carries,
    inner_ring_bits,
    plain_inner,
)
from privfed.compression.fixed_point import check_finite
from privfed.compression.nested import Nested, kept, led_properties
from privfed.compression.top_k import largest
from privfed.errors import ProtocolError
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, Float32

MASK, AGE = "mask", "age"


class GlobalMaskConfig(Table):
    """Options.

    Attributes:
        density: Share of the values in the mask.
        refresh: A round in which all values travel comes every so many rounds, and is the first.
        inner: How the values that remain are encoded.
    """

    name: Literal["global_mask"] = "global_mask"
    density: float = Field(default=0.1, gt=0, le=1)
    refresh: int = Field(default=10, ge=2)
    inner: Inner = Field(default_factory=plain_inner)


class GlobalMask(Nested):
    """Sends the values at the server's positions, or all of them in a round without a mask.

    ``l2_bound``: leaving values out never makes a vector longer, so the nested codec gets values of norm at most
    ``bound``; of the two kinds of rounds the bound holds for the one this codec is bound to (before ``at``: for the
    round of all values, whose bound is the larger one).
    """

    name = "global_mask"

    def __init__(self, config: GlobalMaskConfig, ring: Ring | None, context: RoundContext | None = None) -> None:
        self._found: dict[int, NDArray[np.int64]] = {}
        super().__init__(config, ring, context)

    @staticmethod
    def declared(config: GlobalMaskConfig, masked: bool) -> Properties:
        """Return what is true of it."""
        return led_properties(config, masked)

    def values(self, length: int) -> int:
        """Return K, or D in a round without a mask."""
        mask_K = self._mask(length)
        return length if mask_K is None else len(mask_K)

    def l2_bound(self, bound: float, length: int) -> float | None:
        """Return the bound; see the class."""
        return self.inner_bound(bound, length)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message.

        Raises:
            ClientError: If a value of the whole update is not finite.
            ConfigError: If the round is missing.
            ProtocolError: If the mask is not one of this vector.
        """
        self.context()
        check_finite(vector_D)
        mask_K = self._mask(len(vector_D))
        return self.inner_encode(vector_D if mask_K is None else vector_D[mask_K], len(vector_D), stream)

    def start_state(self, length: int) -> CodecState:  # noqa: ARG002
        """Return no mask: the first round sends everything."""
        return {MASK: np.zeros(0, dtype=np.uint8), AGE: np.zeros(1, dtype=np.int64)}

    def expand(
        self, mean_M: NDArray[np.float64], state: CodecState, length: int
    ) -> tuple[NDArray[np.float64], CodecState]:
        """Return the values in their places [D] and, after a round of all values, the mask for the next ones."""
        values = self.inner_expand(mean_M, length)
        mask_K = self._mask(length)
        age = int(state[AGE][0]) + 1
        if mask_K is None:
            vector_D = values
            flags_D = np.zeros(length, dtype=np.uint8)
            flags_D[largest(np.abs(vector_D), kept(self._config.density, length))] = 1
            mask, age = np.packbits(flags_D, bitorder="little"), 1
        else:
            vector_D, mask = np.zeros(length), state[MASK]
            vector_D[mask_K] = values
        if age >= self._config.refresh:
            mask, age = np.zeros(0, dtype=np.uint8), 0
        return vector_D, {MASK: mask, AGE: np.array([age], dtype=np.int64)}

    def public_state(self, state: CodecState) -> CodecState:
        """Return the mask, one bit a value; empty before a round of all values."""
        return {MASK: state[MASK]}

    def _mask(self, length: int) -> NDArray[np.int64] | None:
        """Return the positions [K] in the mask, ascending, or None without one."""
        packed = None if self._context is None else self._context.carried.get(MASK)
        if packed is None or not packed.size:
            return None
        if packed.dtype != np.uint8 or packed.shape != (-(-length // 8),):
            raise ProtocolError(f"The mask has {packed.size} bytes, expected {-(-length // 8)} for {length} values.")
        if length not in self._found:
            self._found[length] = np.flatnonzero(np.unpackbits(packed, count=length, bitorder="little"))
        return self._found[length]


CODECS.register("global_mask")(
    CodecPlugin(
        config=GlobalMaskConfig,
        build=GlobalMask,
        declare=GlobalMask.declared,
        ring_bits=inner_ring_bits,
        carries=inner_carries,
    )
)
