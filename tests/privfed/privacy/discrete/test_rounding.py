"""Projection, rounding, rotation and the ring: norms kept, no bias, nothing lost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from privfed_noise_checks import SIGNIFICANCE, stream
from scipy import stats
from scipy.linalg import hadamard

from privfed.errors import ClientError, ConfigError
from privfed.hadamard import _transform, padded_length, rotate, unrotate
from privfed.privacy.discrete.rounding import (
    conditional_round,
    project,
    squared_norm,
    stochastic_round,
    unwrap,
    wrap,
)
from privfed.privacy.discrete.sampler import skellam
from privfed.privacy.discrete.sensitivity import (
    overflow_bound,
    recommended_scale,
    rounded_l1,
    rounded_l2_squared,
    smallest_ring,
)

VECTORS = st.lists(st.floats(-100, 100), min_size=1, max_size=40).map(np.array)


# projection


@given(VECTORS, VECTORS, st.floats(0.01, 200))
def test_projection_keeps_to_the_ball_and_moves_no_two_vectors_apart(first, second, norm):
    size = min(first.size, second.size)
    first, second = first[:size], second[:size]
    a, b = project(first, norm), project(second, norm)
    assert np.linalg.norm(a) <= norm * (1 + 1e-12)
    assert np.linalg.norm(a - b) <= np.linalg.norm(first - second) * (1 + 1e-9) + 1e-12
    if np.linalg.norm(first) <= norm:
        assert np.array_equal(a, first)


def test_values_that_are_not_finite_are_refused():
    for bad in (np.nan, np.inf):
        with pytest.raises(ClientError, match="not finite"):
            project(np.array([1.0, bad]), 1.0)
        with pytest.raises(ClientError, match="does not fit 31 bits"):
            stochastic_round(np.array([bad]), stream("bad"))


# rounding


def test_rounding_is_to_a_neighbour_without_bias():
    values = np.array([-2.75, -0.1, 0.0, 0.3, 5.5, 7.0])
    count = 100_000
    drawn = stochastic_round(np.tile(values, count), stream("unbiased")).reshape(count, -1)
    assert (np.abs(drawn - values) < 1).all()
    for column, value in zip(drawn.T, values, strict=True):
        ups = int((column > math.floor(value)).sum())
        fraction = value - math.floor(value)
        assert stats.binomtest(ups, count, fraction).pvalue > SIGNIFICANCE
        if 0 < fraction < 1:
            assert stats.binomtest(ups, count, min(1, fraction + 0.02)).pvalue < SIGNIFICANCE


@pytest.mark.parametrize(("length", "norm", "beta"), [(50, 5.0, 0.3), (50, 0.0, 0.1), (400, 100.0, 0.01)])
def test_the_norm_passes_its_likely_bound_no_more_often_than_beta(length, norm, beta):
    values = np.full(length, 0.5)  # half-way: rounding is at its noisiest
    if norm:
        values[: length // 2] += np.round(norm / math.sqrt(length / 2))
    l2 = float(np.linalg.norm(values))
    bound = l2**2 + length / 4 + math.sqrt(-2 * math.log(beta)) * (l2 + math.sqrt(length) / 2)
    assert rounded_l2_squared(l2, length, beta) == math.floor(min(bound, (l2 + math.sqrt(length)) ** 2))
    norms = [squared_norm(stochastic_round(values, stream("norm", i))) for i in range(2000)]
    passed = sum(norm > bound for norm in norms)
    assert stats.binomtest(passed, 2000, beta, alternative="greater").pvalue > SIGNIFICANCE
    assert np.mean(norms) == pytest.approx(l2**2 + length / 4, rel=0.02)  # the bound's first terms are what happens
    assert max(norms) <= rounded_l2_squared(l2, length, 0.0)


@given(VECTORS, st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_conditional_rounding_is_always_within_its_bound(values, name):
    l2 = float(np.linalg.norm(values)) + 0.1
    bound = rounded_l2_squared(l2, values.size, 0.6)
    rounded, draws = conditional_round(values, bound, stream("conditional", name))
    assert squared_norm(rounded) <= bound and draws >= 1
    assert (np.abs(rounded - values) < 1).all()
    assert np.abs(rounded).sum() <= rounded_l1(bound, values.size) + 1e-9


def test_conditional_rounding_repeats_until_it_is_within():
    values = np.full(200, 0.5)
    _, draws = zip(*(conditional_round(values, 100, stream("repeat", i)) for i in range(200)), strict=True)
    assert min(draws) == 1 and 1.5 < np.mean(draws) < 2.5  # a bound at the median


def test_a_vector_beyond_its_clip_norm_is_refused():
    with pytest.raises(ClientError, match=r"None of 64 roundings .* clip the vector"):
        conditional_round(np.full(100, 3.0), rounded_l2_squared(10.0, 100, 0.5), stream("long"))


def test_what_one_unit_moves_a_rounded_sum_by_is_distributed_as_its_own_rounding():
    """The claim that example-level sensitivity rests on: same random bits, with and without the unit."""
    generator = np.random.default_rng(0)
    count = 200_000
    for unit in (0.3, -1.8, 4.0, 0.999):
        others = generator.normal(scale=30, size=count)
        with_unit = stochastic_round(others + unit, stream("coupled", unit))
        moved = with_unit - stochastic_round(others, stream("coupled", unit))
        assert set(np.unique(moved)) <= {math.floor(unit), math.floor(unit) + 1}
        ups = int((moved > math.floor(unit)).sum())
        assert stats.binomtest(ups, count, unit - math.floor(unit)).pvalue > SIGNIFICANCE
    apart = stochastic_round(others + unit, stream("other bits")) - stochastic_round(others, stream("coupled", unit))
    assert len(np.unique(apart)) > 2  # fresh bits would move it further


def test_squared_norms_are_exact_where_64_bits_are_too_few():
    values = np.full(5, 2**31 - 1, dtype=np.int64)
    assert squared_norm(values) == 5 * (2**31 - 1) ** 2 > 2**63
    assert squared_norm(np.array([], dtype=np.int64)) == 0


# rotation


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 100, 1024, 5000])
def test_rotation_is_orthogonal_and_undone(length):
    values = np.random.default_rng(length).normal(size=length)
    rotated = rotate(values, b"round 1")
    assert rotated.size == padded_length(length) and rotated.size < 2 * length
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(values))
    assert unrotate(rotated, length, b"round 1") == pytest.approx(values)
    if length > 16:
        assert unrotate(rotated, length, b"round 2") != pytest.approx(values)


@pytest.mark.parametrize("size", [1, 2, 32, 64, 512])
def test_the_transform_is_hadamards(size):
    values = np.random.default_rng(size).normal(size=size)
    assert _transform(values.copy()) == pytest.approx(hadamard(size) @ values / math.sqrt(size))


def test_rotation_spreads_a_spike():
    spike = np.zeros(4096)
    spike[7] = 1.0
    assert np.abs(rotate(spike, b"s")).max() == pytest.approx(1 / 64)
    rotated = rotate(np.ones(4096), b"s")
    assert np.abs(rotated).max() < 6  # a constant vector would go into one value without the signs


# ring


@given(st.integers(2, 32), st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=50))
def test_residues_add_up_and_come_back(bits, values):
    array = np.array(values, dtype=np.int64)
    residues = wrap(array, bits)
    assert residues.dtype == np.uint32 and int(residues.max()) < 2**bits
    half = 2 ** (bits - 1)
    inside = (array >= -half) & (array < half)
    assert np.array_equal(unwrap(residues, bits)[inside], array[inside])
    total = (residues.astype(np.uint64).sum() % np.uint64(2**bits)).reshape(1)
    assert int(unwrap(total, bits)[0]) == (sum(values) + half) % 2**bits - half


@pytest.mark.parametrize("rotated", [False, True])
def test_values_leave_the_ring_no_more_often_than_stated(rotated):
    length, clients, norm, variance, trials = 256, 5, 60.0, 30.0, 400
    spike = np.zeros(length)
    spike[0] = norm
    seen = {}
    for bits in (8, 9, 10):
        bound = overflow_bound(
            clients=clients, contribution=norm, variance=variance, noise="skellam", length=length, ring_bits=bits,
            rotated=rotated,
        )  # fmt: skip
        left = 0
        for trial in range(trials):
            signal = rotate(spike, str(trial).encode()) if rotated else spike
            draws = stochastic_round(np.tile(signal, clients), stream("overflow", trial))
            total = draws.reshape(clients, -1).sum(axis=0) + skellam(variance).draw(stream("noise", trial), length)
            left += bool(((total < -(2 ** (bits - 1))) | (total >= 2 ** (bits - 1))).any())
        seen[bits] = (left / trials, bound)
        assert stats.binomtest(left, trials, bound, alternative="greater").pvalue > SIGNIFICANCE
    assert seen[10][1] < 1e-6
    assert seen[8][0] == (0 if rotated else 1)  # a spike of 300 does not fit 8 bits unless it is spread


def test_the_overflow_bound_follows_the_noise():
    """With the signal out of the way: within two orders of the truth, and broken by twice the variance."""

    def bound(variance, bits, noise="skellam"):
        return overflow_bound(
            clients=1, contribution=1e-3, variance=variance, noise=noise, length=1, ring_bits=bits, rotated=False
        )

    truth = 2 * stats.skellam.sf(127, 450, 450)
    assert truth < bound(900.0, 8) < 100 * truth
    assert bound(900.0, 8) < 2 * stats.skellam.sf(127, 900, 900)
    assert bound(900.0, 8, "discrete_gaussian") > 2 * stats.norm.sf(128 / 30)
    assert bound(0.0, 8) == 0.0 and bound(1e9, 8) == 1.0


@pytest.mark.parametrize(
    ("length", "clients", "rotated", "bits"),
    [(10**5, 10, True, 15), (10**7, 100, True, 19), (10**5, 10, False, 16), (10**7, 100, False, 22)],
)
def test_the_ring_that_is_needed(length, clients, rotated, bits):
    """At the recommended scale with a noise multiplier of 1: between 14 and 22 bits."""
    length = padded_length(length) if rotated else length
    steps = recommended_scale(2.0, length) * 2.0
    needs = {
        "clients": clients, "contribution": steps, "variance": steps**2, "noise": "skellam", "length": length,
        "rotated": rotated,
    }  # fmt: skip
    assert smallest_ring(1e-9, rings=range(8, 33), **needs) == bits
    assert smallest_ring(1e-9, **needs) == min(ring for ring in (16, 20, 24, 32) if ring >= bits)
    with pytest.raises(ConfigError, match="lower the scale"):
        smallest_ring(1e-9, rings=(8,), **needs)


def test_bad_input():
    for arguments in ((0.0, 5, 0.5), (math.nan, 5, 0.5), (2.0**31, 5, 0.5), (1.0, 0, 0.5), (1.0, 5, 1.0)):
        with pytest.raises(ConfigError, match="Expected"):
            rounded_l2_squared(*arguments)
    with pytest.raises(ConfigError, match="positive clip norm"):
        recommended_scale(0.0, 5)
