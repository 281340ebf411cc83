"""One bit a value: +1 or -1, and sums of them.

Without a ring a bit that is set stands for -1; the server adds 1-bit integers (0 or -1), and n messages whose sum is s
hold n + 2 s. In a ring +1 and -1 are residues and add up as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfed.compression import Ring
from privfed.compression.fixed_point import from_ring
from privfed.types import EncodedSum


def signs(negative_M: NDArray[np.integer] | NDArray[np.bool_], ring: Ring | None) -> NDArray[np.uint32]:
    """Return the residues of -1 where ``negative_M`` is 1 or true, and of +1 elsewhere."""
    negative = negative_M.astype(np.uint32)
    if ring is None:
        return negative
    return (np.uint32(1) - np.uint32(2) * negative) & np.uint32((1 << ring.bits) - 1)


def sum_of_signs(encoded_sum: EncodedSum, ring: Ring | None) -> NDArray[np.float64]:
    """Return the sum of the signs of all survivors [M]."""
    if ring is None:
        return encoded_sum.survivors + 2.0 * encoded_sum.sum_M.astype(np.float64)
    return from_ring(encoded_sum.sum_M.astype(np.uint64, copy=False), ring.bits).astype(np.float64)
