"""Robust rules: against their definitions written out as loops, and against clients that send anything.

Shape suffixes: K updates of a round, M values of an update.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from privfed.errors import RoundError
from privfed.rules import RULES, Rule
from privfed.rules.geometric_median import GeometricMedianConfig
from privfed.rules.krum import KrumConfig
from privfed.rules.multi_krum import MultiKrumConfig
from privfed.rules.trimmed_mean import TrimmedMeanConfig

ROBUST = [name for name, rule in RULES.items() if rule.combines]
BYZANTINE = 2
TABLES: dict[str, Any] = {
    "krum": KrumConfig(byzantine=BYZANTINE),
    "multi_krum": MultiKrumConfig(byzantine=BYZANTINE),
    "trimmed_mean": TrimmedMeanConfig(trim_share=0.2),
    "geometric_median": GeometricMedianConfig(iterations=300),
}


def _rule(name: str, **options: Any) -> Rule:
    rule = RULES.get(name)
    table = rule.config(**options) if options else TABLES.get(name, rule.config.model_validate({"name": name}))
    return rule(table)


def _updates(seed: int, count: int = 9, length: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, length))


def _krum_scores(x: np.ndarray, f: int) -> list[float]:
    """Section 4 of the paper, word by word."""
    scores = []
    for i in range(len(x)):
        distances = sorted(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True)) for j in range(len(x)) if j != i)
        scores.append(sum(distances[: len(x) - f - 2]))
    return scores


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("f", [0, 1, 3])
def test_krum_takes_the_lowest_score_and_multi_krum_averages_the_lowest(seed: int, f: int) -> None:
    x = _updates(seed)
    scores = _krum_scores(x, f)
    best = sorted(range(len(x)), key=scores.__getitem__)
    np.testing.assert_array_equal(_rule("krum", byzantine=f).combined(x), x[best[0]])
    for m in (1, 3):
        np.testing.assert_allclose(_rule("multi_krum", byzantine=f, selected=m).combined(x), x[best[:m]].mean(axis=0))
    np.testing.assert_allclose(_rule("multi_krum", byzantine=f).combined(x), x[best[: len(x) - f - 2]].mean(axis=0))


def test_krum_tells_updates_apart_whose_distances_are_tiny_beside_their_norms() -> None:
    near = 1e8 + np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0.3, 0.3, 0], [9, 9, 9]])
    np.testing.assert_array_equal(_rule("krum", byzantine=1).combined(near), near[3])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.34, 0.44])
def test_the_trimmed_mean_is_the_mean_of_the_middle(share: float) -> None:
    x = _updates(7)
    cut = int(np.ceil(share * len(x)))
    columns = [sorted(column)[cut : len(x) - cut] for column in x.T]
    rule = _rule("trimmed_mean", trim_share=share)
    assert rule.refusal(len(x)) is None
    np.testing.assert_allclose(rule.combined(x), [sum(column) / len(column) for column in columns])


def test_a_share_that_rounding_lifts_above_a_whole_number_cuts_that_number() -> None:
    x = np.arange(100.0)[:, None] ** 2
    assert 0.07 * 100 > 7
    np.testing.assert_allclose(_rule("trimmed_mean", trim_share=0.07).combined(x), x[7:93].mean(axis=0))


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_the_median_is_the_middle_of_each_coordinate(count: int) -> None:
    x = _updates(3, count)
    ordered = [sorted(column) for column in x.T]
    wanted = [(column[(count - 1) // 2] + column[count // 2]) / 2 for column in ordered]
    np.testing.assert_allclose(_rule("median").combined(x), wanted)


def test_the_geometric_median_where_it_is_known() -> None:
    square = np.array([[0.0, 0], [2, 0], [0, 2], [2, 2]])
    np.testing.assert_allclose(_rule("geometric_median").combined(square), [1, 1], atol=1e-6)
    line = np.array([[0.0, 0], [1, 0], [10, 0]])
    np.testing.assert_allclose(_rule("geometric_median").combined(line), [1, 0], atol=1e-5)
    equilateral = np.array([[0.0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
    np.testing.assert_allclose(_rule("geometric_median").combined(equilateral), equilateral.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_point_has_a_smaller_sum_of_distances(seed: int) -> None:
    x = _updates(seed)
    found = _rule("geometric_median").combined(x)

    def total(z: np.ndarray) -> float:
        return float(sum(np.linalg.norm(z - row) for row in x))

    draw = np.random.default_rng(seed)
    steps = draw.standard_normal((200, x.shape[1]))
    for size in (1e-3, 1e-2, 1.0):
        assert all(total(found + size * step) >= total(found) - 1e-9 for step in steps)
    assert total(x.mean(axis=0)) > total(found)


def test_the_norm_bound_clips_or_leaves_out() -> None:
    x = np.array([[3.0, 4], [0, 1], [0, 0], [30, 40]])
    clip = _rule("norm_bound", action="clip", max_norm=5.0)
    np.testing.assert_allclose(clip.combined(x), [(3 + 0 + 0 + 3) / 4, (4 + 1 + 0 + 4) / 4])
    leave = _rule("norm_bound", action="filter", max_norm=5.0)
    np.testing.assert_allclose(leave.combined(x), [1, 5 / 3])
    median = _rule("norm_bound", action="filter", factor=2.0)  # the median of 0, 1, 5, 50 is 3
    np.testing.assert_allclose(median.combined(x), [1, 5 / 3])
    np.testing.assert_array_equal(clip.combined(np.zeros((3, 2))), [0, 0])
    with pytest.raises(RoundError, match="all 4 updates are longer"):
        leave.combined(x + 100)


values = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@pytest.mark.parametrize("name", ROBUST)
@settings(deadline=None, max_examples=60)
@given(
    x=arrays(np.float64, st.tuples(st.integers(7, 12), st.integers(1, 4)), elements=values),
    seed=st.integers(0, 10**6),
    order=st.randoms(),
)
def test_the_order_of_the_clients_does_not_matter(name: str, x: np.ndarray, seed: int, order: Any) -> None:
    if "krum" in name:  # of equal scores the first wins: values that have none
        x = np.random.default_rng(seed).standard_normal(x.shape)
    shuffled = x[order.sample(range(len(x)), len(x))]
    size = np.abs(x).max() + 1e-6
    np.testing.assert_allclose(_rule(name).combined(shuffled), _rule(name).combined(x), rtol=1e-6, atol=1e-6 * size)


@settings(deadline=None, max_examples=60)
@given(x=arrays(np.float64, st.tuples(st.integers(7, 12), st.integers(1, 4)), elements=values))
def test_krum_is_one_of_its_inputs_and_the_others_stay_within_their_range(x: np.ndarray) -> None:
    assert any(np.array_equal(_rule("krum").combined(x), row) for row in x)
    for name in ("median", "trimmed_mean", "geometric_median", "multi_krum"):
        found = _rule(name).combined(x)
        slack = 1e-9 * (1 + np.abs(x).max())
        assert (x.min(axis=0) - slack <= found).all()
        assert (found <= x.max(axis=0) + slack).all()


def _within(name: str, honest: np.ndarray, found: np.ndarray, count: int) -> bool:
    """Whether ``found`` is where the rule's guarantee has it, whatever the others sent."""
    low, high = honest.min(axis=0), honest.max(axis=0)
    centre = honest.mean(axis=0)
    radius = float(np.linalg.norm(honest - centre, axis=1).max())
    off = float(np.linalg.norm(found - centre))
    if name in ("median", "trimmed_mean"):
        return bool((low - 1e-9 <= found).all() and (found <= high + 1e-9).all())
    if name == "geometric_median":  # Lopuhaa and Rousseeuw 1991; Pillutla et al. 2022, section III
        share = 1 - len(honest) / count
        return off <= 2 * (1 - share) / (1 - 2 * share) * radius * 1.01 + 1e-3
    if name == "norm_bound":
        return float(np.linalg.norm(found)) <= 1.5 * float(np.linalg.norm(honest, axis=1).max()) + 1e-9
    # what Krum picks is near an honest one: its score is at most an honest one's, (K - f - 2) (2 r)^2
    return off <= radius * (1 + 2 * float(np.sqrt(count - BYZANTINE - 2))) + 1e-9


