"""Arithmetic in the ring Z_2^32, in place.

Masks and vectors live in the integers modulo a power of two, where adding a uniform mask hides a value
perfectly and where the processor's own overflow is the reduction. Only 32 bits are supported so far.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
section 4 (masking in Z_R, for an R that all parties share).

Shape legend: M values of a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError, SecAggError

UInt32 = NDArray[np.uint32]
RING_BITS = (32,)
"""The ring sizes, in bits, that this version supports."""
VALUE_BYTES = 4
"""Bytes of one value on the wire."""


def check_ring_bits(ring_bits: int) -> None:
    """Refuse a ring that this version cannot compute in.

    Raises:
        ConfigError: If ``ring_bits`` is not in ``RING_BITS``.
    """
    if type(ring_bits) is not int or ring_bits not in RING_BITS:
        known = ", ".join(map(str, RING_BITS))
        raise ConfigError(f"Got ring_bits = {ring_bits!r}; secure aggregation supports {known}.")


def check_vector(values_M: Any, length: int) -> None:
    """Refuse anything but a flat uint32 array of exactly ``length`` values; nothing is converted silently.

    Raises:
        SecAggError: If the type, the dtype or the shape differs.
    """
    if not isinstance(values_M, np.ndarray) or values_M.dtype != np.uint32:
        kind = getattr(values_M, "dtype", type(values_M).__name__)
        raise SecAggError(f"Got values of type {kind}; encode them as a numpy uint32 array first.")
    if values_M.shape != (length,):
        raise SecAggError(f"Got values of shape {values_M.shape}; this session sums vectors of shape ({length},).")


def wrap(values_M: NDArray[np.integer[Any]]) -> UInt32:
    """Return integers of any width and sign reduced modulo 2^32, as a new uint32 array.

    Raises:
        SecAggError: If the values are not integers.
    """
    if not np.issubdtype(values_M.dtype, np.integer):
        raise SecAggError(f"Got values of dtype {values_M.dtype}; only integers have a residue modulo 2^32.")
    return values_M.astype(np.uint32)


def add_into(total_M: UInt32, values_M: UInt32) -> None:
    """Add ``values_M`` to ``total_M`` modulo 2^32, in place."""
    np.add(total_M, values_M, out=total_M)


def subtract_into(total_M: UInt32, values_M: UInt32) -> None:
    """Subtract ``values_M`` from ``total_M`` modulo 2^32, in place."""
    np.subtract(total_M, values_M, out=total_M)
