"""The cumulative tables: the right value for every number, ties included, and the stated distance to the law."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from decimal import Decimal

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from privfed_noise_checks import Scripted, precise_probabilities, stream

from privfed.errors import ConfigError
from privfed.privacy.discrete.laws import Law
from privfed.privacy.discrete.sampler import make_sampler
from privfed.privacy.discrete.tables import TABLE_BITS, build_table

TABLE = make_sampler("skellam", 9.0).table


def drawn(table, number):
    """Return the value drawn for one 192-bit number, and how many bits of it were read."""
    high, low = number >> 128, number & (2**128 - 1)
    word = ((high & (2**48 - 1)) << 16).to_bytes(8, "little")  # the low 16 bits of the word are not used
    script = Scripted((high >> 48).to_bytes(2, "little"), word, low.to_bytes(16, "big"))
    (value,) = table.draw(script, 1)
    return int(value), 16 if script.left == 24 else 64 if script.left == 16 else 192


@given(st.integers(0, 2**TABLE_BITS - 1))
@settings(max_examples=300, deadline=None)
def test_any_number_gives_the_value_between_its_thresholds(number):
    value, _ = drawn(TABLE, number)
    assert value == TABLE.origin + bisect_right(TABLE.thresholds, number)


@pytest.mark.parametrize("index", [0, 20, 34, 35, 36, 50, len(TABLE.thresholds) - 1])
def test_ties_are_settled_by_the_extra_bits(index):
    threshold = TABLE.thresholds[index]
    assert drawn(TABLE, threshold) == (TABLE.origin + index + 1, 192)
    assert drawn(TABLE, threshold - 1)[0] == TABLE.origin + index
    same_high = (threshold >> 128) << 128
    assert drawn(TABLE, same_high) == (TABLE.origin + bisect_right(TABLE.thresholds, same_high), 192)
    assert same_high == threshold or drawn(TABLE, same_high)[0] < drawn(TABLE, threshold)[0]


def test_thresholds_that_share_their_first_bits_are_told_apart():
    tiny = Decimal(2) ** -100
    table = build_table([Decimal(1), tiny, tiny, Decimal(1)], 5)
    for index, threshold in enumerate(table.thresholds):
        assert drawn(table, threshold)[0] == 5 + index + 1
        assert drawn(table, threshold - 1)[0] == 5 + index


def test_few_draws_need_more_than_two_bytes():
    count, script = 100_000, stream("bytes")
    before = stream("bytes")
    TABLE.draw(script, count)
    skipped = before.raw(4 * count).tobytes()
    assert skipped.find(script.raw(16).tobytes()) < 2.1 * count


@pytest.mark.parametrize("name", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize("deviation", [0.5, 3.0, 40.0])
def test_distance_to_the_law_is_within_the_bound(name, deviation):
    """The guarantee that is charged to delta, checked with 60 digits computed by other means."""
    sampler = make_sampler(name, deviation**2)
    edges = [0, *sampler.table.thresholds, 2**TABLE_BITS]
    values = range(sampler.table.origin, sampler.table.origin + len(edges) - 1)
    with mpmath.workdps(60):
        table = [mpmath.mpf(b - a) / 2**TABLE_BITS for a, b in itertools.pairwise(edges)]
        law = precise_probabilities(name, deviation, values)
        beyond = 1 - mpmath.fsum(law)
        distance = (mpmath.fsum(abs(p - q) for p, q in zip(table, law, strict=True)) + beyond) / 2
        assert 0 < beyond <= sampler.tail_delta
        assert distance <= sampler.statistical_distance
        assert sampler.tail_delta < 1e-30
        assert distance > beyond / 2  # the tail is what is lost: the bound is not loose by much
    assert sampler.law.cut >= 12 * deviation


def test_the_expansion_agrees_with_the_recurrence_where_it_is_worst():
    law = Law("skellam", 2.0**16)
    weights = law.half_weights()
    centre = law.exact_log_weight(0)
    for value in (0, 1, 2, 50, 256, 1000, 2000, law.cut):
        with mpmath.workdps(60):
            log = mpmath.mpf(str(law.exact_log_weight(value))) - mpmath.mpf(str(centre))
            miller = mpmath.mpf(str(weights[value])) / mpmath.mpf(str(weights[0]))
            assert abs(mpmath.exp(log) / miller - 1) < mpmath.mpf(10) ** -45


def test_double_precision_ratios_are_within_a_thousandth_of_the_margin():
    for name in ("skellam", "discrete_gaussian"):
        for deviation in (260.0, 1e4, 4e6):
            law = Law(name, deviation**2)
            values = np.linspace(0, law.cut, 40).astype(np.int64)
            inner = np.maximum(values - int(deviation / 64), 0)
            found = law.log_ratio(values, inner)
            for one, value, base in zip(found, values, inner, strict=True):
                exact = float(law.exact_log_weight(int(value)) - law.exact_log_weight(int(base)))
                assert abs(one - exact) < 1e-11


def test_bad_input():
    with pytest.raises(ConfigError, match="at least one weight"):
        build_table([], 0)
    with pytest.raises(ConfigError, match="none below 0"):
        build_table([Decimal(1), Decimal(-1)], 0)
    for variance in (0.0, -1.0, float("nan"), float("inf"), 2.0**45):
        with pytest.raises(ConfigError, match="variance above 0"):
            Law("skellam", variance)
    with pytest.raises(ConfigError, match="'skellam' or 'discrete_gaussian'"):
        Law("laplace", 1.0)
