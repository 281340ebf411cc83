"""The randomised Hadamard rotation: spreads a vector's energy evenly, so that a smaller ring holds its sum.

x -> H S x / sqrt(M) with S a diagonal of random signs that all clients share and everybody may know, H Hadamard's
matrix, and M the next power of two. It is orthogonal: L2 norms, and with them the sensitivity, do not change.

Vectors keep their type. In float32 the transform takes a quarter of the time of float64, and lengthens a vector by no
more than :func:`rounding` says.

Source: Suresh et al. 2017 (arXiv 1611.00429, section 3); Kairouz, Liu and Steinke 2021 (arXiv 2102.06387, section 4.2).

Shape legend: D values of a vector; M the next power of two.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from privfed.rng import PrivateStream

T = TypeVar("T", NDArray[np.float64], NDArray[np.float32])
_FACTOR_BITS = 3  # products with 8 rows keep up with the memory; larger ones do more work for each value


def padded_length(length: int) -> int:
    """Return M, the smallest power of two that is at least ``length``."""
    return 1 << max(0, length - 1).bit_length()


def rotate(values_D: T, seed: bytes) -> T:
    """Return the rotated vector [M]; ``seed`` is public and fixes the signs."""
    padded_M = np.zeros(padded_length(values_D.size), dtype=values_D.dtype)
    padded_M[: values_D.size] = values_D
    padded_M *= _signs(seed, padded_M.size)
    return cast(T, _transform(padded_M))


def unrotate(values_M: T, length: int, seed: bytes) -> T:
    """Return the vector [D] of this ``length`` whose rotation under ``seed`` is ``values_M``."""
    turned_M = _transform(values_M.copy())
    turned_M *= _signs(seed, values_M.size)
    return cast(T, turned_M[:length])


def rounding(length: int) -> float:
    """Return how many times 2^-23 of its length a vector of ``length`` values may gain by a rotation in float32.

    A factor of r = 8 rows adds up r values, in any order: each result is off by less than 1.01 r 2^-24 times the sum of
    their magnitudes (Higham 2002, section 3.1), which is at most sqrt(r) times their norm. Over the r results that is
    1.01 r 2^-24 times r times the norm, beside results of sqrt(r) times the norm: a share of 1.01 r sqrt(r) 2^-24, less
    than 11.5 times 2^-23. The last product and its constant add one more.
    """
    stages = -(-(padded_length(length).bit_length() - 1) // _FACTOR_BITS)
    return 11.5 * stages + 1.5


def _signs(seed: bytes, length: int) -> NDArray[np.int8]:
    """Return ``length`` signs, from a stream cipher keyed by the hash of ``seed``."""
    stream = PrivateStream(hashlib.sha256(b"privfed rotation" + seed).digest(), "signs")
    bits = np.unpackbits(stream.raw(-(-length // 8)), count=length)
    signs = bits.view(np.int8)
    np.left_shift(signs, 1, out=signs)
    return np.subtract(np.int8(1), signs, out=signs)


def _transform(values_M: Any) -> Any:
    """Return H values / sqrt(M), by factors of H of up to 8 rows (H is their Kronecker product).

    Overwrites ``values_M``. It goes back and forth between two vectors: fresh memory costs as much as a factor does.
    """
    bits, source, target = values_M.size.bit_length() - 1, values_M, np.empty_like(values_M)
    for done in range(0, bits, _FACTOR_BITS):
        step = min(_FACTOR_BITS, bits - done)
        factor, rows = _hadamard(step, values_M.dtype.char), 1 << step
        if done == 0:  # the last axis: one product of a tall matrix (H is symmetric)
            np.matmul(source.reshape(-1, rows), factor, out=target.reshape(-1, rows))
        else:
            shape = (-1, rows, 1 << done)
            np.matmul(factor, source.reshape(shape), out=target.reshape(shape))
        source, target = target, source
    source *= values_M.dtype.type(1 / math.sqrt(values_M.size))
    return source


@cache
def _hadamard(bits: int, kind: str) -> Any:
    """Return Hadamard's matrix of 2^bits rows in a type of numpy."""
    matrix = np.ones((1, 1), dtype=kind)
    for _ in range(bits):
        matrix = np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]], dtype=kind))
    return matrix
