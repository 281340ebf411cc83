"""The rotation: the same in both types, its own inverse but for signs, and never longer than it says.

Shape suffix: M values of a rotated vector.
"""

from __future__ import annotations

import numpy as np
import pytest

from privfed.hadamard import _transform, padded_length, rotate, rounding, unrotate


@pytest.mark.parametrize("bits", range(11))
def test_the_transform_is_hadamards_matrix(bits: int) -> None:
    wanted = np.ones((1, 1))
    for _ in range(bits):
        wanted = np.kron(wanted, [[1.0, 1.0], [1.0, -1.0]])
    found = np.array([_transform(row) for row in np.eye(1 << bits)])
    np.testing.assert_allclose(found, wanted / 2 ** (bits / 2), atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 383, 5000])
def test_vectors_keep_their_type_and_come_back(length: int) -> None:
    values_D = np.random.default_rng(length).standard_normal(length)
    exact = rotate(values_D, b"seed")
    assert exact.shape == (padded_length(length),) and exact.dtype == np.float64
    np.testing.assert_allclose(unrotate(exact, length, b"seed"), values_D, atol=1e-12)
    short = rotate(values_D.astype(np.float32), b"seed")
    assert short.dtype == np.float32
    np.testing.assert_allclose(short, exact, atol=2e-6)
    assert unrotate(short, length, b"seed").dtype == np.float32


def test_a_rotation_in_float32_is_no_longer_than_it_says() -> None:
    draw, longest = np.random.default_rng(3), 0.0
    for number in range(600):
        length = int(draw.integers(1, 3000))
        kind = (draw.standard_normal(length), draw.standard_cauchy(length), np.full(length, draw.uniform(0.3, 3)))
        values_D = (10.0 ** draw.uniform(-6, 6) * kind[number % 3]).astype(np.float32)
        before = float(np.linalg.norm(values_D.astype(np.float64)))
        after = float(np.linalg.norm(rotate(values_D, bytes([number % 256])).astype(np.float64)))
        gained = (after / before - 1) / 2.0**-23
        longest = max(longest, gained)
        assert gained <= rounding(length)
    assert longest > 0.1  # it does gain: exactly orthogonal is what float32 is not
