"""Intervals over seeds and tests of many comparisons, against known values and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from privfed.errors import ConfigError
from privfed_audits.statistics import holm, t_half_width, t_interval, t_test


def test_the_interval_of_three_values_is_that_of_the_tables() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.n == 3 and found.over == "seeds"
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(4.0 - found.high)


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    found = t_interval([0.7])
    assert (found.low, found.high, found.over) == (0.7, 0.7, "nothing")
    assert t_half_width([0.7]) is None and t_test([0.7]) is None
    with pytest.raises(ConfigError, match="got 0 values"):
        t_interval([])
    with pytest.raises(ConfigError, match=r"got 2 values and 1\.5"):
        t_half_width([1.0, 2.0], confidence=1.5)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_covers_the_mean_as_often_as_it_says(n: int) -> None:
    draws = np.random.default_rng(n).normal(3.0, 2.0, (4000, n))
    covered = sum(each.low <= 3.0 <= each.high for each in map(t_interval, draws.tolist()))
    assert 0.937 < covered / len(draws) < 0.963
    # a normal quantile in place of Student's would cover far less with so few seeds
    half = 1.96 * draws.std(axis=1, ddof=1) / math.sqrt(n)
    assert (abs(draws.mean(axis=1) - 3.0) <= half).mean() < 0.92


def test_the_paired_test_is_students() -> None:
    gaps = [0.4, 0.1, 0.35, -0.05, 0.2]
    assert t_test(gaps) == pytest.approx(float(stats.ttest_1samp(gaps, 0.0).pvalue))
    assert t_test([0.2, 0.2]) == 0.0 and t_test([0.0, 0.0]) == 1.0


def test_holm_against_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_familys_error() -> None:
    p = np.random.default_rng(0).uniform(size=(3000, 12))
    wrong = sum(min(holm(row)) < 0.05 for row in p.tolist()) / len(p)
    assert 0.035 < wrong < 0.065
    assert (p.min(axis=1) < 0.05).mean() > 0.4  # without it