attacks = st.sampled_from([-1e30, -1e6, -50.0, -3.0, 0.5, 2.0, 100.0, 1e12, 3e38])


@pytest.mark.parametrize("name", ROBUST)
@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    sent=arrays(np.float64, (BYZANTINE, 3), elements=attacks),
    same=st.booleans(),
)
def test_two_of_ten_cannot_move_it_away_whatever_they_send(name: str, seed: int, sent: np.ndarray, same: bool) -> None:
    honest = np.random.default_rng(seed).standard_normal((8, 3)) + 1.0
    wrong = np.repeat(sent[:1], BYZANTINE, axis=0) if same else sent
    both = np.concatenate([honest, wrong])
    found = _rule(name).combined(both)
    assert np.isfinite(found).all()
    assert _within(name, honest, found, len(both))


@pytest.mark.parametrize("name", ROBUST)
def test_more_than_it_stands_can_move_it_away(name: str) -> None:
    """So that the test above is one that could fail: its own checks see a result that is taken over."""
    honest = _updates(1, 4, 3) + 1.0
    wrong = np.full((6, 3), 1e6)
    both = np.concatenate([honest, wrong])
    assert not _within(name, honest, _rule(name).combined(both), 9)
    mean = np.concatenate([_updates(1, 8, 3) + 1.0, wrong[:2]]).mean(axis=0)
    assert not _within(name, _updates(1, 8, 3) + 1.0, mean, 10)


def test_the_fewest_updates_of_each_rule() -> None:
    for f, (krum, m) in itertools.product(range(4), [("krum", None), ("multi_krum", None), ("multi_krum", 6)]):
        options = {"byzantine": f} | ({} if m is None else {"selected": m})
        least = max(2 * f + 3, (m or 1) + f + 2)
        rule = _rule(krum, **options)
        assert rule.refusal(least) is None
        assert f"at least {least} updates" in str(rule.refusal(least - 1))
    trimmed = _rule("trimmed_mean", trim_share=0.4)
    assert [k for k in range(1, 9) if trimmed.refusal(k) is not None] == [1, 2, 3, 4, 6, 8]
    assert _rule("median").refusal(1) is None
