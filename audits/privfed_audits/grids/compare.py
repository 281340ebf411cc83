"""What the figures say: the front over utility, leakage and bytes, the point to take, leakage at equal utility."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from privfed.report.text import bytes_text
from privfed_audits.grids.measures import Setting, shown_utility
from privfed_audits.statistics import Estimate, holm, t_interval, t_test


def dominates(one: Setting, other: Setting) -> bool:
    """Return whether ``one`` is at least as good in all of utility, leakage and bytes, and clearly better in one.

    Clearly: the intervals do not overlap; of bytes, which are counted, fewer are enough. Leakage is what is promised
    (no guarantee is the most) and, where both were audited, what attacks found.
    """
    leaks = (one.leakage, other.leakage)
    audited = leaks[0] is not None and leaks[1] is not None
    as_good = one.utility.mean >= other.utility.mean and one.bytes_run <= other.bytes_run
    as_good = as_good and promised(one) <= promised(other)
    better = one.utility.low > other.utility.high or one.bytes_run < other.bytes_run
    if audited and leaks[0] is not None and leaks[1] is not None:
        as_good = as_good and leaks[0].mean <= leaks[1].mean
        better = better or leaks[0].high < leaks[1].low
    return as_good and better


def promised(each: Setting) -> float:
    """Return the accounted epsilon to two digits, which budgets of one size meet; infinite without a guarantee."""
    return math.inf if each.epsilon is None else float(f"{each.epsilon:.2g}")


def front(found: Sequence[Setting]) -> tuple[Setting, ...]:
    """Return the configurations that none dominates."""
    return tuple(each for each in found if not any(dominates(other, each) for other in found if other is not each))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The configuration to take, and why in a sentence."""

    setting: Setting
    sentence: str


def choose(found: Sequence[Setting], utility: str) -> Choice | None:
    """Return the point of the front to take.

    Among those with a guarantee, where there are any: of all that are not clearly less useful than the best, those with
    the smallest epsilon, of these all that do not clearly leak more than the least, of them the one that sends least.
    """
    private = [each for each in front(found) if each.private]
    pool = private or list(front(found))
    if not pool:
        return None
    best = max(pool, key=lambda each: each.utility.mean)
    level = [each for each in pool if each.utility.high >= best.utility.low]
    taken = _cheapest(level)
    kind = "with a guarantee " if private else ""
    if len(pool) == 1:
        reason = f"The only configuration {kind}on the front is {taken.name}"
    elif len(level) == 1:
        reason = f"Of the {len(pool)} configurations {kind}on the front, {taken.name} is clearly the most useful"
    else:
        order = "the smallest epsilon, " if private else ""
        reason = (
            f"Of the {len(pool)} configurations {kind}on the front, {len(level)} are not clearly less useful than the "
            f"best ({best.name}: {shown_utility(utility, best.utility.mean)}); of these, {taken.name} has {order}"
            "no clearly larger leakage, and the fewest bytes"
        )
    reason += f": {describe(taken, utility)}."
    return Choice(setting=taken, sentence=f"{reason} {_given_up(taken, found, utility)}".strip())


def _cheapest(level: Sequence[Setting]) -> Setting:
    """Return, of equally useful configurations, the one to take."""
    smallest = min(promised(each) for each in level)
    strongest = [each for each in level if promised(each) == smallest]
    least = min(strongest, key=_leakage)
    tight = [
        each
        for each in strongest
        if each.leakage is None or least.leakage is None or each.leakage.low <= least.leakage.high
    ]
    return min(tight, key=lambda each: (each.bytes_run, _leakage(each), -each.utility.mean))


def describe(each: Setting, utility: str) -> str:
    """Return a configuration's figures in words."""
    parts = [f"{utility} {interval_text(each.utility, utility)}"]
    parts.append("no guarantee" if each.epsilon is None else f"epsilon {each.epsilon:.2f} accounted")
    if each.leakage is not None:
        parts.append(f"at least {each.leakage.mean:.2f} found by attack")
    parts.append(f"{bytes_text(each.bytes_run)} a client sends")
    return ", ".join(parts)


def interval_text(value: Estimate, utility: str) -> str:
    """Return a utility with its interval."""
    shown = shown_utility(utility, value.mean)
    if value.over == "nothing":
        return shown
    ends = sorted((value.low, value.high)) if utility != "perplexity" else sorted((value.low, value.high), reverse=True)
    return f"{shown} ({shown_utility(utility, ends[0])} to {shown_utility(utility, ends[1])})"


def paired(one: Setting, other: Setting) -> Estimate:
    """Return the difference in utility, seed by seed where both have the same seeds."""
    left = {point.cell.seed: point.utility for point in one.points}
    right = {point.cell.seed: point.utility for point in other.points}
    both = sorted(left.keys() & right.keys())
    if not both:
        mean = one.utility.mean - other.utility.mean
        return Estimate(mean=mean, low=mean, high=mean, n=0, over="nothing")
    return t_interval([left[seed] - right[seed] for seed in both])


