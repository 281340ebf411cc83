"""From finished cells to what is compared: utility, leakage and bytes of each configuration, with intervals over seeds.

A *setting* is a place on all axes but the seed; its cells are its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from privfed.report.text import interval as wilson
from privfed.types import VIEWS
from privfed_audits.grids.cells import Cell
from privfed_audits.grids.grid import place_name
from privfed_audits.grids.store import Record
from privfed_audits.statistics import Estimate, t_interval

Labels = tuple[str, str, str, str]
# the first of these that a run has scored is its utility; perplexity is better where it is lower
UTILITIES = ("accuracy", "perplexity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What an audit measured in one view.

    Attributes:
        accounted: The epsilon that the accountant states; None without a guarantee.
        empirical: The audit's lower bound on epsilon.
        interval: Its interval as the audit gives it.
        ceiling: What the bound would give against an ideal Gaussian mechanism of the accounted epsilon.
        auc: Area under the best attack's curve.
        tpr: A false positive rate and the true positive rate there; None with too few canaries for any.
    """

    accounted: float | None
    empirical: float
    interval: tuple[float, float]
    ceiling: float | None
    auc: float
    tpr: tuple[float, float] | None
    attack: str
    bound: str
    canaries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A finished cell's figures.

    Attributes:
        epsilon: Accounted, of the released model; None without a guarantee.
        utility: Test accuracy, or minus perplexity: higher is better.
        bytes_run: What a client sent in the whole run, on average.
        bytes_round: What a client sent in a round of the main phase.
        leaks: By view; empty where the run was not audited.
    """

    cell: Cell
    record: Record
    epsilon: float | None
    utility: float
    n_test: int
    bytes_run: float
    bytes_round: float
    leaks: Mapping[str, Leak] = field(default_factory=dict)

    def leak(self, view: str | None = None) -> Leak | None:
        """Return what was measured in a view; by default in the one that leaks most."""
        if view is not None:
            return self.leaks.get(view)
        return max(self.leaks.values(), key=lambda each: (each.empirical, each.auc), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A configuration over its seeds.

    Attributes:
        epsilon: The largest accounted epsilon of its seeds (the released model's); None without a guarantee.
        utility: With its interval over seeds, or for a single seed over the test rows.
        leakage: Empirical epsilon of the view that leaks most, or None where nothing was audited.
        auc: Of the same view.
    """

    labels: Labels
    points: tuple[Point, ...]
    epsilon: float | None
    utility: Estimate
    bytes_run: float
    bytes_round: float
    leakage: Estimate | None
    auc: Estimate | None

    @property
    def name(self) -> str:
        """What tells it from the others, in words."""
        return place_name(self.labels)

    @property
    def private(self) -> bool:
        """Whether its released model has a guarantee."""
        return self.epsilon is not None

    def in_view(self, view: str) -> tuple[Estimate, Estimate] | None:
        """Return empirical epsilon and AUC in one view over the seeds, or None where it was not attacked."""
        found = [leak for point in self.points if (leak := point.leak(view)) is not None]
        return (leak_estimate(found), t_interval([leak.auc for leak in found])) if found else None


def points(cells: Sequence[Cell], records: Mapping[str, Record]) -> tuple[Point, ...]:
    """Return the figures of all cells that are done, each configuration's in the order of its seeds."""
    done = [cell for cell in cells if records.get(cell.key, {}).get("state") == "done"]
    return tuple(found for cell in done if (found := _point(cell, records[cell.key])) is not None)


def settings(found: Sequence[Point]) -> tuple[Setting, ...]:
    """Return the configurations, in the order of the axes."""
    groups: dict[Labels, list[Point]] = {}
    for point in found:
        groups.setdefault(point.cell.labels, []).append(point)
    return tuple(_setting(labels, group) for labels, group in groups.items())


def utility_name(found: Sequence[Point]) -> str:
    """Return what utility is in these cells."""
    return _named(found[0].record["utility"]) or UTILITIES[0] if found else UTILITIES[0]


def shown_utility(name: str, value: float) -> str:
    """Return a utility as people read it."""
    return f"{-value:.2f}" if name == "perplexity" else f"{100 * value:.1f}%"


def leak_estimate(leaks: Sequence[Leak]) -> Estimate:
    """Return the mean empirical epsilon with its interval over seeds, or of a single seed the audit's own."""
    if len(leaks) == 1:
        low, high = leaks[0].interval
        return Estimate(mean=leaks[0].empirical, low=low, high=high, n=1, over="the bound")
    return t_interval([leak.empirical for leak in leaks])


def _point(cell: Cell, record: Record) -> Point | None:
    scores = record["utility"]
    name = _named(scores)
    if name is None:
        return None
    release = record["promises"]["release"]
    return Point(
        cell=cell,
        record=record,
        epsilon=release["epsilon"],
        utility=float(scores[name]) if name != "perplexity" else -float(scores[name]),
        n_test=int(scores.get("n_test", 0)),
        bytes_run=float(record["bytes_run"]),
        bytes_round=float(record["bytes_round"]),
        leaks={view: _leak(record, view) for view in VIEWS if view in _audited(record)},
    )


def _named(scores: Mapping[str, Any]) -> str | None:
    return next((name for name in UTILITIES if scores.get(name) is not None), None)


def _audited(record: Record) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record.get("audit", {}).get("views", {})
    return {view: each for view, each in found.items() if each.get("empirical_epsilon") is not None}


def _leak(record: Record, view: str) -> Leak:
    found, promise = record["audit"]["views"][view], record["promises"][view]
    low, high = (None if value is None else float(value) for value in found["interval"])
    empirical, tpr = float(found["empirical_epsilon"]), found["tpr_at_fpr"]
    return Leak(
        accounted=promise["epsilon"],
        empirical=empirical,
        interval=(empirical if low is None else low, math.inf if high is None else high),
        ceiling=found.get("ceiling"),
        auc=float(found["auc"]),
        tpr=None if tpr is None else (float(tpr["fpr"]), float(tpr["tpr"])),
        attack=str(found["attack"]),
        bound=str(found["bound"]),
        canaries=int(found["canaries"]),
    )


def _setting(labels: Labels, group: Sequence[Point]) -> Setting:
    leaks = [leak for point in group if (leak := point.leak()) is not None]
    epsilons = [point.epsilon for point in group]
    return Setting(
        labels=labels,
        points=tuple(group),
        epsilon=None if None in epsilons else max(e for e in epsilons if e is not None),
        utility=_utility(group),
        bytes_run=sum(point.bytes_run for point in group) / len(group),
        bytes_round=sum(point.bytes_round for point in group) / len(group),
        leakage=leak_estimate(leaks) if leaks else None,
        auc=t_interval([leak.auc for leak in leaks]) if leaks else None,
    )


def _utility(group: Sequence[Point]) -> Estimate:
    found = t_interval([point.utility for point in group])
    only = group[0]
    half = wilson(only.utility, only.n_test) if found.n == 1 and 0 <= only.utility <= 1 else None
    if half is None:
        return found
    return Estimate(mean=found.mean, low=found.mean - half, high=found.mean + half, n=1, over="test rows")


__all__ = [
    "UTILITIES",
    "Leak",
    "Point",
    "Setting",
    "leak_estimate",
    "points",
    "settings",
    "shown_utility",
    "utility_name",
]
