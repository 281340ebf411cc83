"""Products of LoRA factors and their singular value decompositions, in float64.

Shape suffixes: M outputs, N inputs, R rank, S stacked rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privfed.rules import Contribution, Pair, Tensors
from privfed.types import Float32

Float64 = NDArray[np.float64]


def a_of(tensors: Tensors, pair: Pair) -> Float64:
    """Return A [R, N]."""
    a = tensors[pair.a]
    return a.reshape(a.shape[0], -1).astype(np.float64)


def b_of(tensors: Tensors, pair: Pair) -> Float64:
    """Return B [M, R], or B times what is between B and A."""
    b = tensors[pair.b]
    b_MR = b.reshape(b.shape[0], -1).astype(np.float64)
    return b_MR if pair.core is None else b_MR @ tensors[pair.core]


def product(tensors: Tensors, pair: Pair) -> Float64:
    """Return B A [M, N], without the scale."""
    return b_of(tensors, pair) @ a_of(tensors, pair)


def stacked(contributions: Sequence[Contribution], pair: Pair) -> tuple[Float64, Float64]:
    """Return B [M, S] and A [S, N] whose product is the sum of share * B_i A_i over the contributions."""
    b_MS = np.concatenate([each.share * b_of(each.tensors, pair) for each in contributions], axis=1)
    a_SN = np.concatenate([a_of(each.tensors, pair) for each in contributions], axis=0)
    return b_MS, a_SN


def best_factors(b_MS: Float64, a_SN: Float64, rank: int) -> tuple[Float64, Float64, Float64]:
    """Return (U [M, R], singular values [R], V^T [R, N]) of the best rank-R approximation of B A.

    By Eckart and Young 1936 it is the truncated decomposition. Where the stacked rank is small, two QR
    decompositions leave a small matrix to decompose. U and V have orthonormal columns even where B A has a lower
    rank, as long as R <= M and R <= N; else the decomposition is padded with zeros.
    """
    if b_MS.shape[1] < min(b_MS.shape[0], a_SN.shape[1]):
        left_MS, upper_SS = np.linalg.qr(b_MS)
        right_NS, lower_SS = np.linalg.qr(a_SN.T)
        u, values, vt = np.linalg.svd(upper_SS @ lower_SS.T)
        u, vt = left_MS @ u, vt @ right_NS.T
    else:
        u, values, vt = np.linalg.svd(b_MS @ a_SN, full_matrices=False)
    short = max(0, rank - len(values))
    u = np.pad(u[:, :rank], ((0, 0), (0, short)))
    vt = np.pad(vt[:rank], ((0, short), (0, 0)))
    return u, np.pad(values[:rank], (0, short)), vt


def shaped(values: Float64, like: Float32) -> Float32:
    """Return ``values`` in the shape and type of ``like``."""
    return np.ascontiguousarray(values.reshape(like.shape).astype(np.float32))


def weight_of(tensors: Tensors, pair: Pair) -> Float64:
    """Return the base weight as [M, N]."""
    weight = tensors[pair.weight].astype(np.float64)
    if pair.transposed:
        return weight.T
    return weight.reshape(weight.shape[0], -1)


def with_added(tensors: Tensors, pair: Pair, change_MN: Float64) -> Float32:
    """Return the base weight with ``scale * change`` added, in its own shape."""
    changed_MN = weight_of(tensors, pair) + pair.scale * change_MN
    return shaped(changed_MN.T if pair.transposed else changed_MN, tensors[pair.weight])