def difference_text(gap: Estimate, utility: str) -> str:
    """Return a difference in utility, in points or in perplexity."""
    scale, unit = (1.0, "of perplexity") if utility == "perplexity" else (100.0, "points")
    half = "" if gap.n < 2 else f" ± {scale * (gap.high - gap.low) / 2:.1f}"
    return f"{scale * gap.mean:+.1f}{half} {unit}"


def _given_up(taken: Setting, found: Sequence[Setting], utility: str) -> str:
    best = max(found, key=lambda each: each.utility.mean)
    if best is taken:
        return "No configuration of the grid is more useful."
    return f"The most useful of all, {best.name}, has {difference_text(paired(best, taken), utility)} on it."


def _leakage(each: Setting) -> float:
    return float("inf") if each.leakage is None else each.leakage.mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """How much a tuning leaks at the utility that all tunings reach, beside how much it leaks as it was set.

    Attributes:
        tuning: Its label; ``codec`` and ``secagg`` are those of all that it is compared with.
        utility: The level, averaged over seeds.
        fixed: AUC of the strongest attack in its most useful cell.
        matched: AUC at the level, between its budgets by linear interpolation, seed by seed.
        gap: Of ``matched`` against the reference tuning's, seed by seed; None for the reference.
        p_value: That the gap is 0, adjusted by Holm over all comparisons; None for fewer than two seeds.
    """

    tuning: str
    codec: str
    secagg: str
    utility: float
    fixed: Estimate
    matched: Estimate
    gap: Estimate | None = None
    p_value: float | None = None


def matched(found: Sequence[Setting], reference: str) -> tuple[Matched, ...]:
    """Compare how much tunings leak at equal utility, for each codec and kind of sum.

    The level is, seed by seed, the highest utility that every tuning reaches with some budget. "It leaks less" may be
    "it fits less": at equal utility it may not.
    """
    rows: list[Matched] = []
    for codec, secagg in dict.fromkeys((each.labels[1], each.labels[3]) for each in found):
        group = [each for each in found if (each.labels[1], each.labels[3]) == (codec, secagg)]
        rows += _matched_group(group, reference, codec, secagg)
    return _adjusted(rows)


def _curves(group: Sequence[Setting]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Return (utility, AUC) of each tuning and seed, by rising utility."""
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for point in (point for each in group for point in each.points):
        leak = point.leak()
        if leak is not None:
            mine = curves.setdefault(point.cell.tuning, {}).setdefault(point.cell.seed, [])
            mine.append((point.utility, leak.auc))
    return {tuning: {seed: sorted(curve) for seed, curve in by.items()} for tuning, by in curves.items()}


def _levels(curves: dict[str, dict[int, list[tuple[float, float]]]]) -> dict[int, float]:
    """Return the utility that all tunings reach, of each seed that all have and where their ranges meet."""
    seeds = set.intersection(*(set(by) for by in curves.values())) if curves else set()
    levels = {seed: min(by[seed][-1][0] for by in curves.values()) for seed in sorted(seeds)}
    return {seed: level for seed, level in levels.items() if all(by[seed][0][0] <= level for by in curves.values())}


def _matched_group(group: Sequence[Setting], reference: str, codec: str, secagg: str) -> list[Matched]:
    curves = _curves(group)
    levels = _levels(curves)
    if reference not in curves or len(curves) < 2 or not levels:
        return []
    at = {tuning: {s: interpolate(by[s], levels[s]) for s in levels} for tuning, by in curves.items()}
    rows = []
    for tuning, by in curves.items():
        gaps = [at[tuning][seed] - at[reference][seed] for seed in levels]
        rows.append(
            Matched(
                tuning=tuning,
                codec=codec,
                secagg=secagg,
                utility=sum(levels.values()) / len(levels),
                fixed=t_interval([by[seed][-1][1] for seed in levels]),
                matched=t_interval(list(at[tuning].values())),
                gap=None if tuning == reference else t_interval(gaps),
                p_value=None if tuning == reference else t_test(gaps),
            )
        )
    return rows


def _adjusted(rows: Sequence[Matched]) -> tuple[Matched, ...]:
    """Return the rows with p-values adjusted for how many there are."""
    tested = [row for row in rows if row.p_value is not None]
    adjusted = dict(zip(map(id, tested), holm([row.p_value or 0.0 for row in tested]), strict=True))
    return tuple(replace(row, p_value=adjusted.get(id(row))) for row in rows)


def interpolate(curve: Sequence[tuple[float, float]], level: float) -> float:
    """Return the second coordinate at ``level`` of a curve of rising first coordinates; its ends go on flat."""
    if level <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if level <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return curve[-1][1]


__all__ = ["Choice", "Matched", "choose", "describe", "dominates", "front", "interpolate", "matched"]
