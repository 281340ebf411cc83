from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.secagg import shamir
from privfed.secagg.shamir import (
    PRIME,
    combine,
    combine_bytes,
    deal,
    deal_bytes,
    evaluate,
    is_share,
    lagrange_weights,
)


def test_the_modulus_is_prime_to_many_bases() -> None:
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):  # Miller and Rabin's test
        x = pow(base, odd, PRIME)
        assert x in (1, PRIME - 1) or any(pow(x, 2**i, PRIME) == PRIME - 1 for i in range(1, twos))


@given(data=st.data(), secret=st.binary(min_size=32, max_size=32), n=st.integers(1, 9))
def test_any_threshold_many_shares_reconstruct(data: st.DataObject, secret: bytes, n: int) -> None:
    threshold = data.draw(st.integers(1, n))
    points = list(range(1, n + 1))
    shares = dict(zip(points, deal_bytes(secret, threshold, points), strict=True))
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, n))]
    assert combine_bytes(lagrange_weights(chosen), [shares[point] for point in chosen]) == secret


@pytest.mark.parametrize(("prime", "threshold"), [(5, 2), (5, 3), (7, 2), (7, 3)])
def test_fewer_shares_are_independent_of_the_secret(prime: int, threshold: int) -> None:
    points = list(range(1, prime))[:4]
    for seen in combinations(range(len(points)), threshold - 1):
        views = []
        for secret in range(prime):
            view: Counter[tuple[int, ...]] = Counter()
            for tail in product(range(prime), repeat=threshold - 1):
                shares = evaluate([secret, *tail], points, prime)
                view[tuple(shares[i] for i in seen)] += 1
            views.append(view)
        assert all(view == views[0] for view in views)
        assert set(views[0].values()) == {1}  # uniform over all prime^(threshold - 1) views


@pytest.mark.parametrize(("prime", "threshold"), [(5, 2), (7, 3)])
def test_dealt_coefficients_cover_the_whole_field(prime: int, threshold: int) -> None:
    points = list(range(1, prime))
    dealt = {tuple(deal(1, threshold, points, prime)) for _ in range(40 * prime ** (threshold - 1))}
    assert len(dealt) == prime ** (threshold - 1)
    weights = lagrange_weights(points[:threshold], prime)
    assert {combine(weights, shares[:threshold], prime) for shares in dealt} == {1}


def test_one_set_of_weights_serves_many_secrets() -> None:
    weights = lagrange_weights([2, 5, 3])
    for secret in (0, 1, 2**256 - 1, PRIME - 1):
        shares = deal(secret, 3, [1, 2, 3, 4, 5])
        assert combine(weights, [shares[1], shares[4], shares[2]]) == secret


def test_bad_arguments_are_refused() -> None:
    for secret, threshold, points in [
        (-1, 1, [1]),
        (PRIME, 1, [1]),
        (1, 0, [1]),
        (1, 2, [1]),
        (1, 1, [0]),
        (1, 1, [1, 1]),
    ]:
        with pytest.raises(ValueError, match="Expected"):
            deal(secret, threshold, points)
    with pytest.raises(ValueError, match="Expected"):
        lagrange_weights([1, PRIME])
    with pytest.raises(ValueError, match="32 bytes"):
        deal_bytes(b"short", 1, [1])


def test_wrong_shares_that_leave_the_byte_range_are_noticed() -> None:
    with pytest.raises(ValueError, match="do not combine"):
        combine_bytes([1], [(PRIME - 1).to_bytes(33, "little")])
    assert is_share((PRIME - 1).to_bytes(33, "little"))
    assert not is_share(PRIME.to_bytes(33, "little"))
    assert not is_share(bytes(32))


def test_coefficients_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda bound: drawn.append(bound) or 3)
    assert deal(1, 3, [1, 2, 4]) == [7, 19, 61]
    assert drawn == [PRIME, PRIME]
