"""Inversion of a cumulative table, exactly: as many random bits as it takes to tell two values apart.

A uniform number of 192 bits falls between two of the table's thresholds. Its first 16 bits, looked up in a guide
table, nearly always settle where; if not, 48 more are compared with the thresholds' first 64; and if even those
are equal to a threshold's (a tie: once in about 2^50 draws), the remaining 128 are drawn. The value returned is
the one that all 192 bits would have given, always.

Source: inversion with a guide table, Chen and Asau 1974; Devroye, "Non-Uniform Random Variate Generation" 1986,
section III.2.4; the lazy bits are those of Knuth and Yao 1976.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Context, Decimal
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError

TABLE_BITS = 192
GUIDE_BITS = 16
_HIGH_BITS = 64
_LOW_BYTES = (TABLE_BITS - _HIGH_BITS) // 8
_UNSETTLED = np.iinfo(np.int32).min
_context = Context(prec=120, Emin=-(10**9), Emax=10**9)

Int32 = NDArray[np.int32]


class RawStream(Protocol):
    """A source of random bytes, such as ``privfed.rng.PrivateStream``."""

    def raw(self, count: int) -> NDArray[np.uint8]:
        """Return the next ``count`` bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CumulativeTable:
    """The thresholds of a law on consecutive integers.

    Attributes:
        origin: The smallest value.
        thresholds: ``thresholds[i]`` is the probability of the first i + 1 values, rounded down to 192 bits.
        high: The first 64 bits of each.
        guide: For each 16-bit prefix the value it settles, or a mark where it settles none.
    """

    origin: int
    thresholds: tuple[int, ...] = field(repr=False)
    high: NDArray[np.uint64] = field(repr=False)
    guide: Int32 = field(repr=False)

    @property
    def statistical_distance(self) -> float:
        """A bound on the total-variation distance to the law of the weights: each threshold is off by 2^-192."""
        return (len(self.thresholds) + 1) * 2.0**-TABLE_BITS

    def draw(self, stream: RawStream, count: int) -> Int32:
        """Return ``count`` independent values, from 2 bytes each of ``stream`` and a few more for the unsettled."""
        prefixes = stream.raw(2 * count).view("<u2")
        values: Int32 = self.guide.take(prefixes)
        unsettled = np.flatnonzero(values == _UNSETTLED)
        if unsettled.size:
            values[unsettled] = self._settle(stream, prefixes[unsettled])
        return values

    def _settle(self, stream: RawStream, prefixes: NDArray[np.uint16]) -> Int32:
        """Return the values for prefixes that hold a threshold."""
        words = stream.raw(8 * prefixes.size).view("<u8")
        keys = (prefixes.astype(np.uint64) << np.uint64(_HIGH_BITS - GUIDE_BITS)) | (words >> np.uint64(GUIDE_BITS))
        found = np.searchsorted(self.high, keys, side="right")
        for tie in np.flatnonzero(self.high[np.maximum(found, 1) - 1] == keys):
            low = int.from_bytes(stream.raw(_LOW_BYTES).tobytes(), "big")
            found[tie] = bisect_right(self.thresholds, int(keys[tie]) << (TABLE_BITS - _HIGH_BITS) | low)
        return (found + self.origin).astype(np.int32)


def build_table(weights: Sequence[Decimal], origin: int) -> CumulativeTable:
    """Return the table of the law that gives ``origin + i`` a probability proportional to ``weights[i]``.

    Raises:
        ConfigError: If there are no weights, or one is negative.
    """
    if not weights or min(weights) < 0:
        raise ConfigError("Expected at least one weight, and none below 0, to build a table of noise.")
    sums = list(accumulate(weights, _context.add))
    unit = _context.divide(Decimal(2**TABLE_BITS), sums[-1])
    thresholds = tuple(int(_context.multiply(part, unit).to_integral_value(rounding=ROUND_FLOOR)) for part in sums[:-1])
    low_bits = TABLE_BITS - _HIGH_BITS
    return CumulativeTable(
        origin=origin,
        thresholds=thresholds,
        high=np.array([threshold >> low_bits for threshold in thresholds], dtype=np.uint64),
        guide=_guide(thresholds, origin),
    )


def _guide(thresholds: Sequence[int], origin: int) -> Int32:
    """Return the value that each prefix settles: thresholds below its smallest number, if none lies inside."""
    buckets, shift = 1 << GUIDE_BITS, TABLE_BITS - GUIDE_BITS
    first = [-(-threshold >> shift) for threshold in thresholds]  # the first prefix wholly at or above it
    last = [threshold >> shift for threshold in thresholds]  # the prefix that holds it
    at_least = np.cumsum(np.bincount(np.array(first, dtype=np.int64), minlength=buckets + 1))[:buckets]
    at_most = np.cumsum(np.bincount(np.array(last, dtype=np.int64), minlength=buckets))[:buckets]
    return np.where(at_least == at_most, at_least + origin, _UNSETTLED).astype(np.int32)
