"""The front, the point to take and leakage at equal utility, on figures whose answers are known."""

from __future__ import annotations

from typing import Any

import pytest

from privfed_audits.grids.cells import Cell
from privfed_audits.grids.compare import (
    choose,
    difference_text,
    dominates,
    front,
    interpolate,
    matched,
    paired,
)
from privfed_audits.grids.measures import Leak, Point, Setting, settings
from privfed_audits.statistics import Estimate


def leak(auc: float, empirical: float = 1.0) -> Leak:
    return Leak(
        accounted=8.0, empirical=empirical, interval=(empirical, empirical + 0.5), ceiling=None, auc=auc, tpr=None,
        attack="a", bound="gdp", canaries=100,
    )  # fmt: skip


def point(tuning: str, utility: float, auc: float, *, privacy: str = "p", seed: int = 1) -> Point:
    cell = Cell(tuning=tuning, codec="c", privacy=privacy, secagg="s", seed=seed, config=None, key=f"{tuning}{seed}")
    return Point(
        cell=cell, record={"utility": {"accuracy": utility}}, epsilon=8.0, utility=utility, n_test=1000, bytes_run=1e5,
        bytes_round=1e4, leaks={"release": leak(auc)},
    )  # fmt: skip


def setting(name: str, utility: tuple[float, float], **given: Any) -> Setting:
    mean, half = utility
    low, high = given.pop("leakage", (1.0, 1.5))
    values: dict[str, Any] = {
        "labels": (name, "c", "p", "s"),
        "points": (point(name, mean, 0.6),),
        "epsilon": 8.0,
        "utility": Estimate(mean=mean, low=mean - half, high=mean + half, n=3),
        "bytes_run": 1e5,
        "bytes_round": 1e4,
        "leakage": Estimate(mean=low, low=low, high=high, n=1),
        "auc": None,
        **given,
    }
    return Setting(**values)


def test_who_dominates_whom() -> None:
    base = setting("base", (0.6, 0.01))
    assert dominates(setting("clearly better", (0.63, 0.01)), base)
    assert not dominates(setting("better within noise", (0.61, 0.01)), base)
    assert dominates(setting("fewer bytes", (0.6, 0.01), bytes_run=9e4), base)
    assert not dominates(setting("fewer bytes, worse mean", (0.599, 0.01), bytes_run=9e4), base)
    assert dominates(setting("leaks clearly less", (0.6, 0.01), leakage=(0.1, 0.4)), base)
    assert not dominates(setting("leaks less within noise", (0.6, 0.01), leakage=(0.8, 1.3)), base)
    assert not dominates(setting("better, leaks more", (0.7, 0.01), leakage=(3.0, 3.5)), base)
    assert not dominates(setting("better, no guarantee", (0.7, 0.01), epsilon=None), base)
    assert not dominates(setting("better, weaker guarantee", (0.7, 0.01), epsilon=9.0), base)
    assert dominates(setting("better, the same budget but for rounding", (0.7, 0.01), epsilon=8.001), base)
    assert not dominates(base, base)


def test_the_front_is_never_empty_and_keeps_what_is_not_clearly_worse() -> None:
    found = [setting("a", (0.60, 0.01)), setting("b", (0.605, 0.01)), setting("c", (0.5, 0.01))]
    assert [each.labels[0] for each in front(found)] == ["a", "b"]
    assert front([]) == ()


def test_the_choice_takes_the_cheapest_of_the_level_ones_that_have_a_guarantee() -> None:
    found = [
        setting("best", (0.65, 0.02), epsilon=8.0),
        setting("level, smaller budget", (0.64, 0.02), epsilon=4.0, leakage=(0.9, 1.2)),
        setting("level, smaller budget, leaks less", (0.63, 0.02), epsilon=4.0, leakage=(0.2, 0.4)),
        setting("clearly worse", (0.5, 0.02), epsilon=1.0),
        setting("no guarantee", (0.8, 0.02), epsilon=None),
    ]
    choice = choose(found, "accuracy")
    assert choice is not None and choice.setting.labels[0] == "level, smaller budget, leaks less"
    assert "3 are not clearly less useful" in choice.sentence and "epsilon 4.00 accounted" in choice.sentence
    assert "no guarantee" in choice.sentence and "+17.0 points" in choice.sentence
    alone = choose(found[:1], "accuracy")
    assert alone is not None and "The only configuration with a guarantee on the front is best, " in alone.sentence
    clear = choose([found[0], found[3]], "accuracy")
    assert clear is not None and "Of the 2 configurations with a guarantee" in clear.sentence
    assert "best, c, p, s is clearly the most useful" in clear.sentence
    assert choose([], "accuracy") is None


