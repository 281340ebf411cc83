"""Fast samplers of integer noise from a cryptographic stream, exact to a stated distance.

Up to a standard deviation of ``DIRECT_DEVIATION`` a sample is one inversion of the law's cumulative table. Beyond,
the table would no longer fit the cache: the integers are cut into blocks of a power of two, the table gives the
block with probability proportional to (width of the block) * (largest probability in it), the place within is
uniform, and the value y is kept with probability P(y) / (largest in its block), which is above 0.98 on average.
Rejection changes nothing about the law. The comparison of that ratio with a uniform number is exact as well: a
bound settles it for nearly all, double precision with a margin for the rest, and 45 digits inside the margin.

No step takes a time that depends only on public values: a sampler that must resist a local timing attacker needs
more than this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.privacy.discrete.laws import CUT_TAIL, EXPANSION_FROM, Law, LawName
from privfed.privacy.discrete.tables import CumulativeTable, Int32, RawStream, build_table

DIRECT_DEVIATION = EXPANSION_FROM**0.5
BLOCKS_PER_DEVIATION = 64
ARITHMETIC_DISTANCE = 2.0**-140
"""A bound on the distance due to decimal arithmetic (at least 45 digits, so 2^-149) and to thresholds."""
LARGEST_DISTANCE = CUT_TAIL + ARITHMETIC_DISTANCE
"""A bound on every sampler's ``statistical_distance``."""
CHUNK = 1 << 15
"""Samples worked on at a time, so that the temporaries stay in the cache; part of the stream's format."""
_MARGIN = 2.0**-30
_context = Context(prec=60, Emin=-(10**9), Emax=10**9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Draws independent integers of one law.

    Attributes:
        law: The law.
        table: Of the values, or of the blocks.
        width: Values in a block; 1 where the table is of values.
        surely_kept: For each block, the 16-bit numbers below which every value of it is kept.
    """

    law: Law
    table: CumulativeTable
    width: int
    surely_kept: NDArray[np.uint32] = field(repr=False)

    @property
    def tail_delta(self) -> float:
        """The probability that an exact sample lies beyond the cut, to be charged to delta for each sample."""
        return self.law.tail

    @property
    def statistical_distance(self) -> float:
        """A bound on the total-variation distance of one sample to the exact law (under a truly random stream)."""
        return self.law.tail + ARITHMETIC_DISTANCE

    def draw(self, stream: RawStream, count: int) -> Int32:
        """Return ``count`` independent values.

        Raises:
            ConfigError: If ``count`` is negative.
        """
        if count < 0:
            raise ConfigError(f"Expected to draw at least 0 values, got {count}.")
        values = np.empty(count, dtype=np.int32)
        one = self.table.draw if self.width == 1 else self._draw_blocks
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            values[start:stop] = one(stream, stop - start)
        return values

    def _draw_blocks(self, stream: RawStream, count: int) -> Int32:
        values, kept = self._propose(stream, count)
        while not kept.all():
            missing = np.flatnonzero(~kept)
            values[missing], kept[missing] = self._propose(stream, missing.size)
        return values

    def _propose(self, stream: RawStream, count: int) -> tuple[Int32, NDArray[np.bool_]]:
        """Return ``count`` values and which of them are kept."""
        blocks = self.table.draw(stream, count)
        places = stream.raw(2 * count).view("<u2") & np.uint16(self.width - 1)
        values: Int32 = blocks * np.int32(self.width) + places
        levels = stream.raw(2 * count).view("<u2")
        kept = levels < self.surely_kept.take(blocks - self.table.origin)
        open_ = np.flatnonzero(~kept)
        if open_.size:
            kept[open_] = self._decide(stream, values[open_], blocks[open_], levels[open_])
        return values, kept

    def _decide(self, stream: RawStream, values: Int32, blocks: Int32, levels: NDArray[np.uint16]) -> NDArray[np.bool_]:
        """Tell whether a uniform number that starts with ``levels`` is below P(value) / P(innermost of its block)."""
        inner = _innermost(blocks.astype(np.int64), self.width)
        ratios = np.exp(self.law.log_ratio(values.astype(np.int64), inner))
        words = (levels.astype(np.uint64) << np.uint64(32)) | stream.raw(4 * values.size).view("<u4")
        uniform = words.astype(np.float64) * 2.0**-48
        kept: NDArray[np.bool_] = uniform < ratios
        for close in np.flatnonzero(np.abs(uniform - ratios) < _MARGIN):
            digits = int(words[close]) << 128 | int.from_bytes(stream.raw(16).tobytes(), "big")
            kept[close] = self._exactly_below(digits, int(values[close]), int(inner[close]))
        return kept

    def _exactly_below(self, digits: int, value: int, inner: int) -> bool:
        """Compare a uniform number of 176 bits with P(value) / P(inner)."""
        return Decimal(digits) < _context.multiply(_ratio(self.law, value, inner), Decimal(2**176))


@lru_cache(maxsize=32)
def make_sampler(name: LawName, variance: float) -> Sampler:
    """Return the sampler of a law; kept for the next call.

    Args:
        name: ``"skellam"`` or ``"discrete_gaussian"``.
        variance: In integer steps squared; for the discrete Gaussian the parameter sigma^2.

    Raises:
        ConfigError: If the name is unknown or the variance is out of range.
    """
    law = Law(name, variance)
    if law.variance <= DIRECT_DEVIATION**2:
        half = law.half_weights()
        table = build_table([*reversed(half[1:]), *half], -law.cut)
        return Sampler(law=law, table=table, width=1, surely_kept=np.empty(0, dtype=np.uint32))
    return _block_sampler(law)


def skellam(variance: float) -> Sampler:
    """Return the sampler of Skellam noise of this ``variance`` (the difference of two Poissons of half of it)."""
    return make_sampler("skellam", variance)


def discrete_gaussian(variance: float) -> Sampler:
    """Return the sampler of the discrete Gaussian of parameter sigma^2 = ``variance``."""
    return make_sampler("discrete_gaussian", variance)


def _block_sampler(law: Law) -> Sampler:
    width = 1 << int(np.log2(law.variance**0.5 / BLOCKS_PER_DEVIATION))
    reach = -(-(law.cut + 1) // width)
    blocks = np.arange(-reach, reach)
    inner = _innermost(blocks, width)
    outer = np.where(blocks < 0, blocks * width, blocks * width + width - 1)
    centre = law.exact_log_weight(0)
    weights = [_context.exp(_context.subtract(law.exact_log_weight(int(y)), centre)) for y in inner]
    least_ratio = np.exp(law.log_ratio(outer, inner)) - _MARGIN
    return Sampler(
        law=law,
        table=build_table(weights, -reach),
        width=width,
        surely_kept=np.floor(np.maximum(least_ratio, 0) * 2**16).astype(np.uint32),
    )


def _innermost(blocks: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Return each block's value nearest to 0, which is its most likely."""
    return np.where(blocks < 0, blocks * width + width - 1, blocks * width)


def _ratio(law: Law, value: int, inner: int) -> Decimal:
    return _context.exp(_context.subtract(law.exact_log_weight(value), law.exact_log_weight(inner)))
