"""Banded Toeplitz matrices: sensitivity against brute force, inverse and error against linear algebra, optimality."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from privfed.errors import ConfigError
from privfed.privacy.toeplitz import (
    check_decreasing,
    inverse,
    optimised,
    prefix_error,
    sensitivity,
    square_root,
)


def matrix(c_B, rounds):
    """Return C [N, N]."""
    column_N = np.zeros(rounds)
    column_N[: min(rounds, len(c_B))] = c_B[:rounds]
    return toeplitz(column_N, np.zeros(rounds))


def patterns(rounds, most, apart):
    """Yield every set of at most ``most`` rounds that are pairwise at least ``apart`` apart."""
    for count in range(1, most + 1):
        for chosen in itertools.combinations(range(rounds), count):
            if all(b - a >= apart for a, b in itertools.pairwise(chosen)):
                yield list(chosen)


decreasing = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6).map(
    lambda ratios: np.cumprod(np.concatenate([[1.0], ratios]))
)


@settings(max_examples=150, deadline=None)
@given(c_B=decreasing, rounds=st.integers(1, 9), most=st.integers(1, 5), apart=st.integers(1, 5))
def test_the_sensitivity_is_that_of_the_worst_pattern(c_B, rounds, most, apart):
    C = matrix(c_B, rounds)
    worst = max(np.linalg.norm(C[:, chosen].sum(axis=1)) for chosen in patterns(rounds, most, apart))
    assert sensitivity(c_B, rounds, most, apart) == pytest.approx(worst, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(c_B=decreasing, seed=st.integers(0, 2**31), most=st.integers(1, 4), apart=st.integers(1, 4))
def test_no_contributions_of_norm_one_in_any_direction_move_the_output_further(c_B, seed, most, apart):
    C, rng = matrix(c_B, 8), np.random.default_rng(seed)
    largest = sensitivity(c_B, 8, most, apart)
    for chosen in patterns(8, most, apart):
        u = rng.standard_normal((len(chosen), 3))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        assert np.linalg.norm(C[:, chosen] @ u) <= largest * (1 + 1e-12)


def test_what_the_theorem_asks_for_is_needed():
    """With a negative or a growing coefficient the set 0, b, 2b is not the worst: such coefficients are refused."""
    for c_B in (np.array([1.0, -0.9]), np.array([1.0, 0.0, 1.0])):
        C = matrix(c_B, 5)
        worst = max(np.linalg.norm(C[:, p] @ np.array(s)) for p in patterns(5, 2, 1) for s in
                    itertools.product((-1, 1), repeat=len(p)))  # fmt: skip
        assert worst > np.linalg.norm(C[:, [0, 1]].sum(axis=1)) * 1.001
        with pytest.raises(ConfigError, match="decreasing"):
            sensitivity(c_B, 5, 2, 1)
    for c_B in ([], [0.0], [1.0, math.nan], [math.inf]):
        with pytest.raises(ConfigError, match="decreasing"):
            check_decreasing(np.array(c_B))
    with pytest.raises(ConfigError, match="at least one round"):
        sensitivity(np.array([1.0]), 5, 0, 1)


def test_disjoint_columns_by_hand():
    """Bands within the separation: sqrt(k) times the norm, but for the last columns, which rounds cut off."""
    c_B = np.array([2.0, 1.0, 1.0])  # norm sqrt(6)
    assert sensitivity(c_B, 12, 4, 3) == pytest.approx(math.sqrt(24))
    assert sensitivity(c_B, 10, 4, 3) == pytest.approx(math.sqrt(18 + 4))
    assert sensitivity(c_B, 12, 4, 2) > math.sqrt(24)  # neighbours overlap


@settings(max_examples=60, deadline=None)
@given(c_B=decreasing, rounds=st.integers(1, 30))
def test_inverse_and_error_are_the_matrices(c_B, rounds):
    inv = np.linalg.inv(matrix(c_B, rounds))
    np.testing.assert_allclose(inverse(c_B, rounds), inv[:, 0], atol=1e-9 * np.abs(inv).max())
    A = np.tril(np.ones((rounds, rounds)))
    expected = np.linalg.norm(A @ inv) / math.sqrt(rounds)
    assert prefix_error(c_B, rounds) == pytest.approx(expected, rel=1e-9)


def test_the_square_root_is_one():
    """With all bands C C is the prefix-sum matrix, up to the scale."""
    c_N = square_root(12)
    assert np.linalg.norm(c_N) == pytest.approx(1.0)
    C = matrix(c_N / c_N[0], 12)
    np.testing.assert_allclose(C @ C, np.tril(np.ones((12, 12))), atol=1e-12)
    assert (c_N / c_N[0])[:4] == pytest.approx([1, 1 / 2, 3 / 8, 5 / 16])


@pytest.mark.parametrize("bands", [1, 2, 3, 8, 16])
def test_the_optimum_is_sound_and_no_worse_than_the_closed_form(bands):
    c_B = np.array(optimised(bands, 64, 4, 16))
    check_decreasing(c_B)
    assert len(c_B) == bands
    assert np.linalg.norm(c_B) == pytest.approx(1.0, abs=1e-12)

    def loss(found_B):
        return prefix_error(found_B, 64) * sensitivity(found_B, 64, 4, 16)

    assert loss(c_B) <= loss(square_root(bands)) * (1 + 1e-5)
    if bands > 1:
        assert loss(c_B) < loss(np.array(optimised(1, 64, 4, 16))) * 0.9  # correlation pays


def test_the_optimum_of_two_bands_is_the_one_of_a_grid():
    grid = [np.array([1.0, r]) / math.hypot(1, r) for r in np.linspace(0, 1, 2001)]
    best = min(prefix_error(c_B, 50) for c_B in grid)
    assert prefix_error(np.array(optimised(2, 50, 1, 50)), 50) == pytest.approx(best, rel=1e-5)
