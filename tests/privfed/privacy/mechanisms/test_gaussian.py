"""DP-FedAvg by itself: small cohorts, charges, an input released once. Its noise is tested in the federation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy.mechanisms import MECHANISMS, REPEATED, Moment, built
from privfed.privacy.mechanisms.gaussian import fewer


@settings(max_examples=100, deadline=None)
@given(clients=st.integers(0, 300), probability=st.fractions(Fraction(1, 10**6), 1), least=st.integers(2, 6))
def test_the_probability_of_a_small_cohort(clients, probability, least):
    exact = sum(
        math.comb(clients, k) * probability**k * (1 - probability) ** (clients - k)
        for k in range(min(least, clients + 1))
    )
    assert fewer(least, clients, float(probability)) == pytest.approx(float(exact), rel=1e-6, abs=1e-300)


def test_a_round_costs_one_step_and_is_released_once(make, keeper):
    work = built(MECHANISMS.get("gaussian").config()).at_work(make.site())
    drive = make.Drive(work, keeper())
    first = drive.release(np.zeros(10), broadcast=b"a")
    drive.number = 0
    assert drive.release(np.zeros(10), broadcast=b"a").mean_D.tobytes() == first.mean_D.tobytes()
    for other in ({"broadcast": b"b"}, {"broadcast": b""}):
        drive.number = 0
        found = drive.release(np.zeros(10), **other)
        assert (found.mean_D, found.lost) == (None, REPEATED)
    lost = drive.release(None, lost="too few")
    assert (lost.mean_D, lost.lost) == (None, "too few")
    (entry,) = drive.keeper.ledger.entries()
    assert entry.charge.event == work.event.one_step()


def test_a_digest_tells_rounds_apart():
    moments = [Moment(phase="train", round=1, broadcast=b) for b in (b"a", b"b")]
    sums = [None, np.zeros(2), np.ones(2)]
    assert len({moment.digest(sum_M) for moment in moments for sum_M in sums}) == 6
