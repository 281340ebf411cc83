"""The probability that a cohort drawn at random cannot be masked, against scipy's distribution and a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.privacy.cohorts import unmaskable
from privfed.secagg.session import Requirements


def two_or_more(clients: int) -> bool:
    return clients >= 2


@settings(max_examples=100, deadline=None)
@given(others=st.integers(0, 3000), probability=st.floats(1e-6, 1))
def test_two_are_too_many_where_the_others_are_at_most_one(others, probability):
    found = unmaskable(others, probability, two_or_more)
    assert found == pytest.approx(stats.binom.cdf(1, others, probability), rel=1e-6, abs=1e-35)


@settings(max_examples=50, deadline=None)
@given(
    others=st.integers(1, 2000), probability=st.floats(1e-4, 0.999), low=st.integers(2, 300), width=st.integers(0, 400)
)
def test_sizes_outside_of_a_range_on_both_sides_count(others, probability, low, width):
    """With and without one more client: others below ``low`` or above ``low + width - 1`` are lost either way."""
    found = unmaskable(others, probability, lambda n: low <= n <= low + width)
    sizes = np.arange(others + 1)
    lost = (sizes < low) | (sizes + 1 > low + width)
    assert found == pytest.approx(stats.binom.pmf(sizes, others, probability)[lost].sum(), rel=1e-6, abs=1e-12)


def test_a_fixed_quorum_is_lost_more_often_than_one_that_follows_the_cohort():
    """n_min = 50 of about 80: a cohort above 90 could split into two quorums, one below 71 cannot stand the drops."""
    fixed, free = Requirements(n_min=50), Requirements()
    assert [fixed.met_by(n) for n in (0, 1, 60, 70, 71, 90, 91)] == [False, False, False, False, True, True, False]
    assert unmaskable(799, 0.1, fixed.met_by) > 0.1 > 1e-12 > unmaskable(799, 0.1, free.met_by)


def test_it_is_the_share_of_simulated_rounds_that_one_client_could_decide():
    requirements, rng = Requirements(n_min=50), np.random.default_rng(3)
    others = rng.binomial(799, 0.1, size=20_000)
    share = np.mean([not (requirements.met_by(n) and requirements.met_by(n + 1)) for n in others.tolist()])
    found = unmaskable(799, 0.1, requirements.met_by)
    assert found == pytest.approx(share, abs=4 * np.sqrt(share / 20_000))
    assert unmaskable(799, 0.11, requirements.met_by) != pytest.approx(share, abs=4 * np.sqrt(share / 20_000))
