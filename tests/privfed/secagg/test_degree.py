"""Degrees and thresholds against exact counting, brute force and published figures."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.errors import ConfigError
from privfed.secagg.degree import (
    answering_holders,
    at_most,
    corrupt_neighbours,
    find_degree,
    log2_tail,
)


@given(population=st.integers(1, 60), data=st.data())
@settings(max_examples=200)
def test_the_tail_is_the_exact_one(population: int, data: st.DataObject) -> None:
    marked, drawn = data.draw(st.integers(0, population)), data.draw(st.integers(0, population))
    least = data.draw(st.integers(0, drawn + 1))
    ways = sum(math.comb(marked, x) * math.comb(population - marked, drawn - x) for x in range(least, drawn + 1))
    exact = Fraction(ways, math.comb(population, drawn))
    found = log2_tail(population, marked, drawn, least)
    if exact == 0:
        assert found == -math.inf
    else:
        assert found == pytest.approx(math.log2(exact.numerator) - math.log2(exact.denominator), abs=1e-9)


@pytest.mark.parametrize("least", [40, 60, 88])
def test_deep_tails_of_large_cohorts_keep_their_digits(least: int) -> None:
    ways = sum(math.comb(1000, x) * math.comb(9000, 88 - x) for x in range(least, 89))
    exact = Fraction(ways, math.comb(10_000, 88))
    assert log2_tail(10_000, 1000, 88, least) == pytest.approx(
        math.log2(exact.numerator) - math.log2(exact.denominator), abs=1e-8
    )


def test_whole_numbers_of_clients() -> None:
    assert [at_most(0.3, 10), at_most(0.1, 1000), at_most(1 / 3, 3), at_most(0.29, 10), at_most(0.0, 5)] == [
        3,
        100,
        1,
        2,
        0,
    ]


@given(n=st.integers(20, 400), degree=st.integers(4, 60), corrupt=st.floats(0, 0.4), sigma=st.integers(20, 60))
@settings(max_examples=50, deadline=None)
def test_corrupt_neighbours_is_the_quantile(n: int, degree: int, corrupt: float, sigma: int) -> None:
    degree = min(degree, n - 2)
    bad = at_most(corrupt, n)
    count = corrupt_neighbours(n, degree, bad, sigma)
    bound = -(sigma + 1) - math.log2(n)
    assert log2_tail(n - 1, bad, degree, count + 1) <= bound
    assert count == 0 or log2_tail(n - 1, bad, degree, count) > bound


def test_answering_holders_holds_in_a_simulation() -> None:
    """With eta = 6 a client of some round goes short with a probability of at most 1 / 64, and not much less."""
    n, degree, dropped, eta = 60, 20, 15, 6.0
    least = answering_holders(n, degree, dropped, eta)
    rng, rounds = np.random.default_rng(5), 4000
    short = 0
    for _ in range(rounds):
        alive = np.ones(n, dtype=int)
        alive[rng.choice(n, dropped, replace=False)] = 0
        window = sum(np.roll(alive, step) for step in [*range(-degree // 2, 0), *range(1, degree // 2 + 1)])
        short += bool((window + alive < least).any())
    assert 0.02 * 2**-eta < short / rounds < 2**-eta


def reference(n: int, corrupt: float, dropped: float, *, double: bool) -> tuple[int, int]:
    """Return the pair of graph_parameter_finder: neighbours out of all n, no share of one's own.

    Its thresholds are the same tails with n in the place of n - 1, sigma = 40 and eta = 20.
    """
    bad, alive = at_most(corrupt, n), n - at_most(dropped, n)
    for k in range(2, n - 1, 2):
        pairs = math.log2(n) + math.log2(n - k - 1) - 1
        if pairs + log2_tail(n, n - alive + bad, k, k) >= -41:
            continue
        most = next(c for c in range(k + 1) if log2_tail(n, bad, k, c + 1) <= -41 - math.log2(n))
        gone = next(g for g in range(k + 1) if log2_tail(n, n - alive, k, g + 1) <= -20 - math.log2(n))
        least = math.ceil((most + k - 1.25) / 2) if double else most
        if k - gone > least:
            return k, max(least + 1, 2)
    raise AssertionError("none")


@pytest.mark.parametrize(
    ("n", "double", "expected"), [(100, False, (34, 11)), (100, True, (72, 42)), (1000, False, (88, 36))]
)
def test_the_figures_for_a_tenth_corrupt_and_three_tenths_dropped(
    n: int, double: bool, expected: tuple[int, int]
) -> None:
    """The tails give the reference's figures; ours may be two smaller for what is counted more closely.

    A client's neighbours are drawn from the n - 1 others, and a survivor holds a share of its own seed.
    """
    assert reference(n, 0.1, 0.3, double=double) == expected
    server = "equivocating" if double else "curious"
    found = find_degree(n, corrupt=n // 10, dropped=3 * n // 10, server=server)
    assert expected[0] - 2 <= found.degree <= expected[0] and abs(found.threshold - expected[1]) <= 1


# graph_parameter_finder_test.cc of google-parfait/federated-compute: n, corrupt, dropped, against both lists, k, t
PUBLISHED = [
    (100, 0.45, 0.45, False, 92, 46),
    (1000, 0.45, 0.45, False, 822, 417),
    (10, 0.33, 0.33, False, 8, 4),
    (100, 0.33, 0.33, False, 68, 34),
    (1000, 0.33, 0.33, False, 286, 150),
    (10_000, 0.33, 0.33, False, 422, 221),
    (100_000, 0.33, 0.33, False, 480, 251),
    (1_000_000, 0.33, 0.33, False, 518, 270),
    (100, 0.3, 0.3, True, 92, 62),
    (1000, 0.3, 0.3, True, 872, 584),
    (100, 0.05, 0.33, False, 28, 6),
    (1000, 0.05, 0.33, False, 72, 24),
    (100_000, 0.05, 0.33, False, 96, 32),
    (1_000_000, 0.05, 0.33, False, 102, 34),
    (100, 0.05, 0.33, True, 72, 39),
    (1000, 0.05, 0.33, True, 398, 223),
    (10_000, 0.05, 0.33, True, 746, 420),
    (1000, 0.33, 0.05, False, 78, 60),
    (1000, 0.33, 0.05, True, 132, 109),
]


@pytest.mark.parametrize(("n", "corrupt", "dropped", "double", "k", "t"), PUBLISHED)
def test_published_pairs_are_met_within_two_neighbours(
    n: int, corrupt: float, dropped: float, double: bool, k: int, t: int
) -> None:
    server = "equivocating" if double else "curious"
    found = find_degree(n, corrupt=at_most(corrupt, n), dropped=at_most(dropped, n), server=server)
    assert abs(found.degree - k) <= 2 and abs(found.threshold - t) <= 2


@given(n=st.integers(20, 300), corrupt=st.floats(0, 0.2), dropped=st.floats(0, 0.3))
@settings(max_examples=60, deadline=None)
def test_a_malicious_servers_graph_cannot_be_cut(n: int, corrupt: float, dropped: float) -> None:
    """By count: to cut the ring twice it needs more corrupt clients in k places than chance allows."""
    bad, gone = at_most(corrupt, n), at_most(dropped, n)
    try:
        found = find_degree(n, corrupt=bad, dropped=gone)
    except ConfigError:
        return
    pairs = math.log2(n * max(n - found.degree - 1, 1) / 2)
    assert pairs + log2_tail(n, bad, found.degree, found.degree - gone) <= -41
    assert corrupt_neighbours(n, found.degree, bad, 40) < found.threshold <= found.degree
    assert found.threshold <= answering_holders(n, found.degree, gone, 20)


def test_more_security_or_a_freer_server_never_takes_fewer_neighbours() -> None:
    degrees = [
        find_degree(500, corrupt=50, dropped=100, sigma=sigma, server="curious").degree for sigma in (20, 40, 80)
    ]
    assert degrees == sorted(degrees) and degrees[0] < degrees[2]
    chosen = [find_degree(500, corrupt=50, dropped=100, chosen=chosen).degree for chosen in (100, 150, 200)]
    assert chosen == sorted(chosen) and chosen[0] < chosen[2]


def test_what_no_graph_stands_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="lower secagg"):
        find_degree(20, corrupt=9, dropped=9)
