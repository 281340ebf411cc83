"""The randomised Hadamard rotation: spreads a vector's energy evenly, so that a smaller ring holds its sum.

x -> H S x / sqrt(M) with S a diagonal of random signs that all clients share and everybody may know, H Hadamard's
matrix, and M the next power of two. It is orthogonal: L2 norms, and with them the sensitivity, do not change.

Source: Suresh et al. 2017 (arXiv 1611.00429, section 3); Kairouz, Liu and Steinke 2021 (arXiv 2102.06387, section 4.2).

Shape legend: D values of a vector; M the next power of two.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from privfed.rng import PrivateStream

Float64 = NDArray[np.float64]
_FACTOR_BITS = 5


def padded_length(length: int) -> int:
    """Return M, the smallest power of two that is at least ``length``."""
    return 1 << max(0, length - 1).bit_length()


def rotate(values_D: Float64, seed: bytes) -> Float64:
    """Return the rotated vector [M]; ``seed`` is public and fixes the signs."""
    padded_M = np.zeros(padded_length(values_D.size))
    padded_M[: values_D.size] = values_D
    padded_M *= _signs(seed, padded_M.size)
    return _transform(padded_M)


def unrotate(values_M: Float64, length: int, seed: bytes) -> Float64:
    """Return the vector [D] of this ``length`` whose rotation under ``seed`` is ``values_M``."""
    return (_transform(values_M) * _signs(seed, values_M.size))[:length]


def _signs(seed: bytes, length: int) -> NDArray[np.int8]:
    """Return ``length`` signs, from a stream cipher keyed by the hash of ``seed``."""
    stream = PrivateStream(hashlib.sha256(b"privfed rotation" + seed).digest(), "signs")
    bits = np.unpackbits(stream.raw(-(-length // 8)), count=length)
    return np.int8(1) - np.int8(2) * bits.astype(np.int8)


def _transform(values_M: Float64) -> Float64:
    """Return H values / sqrt(M), by factors of H of up to 32 rows (H is their Kronecker product)."""
    bits, done = values_M.size.bit_length() - 1, 0
    result = values_M
    while done < bits:
        step = min(_FACTOR_BITS, bits - done)
        rows = 1 << step
        if done == 0:  # the last axis: one product of a tall matrix (H is symmetric)
            result = (result.reshape(-1, rows) @ _hadamard(step)).ravel()
        else:
            result = (_hadamard(step) @ result.reshape(-1, rows, 1 << done)).ravel()
        done += step
    return result / math.sqrt(values_M.size) if bits else result.copy()


@cache
def _hadamard(bits: int) -> Float64:
    matrix = np.ones((1, 1))
    for _ in range(bits):
        matrix = np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]]))
    return matrix