def test_without_any_guarantee_there_is_still_a_choice() -> None:
    choice = choose([setting("a", (0.6, 0.01), epsilon=None)], "accuracy")
    assert choice is not None and "with a guarantee" not in choice.sentence and "no guarantee" in choice.sentence


def test_differences_are_taken_seed_by_seed() -> None:
    one, other = settings(
        [point("a", 0.60 + s / 100, 0.5, seed=s) for s in (1, 2, 3)]
        + [point("b", 0.55 + s / 100, 0.5, seed=s) for s in (1, 2, 3)]
    )
    gap = paired(one, other)  # the seeds vary far more than the gap, which is the same in each
    assert gap.mean == pytest.approx(0.05) and gap.high - gap.low < 1e-9 and gap.n == 3
    assert difference_text(gap, "accuracy") == "+5.0 ± 0.0 points"
    assert difference_text(paired(one, settings([point("c", 0.7, 0.5, seed=9)])[0]), "accuracy") == "-8.0 points"


def test_interpolation_between_budgets() -> None:
    curve = [(0.5, 0.55), (0.6, 0.65), (0.7, 0.95)]
    assert [interpolate(curve, x) for x in (0.4, 0.5, 0.55, 0.65, 0.7, 0.9)] == pytest.approx(
        [0.55, 0.55, 0.60, 0.80, 0.95, 0.95]
    )
    assert interpolate([(0.5, 0.6), (0.5, 0.7)], 0.5) == 0.6


def test_leaking_less_can_be_fitting_less() -> None:
    # both leak 0.5 + utility / 2: at their own best "head" leaks less, at equal utility exactly as much
    found = [
        point(tuning, u + s / 1000, 0.5 + (u + s / 1000) / 2, privacy=str(u), seed=s)
        for tuning, reached in (("LoRA", (0.3, 0.5, 0.7)), ("head", (0.2, 0.4, 0.5)))
        for u in reached
        for s in (1, 2, 3)
    ]
    rows = {row.tuning: row for row in matched(settings(found), "LoRA")}
    assert rows["LoRA"].fixed.mean > rows["head"].fixed.mean + 0.09
    gap = rows["head"].gap
    assert gap is not None and abs(gap.mean) < 1e-9 and rows["LoRA"].gap is None
    assert rows["head"].utility == pytest.approx(0.502)


def test_a_real_difference_at_equal_utility_is_found_and_corrected_for_many() -> None:
    def curve(tuning: str, extra: float) -> list[Point]:
        return [
            point(tuning, u + s / 1000, 0.5 + u / 4 + extra + s * 1e-4, privacy=str(u), seed=s)
            for u in (0.4, 0.6)
            for s in range(1, 6)
        ]

    rows = matched(settings(curve("LoRA", 0.0) + curve("worse", 0.1) + curve("same", 0.0)), "LoRA")
    worse = next(row for row in rows if row.tuning == "worse")
    assert worse.gap is not None and worse.gap.low > 0.09 and worse.p_value is not None and worse.p_value < 1e-6
    same = next(row for row in rows if row.tuning == "same")
    assert same.p_value == 1.0 and next(row for row in rows if row.tuning == "LoRA").p_value is None


def test_nothing_to_match_where_ranges_do_not_meet_or_nothing_was_audited() -> None:
    apart = [point("LoRA", u, 0.6, privacy=str(u)) for u in (0.6, 0.7)]
    apart += [point("head", u, 0.6, privacy=str(u)) for u in (0.2, 0.3)]
    assert matched(settings(apart), "LoRA") == ()
    assert matched(settings(apart[:2]), "LoRA") == ()
    assert matched((), "LoRA") == ()
