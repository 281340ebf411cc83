"""Which parts of a flat vector are matrices worth factoring, for codecs of low rank.

A tensor [rows, ...] counts as a matrix [rows, rest]. It is factored where rank * (rows + columns) values are fewer than
its own; other tensors are sent as they are.

Shape suffixes: D values of a vector, M values of all factors and of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfed.compression import RoundContext
from privfed.errors import ConfigError

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix [rows, columns] that lies in a vector from ``start`` on, and the rank it is sent with."""

    start: int
    rows: int
    columns: int
    rank: int

    def of(self, vector_D: NDArray[np.floating]) -> Float64:
        """Return the matrix."""
        size = self.rows * self.columns
        return vector_D[self.start : self.start + size].reshape(self.rows, self.columns).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The matrices of a vector, and the positions [start, end) of what is not in one."""

    matrices: tuple[Matrix, ...]
    rest: tuple[tuple[int, int], ...]
    length: int

    @property
    def left(self) -> int:
        """Number of values of all left factors, [rows, rank] each."""
        return sum(m.rows * m.rank for m in self.matrices)

    @property
    def right(self) -> int:
        """Number of values of all right factors, [columns, rank] each."""
        return sum(m.columns * m.rank for m in self.matrices)

    @property
    def plain(self) -> int:
        """Number of values that are sent as they are."""
        return sum(end - start for start, end in self.rest)

    def take_rest(self, vector_D: NDArray[np.floating]) -> Float64:
        """Return the values that are in no matrix."""
        parts = [vector_D[start:end] for start, end in self.rest]
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)

    def lefts(self, flat_M: Float64) -> list[Float64]:
        """Return the left factors that lie in ``flat_M`` one after the other."""
        return _split(flat_M, [(m.rows, m.rank) for m in self.matrices])

    def rights(self, flat_M: Float64) -> list[Float64]:
        """Return the right factors that lie in ``flat_M`` one after the other."""
        return _split(flat_M, [(m.columns, m.rank) for m in self.matrices])

    def assembled(self, products: Sequence[Float64], rest: Float64) -> Float64:
        """Return the vector [D] of these matrices and values."""
        vector_D, at = np.empty(self.length), 0
        for matrix, product in zip(self.matrices, products, strict=True):
            vector_D[matrix.start : matrix.start + product.size] = product.ravel()
        for start, end in self.rest:
            vector_D[start:end] = rest[at : at + end - start]
            at += end - start
        return vector_D


def blocks_of(context: RoundContext, length: int, rank: int) -> Blocks:
    """Return how a vector of the round's shapes is cut up.

    Raises:
        ConfigError: If the shapes do not add up to ``length``.
    """
    if sum(math.prod(shape) for shape in context.shapes) != length:
        raise ConfigError(
            f"The round's shapes {context.shapes} hold {sum(math.prod(s) for s in context.shapes)} values and the "
            f"vector {length}: give the codec the shapes of the tensors that are sent."
        )
    matrices, rest, start = [], [], 0
    for shape in context.shapes:
        size = math.prod(shape)
        rows, columns = (shape[0], size // shape[0]) if len(shape) > 1 and size else (1, size)
        used = min(rank, rows, columns)
        if used * (rows + columns) < size:
            matrices.append(Matrix(start=start, rows=rows, columns=columns, rank=used))
        elif size:
            rest.append((start, start + size))
        start += size
    return Blocks(matrices=tuple(matrices), rest=tuple(rest), length=length)


def concatenated(parts: Sequence[Float64]) -> Float64:
    """Return the parts one after the other, flat."""
    return np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0)


def _split(flat_M: Float64, shapes: Sequence[tuple[int, int]]) -> list[Float64]:
    found, at = [], 0
    for rows, columns in shapes:
        found.append(flat_M[at : at + rows * columns].reshape(rows, columns))
        at += rows * columns
    return found
