"""Who takes part in a round."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.federation.cohort import balanced_cohort, poisson_cohort
from privfed.rng import PrivateStream


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"c{number:03d}" for number in range(count))


def _play(clients: tuple[str, ...], size: int, rounds: int, seed: int) -> list[tuple[str, ...]]:
    taken: Counter[str] = Counter()
    played = []
    for number in range(1, rounds + 1):
        cohort = balanced_cohort(clients, taken, size, seed=seed, phase="train", round_number=number)
        taken.update(cohort)
        played.append(cohort)
    return played


@settings(max_examples=150, deadline=None)
@given(data=st.data(), count=st.integers(1, 25), rounds=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_balanced_cohort_never_exceeds_what_the_accountant_assumes(
    data: st.DataObject, count: int, rounds: int, seed: int
) -> None:
    size = data.draw(st.integers(1, count))
    played = _play(_names(count), size, rounds, seed)
    taken: Counter[str] = Counter()
    for number, cohort in enumerate(played, start=1):
        assert len(set(cohort)) == len(cohort) == size
        assert list(cohort) == sorted(cohort)
        taken.update(cohort)
        assert max(taken.values()) <= math.ceil(number * size / count)
        assert min(taken.get(name, 0) for name in _names(count)) >= number * size // count


def test_balanced_cohort_repeats_with_its_seed_and_differs_with_another() -> None:
    assert _play(_names(12), 5, 10, 4) == _play(_names(12), 5, 10, 4)
    assert _play(_names(12), 5, 10, 4) != _play(_names(12), 5, 10, 5)


def test_balanced_cohort_breaks_ties_at_random() -> None:
    first = Counter(name for seed in range(300) for name in _play(_names(6), 2, 1, seed)[0])
    assert set(first) == set(_names(6))
    assert all(60 <= count <= 140 for count in first.values())  # 100 expected, standard deviation 8


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_poisson_cohort_has_the_stated_rate_for_each_client(probability: float) -> None:
    clients, draws = _names(20), 400
    counts: Counter[str] = Counter()
    sizes = []
    for number in range(draws):
        cohort = poisson_cohort(clients, probability, PrivateStream(bytes(32), "cohort", number))
        counts.update(cohort)
        sizes.append(len(cohort))
    mean, deviation = draws * probability, math.sqrt(draws * probability * (1 - probability))
    assert all(abs(counts[name] - mean) < 5 * deviation for name in clients)
    total, spread = len(clients) * mean, math.sqrt(len(clients)) * deviation
    assert abs(sum(sizes) - total) < 4 * spread
    # the sizes vary as a binomial's do: independent draws, not a fixed number of them
    variance = sum((size - total / draws) ** 2 for size in sizes) / draws
    expected = len(clients) * probability * (1 - probability)
    assert 0.7 * expected < variance < 1.3 * expected


def test_poisson_cohort_takes_all_or_none_at_the_ends() -> None:
    stream = PrivateStream(bytes(32), "ends")
    assert poisson_cohort(_names(5), 1.0, stream) == _names(5)
    assert poisson_cohort(_names(5), 0.0, stream) == ()
