"""Duplicates and the held-out split: what is dropped, what stays together, what the split depends on."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.data.duplicates import (
    NEAR_JACCARD,
    drop_exact,
    drop_shared,
    jaccard,
    near_groups,
    normalise,
    shingles,
)
from privfed.data.rows import Label, Rows
from privfed.data.splits import hold_out
from privfed.errors import DataError


def make(texts: Sequence[str], labels: Sequence[Label] | None = None) -> Rows:
    labels = [i % 2 for i in range(len(texts))] if labels is None else labels
    return Rows(texts=tuple(texts), labels=tuple(labels), clients=None)


def keys(rows: Rows) -> list[str]:
    return [normalise(text) for text in rows.texts]


def brute_force_groups(texts: Sequence[str]) -> set[frozenset[int]]:
    """Return the connected groups of near-duplicates by comparing every pair."""
    sets = [shingles(text) for text in texts]
    groups = [{i} for i in range(len(texts))]
    for i in range(len(texts)):
        for j in range(i):
            if groups[i] is not groups[j] and jaccard(sets[i], sets[j]) >= NEAR_JACCARD:
                groups[i] |= groups[j]
                for k in groups[j]:
                    groups[k] = groups[i]
    return {frozenset(group) for group in groups}


def perturbed(count: int, seed: int) -> list[str]:
    """Return texts of 1 to 40 words, many of them others with a few words changed."""
    rng = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and rng.random() < 0.6:
            words = list(rng.choice(texts))
            for _ in range(rng.randint(0, 2)):
                words[rng.randrange(len(words))] = f"w{rng.randrange(300)}"
            words += [f"w{rng.randrange(300)}"] * rng.randint(0, 2)
        else:
            words = [f"w{rng.randrange(300)}" for _ in range(rng.randint(1, 40))]
        texts.append(words)
    return [" ".join(words) for words in texts]


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_those_of_comparing_every_pair(seed: int) -> None:
    texts = perturbed(250, seed)
    groups = near_groups(texts)
    assert {frozenset(group) for group in groups} == brute_force_groups(texts)
    assert any(len(group) > 1 for group in groups)


def test_near_is_at_least_four_fifths() -> None:
    words = [f"w{i}" for i in range(40)]
    near = [*words[:-1], "other"]  # 37 of 39 shingles shared
    far = [*words[:15], "x", *words[15:30], "y", *words[30:]]
    texts = [" ".join(words), " ".join(near), " ".join(far)]
    assert sorted(map(sorted, near_groups(texts))) == [[0, 1], [2]]


def test_exact_duplicates_go_and_the_first_stays() -> None:
    rows = make(["A  b", "c", "a B\n", "C", "d"], [0, 1, 1, 1, 0])
    rows, notes = drop_exact(rows, keys(rows), "row")
    assert rows.texts == ("A  b", "c", "d")
    assert rows.labels == (0, 1, 0)
    assert notes == ["2 duplicate rows dropped, 1 of them labelled otherwise than the first, which is kept"]
    assert drop_exact(rows, keys(rows), "row") == (rows, [])


def test_training_rows_that_repeat_a_test_row_go() -> None:
    rows = make(["a b", "c d", "e f"])
    rows, notes = drop_shared(rows, keys(rows), keys(make(["C  D", "x"])), "row", ("a", "b"))
    assert rows.texts == ("a b", "e f")
    assert notes == ["1 training row dropped for repeating a test row"]


def test_the_split_depends_on_the_rows_and_not_on_their_order() -> None:
    texts = list(dict.fromkeys(perturbed(300, 9)))
    order = list(range(len(texts)))
    random.Random(1).shuffle(order)
    rows = make(texts)
    train, test, notes = hold_out(rows, 0.2, origin="x")
    again, test_again, _ = hold_out(rows.take(order), 0.2, origin="x")
    assert set(train.texts) == set(again.texts)
    assert set(test.texts) == set(test_again.texts)
    assert train.texts == tuple(text for text in texts if text in set(train.texts))
    assert "moved to the other side of the split with their near-duplicates" in notes[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 0.6))
def test_every_row_is_on_one_side_and_near_duplicates_on_the_same(seed: int, fraction: float) -> None:
    texts = list(dict.fromkeys(perturbed(60, seed)))
    try:
        train, test, _ = hold_out(make(texts), fraction, origin="x")
    except DataError:
        return  # a chain of near-duplicates may leave one side empty
    assert sorted(train.texts + test.texts) == sorted(texts)
    for group in brute_force_groups(texts):
        assert len({texts[i] in set(test.texts) for i in group}) == 1


def test_a_larger_fraction_only_adds_to_the_test_side() -> None:
    rows = make([f"text number {i} of many" for i in range(500)])
    _, small, _ = hold_out(rows, 0.1, origin="x")
    _, large, _ = hold_out(rows, 0.3, origin="x")
    assert set(small.texts) < set(large.texts)
    assert 30 <= len(small) <= 70
    assert 120 <= len(large) <= 180


def test_a_rare_label_is_trained_on() -> None:
    rows = make([f"text number {i} of many" for i in range(200)], ["rare", *["a", "b"] * 99, "c"])
    for fraction in (0.2, 0.5, 0.8):
        train, test, _ = hold_out(rows, fraction, origin="x")
        assert set(test.labels) <= set(train.labels) == {"rare", "a", "b", "c"}


def test_too_few_rows_to_hold_any_out() -> None:
    with pytest.raises(DataError, match="puts 0 of 2 rows to the test side"):
        hold_out(make(["one", "two"]), 1e-9, origin="tiny.csv")


def test_normalise_forgets_case_and_white_space_only() -> None:
    assert normalise(" A\tb\n") == "a b"
    assert normalise("a-b") != normalise("a b")
