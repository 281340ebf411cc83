"""What a run cost and how good its model is, worded for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from privfed.report import text
from privfed.report.load import Round, RunView

_THIS_MODEL = "This model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One horizontal bar of a comparison."""

    label: str
    value: str
    percent: float
    main: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One number with its name and a remark; ``first`` where the number reads better before the name."""

    label: str
    value: str
    note: str = ""
    first: bool = False


def costs(view: RunView) -> tuple[Fact, ...]:
    """Return time, traffic and accuracy lost to privacy, as far as they are known."""
    rounds, finish = view.metrics.rounds, view.metrics.finish
    facts = []
    seconds = finish.seconds if finish else None
    if seconds is None and rounds:
        seconds = sum(r.seconds.get("total", 0.0) for r in rounds)
    if seconds is not None:
        facts.append(Fact(label="of computing", value=text.seconds_text(seconds), note=_slowest(rounds)))
    sent = sum(r.bytes_up for r in rounds)
    if sent:
        each = max(r.bytes_up_per_client for r in rounds)
        note = f"{text.bytes_text(each)} per client and round" if each else ""
        facts.append(Fact(label="sent by the clients", value=text.bytes_text(sent), note=note))
    received = sum(r.bytes_down for r in rounds)
    if received:
        facts.append(Fact(label="sent to the clients", value=text.bytes_text(received)))
    return tuple(facts)


def _slowest(rounds: tuple[Round, ...]) -> str:
    """Return which part of the rounds took longest."""
    parts: dict[str, float] = {}
    for done in rounds:
        for name, value in done.seconds.items():
            if name != "total":
                parts[name] = parts.get(name, 0.0) + value
    total = sum(r.seconds.get("total", 0.0) for r in rounds)
    if not parts or total <= 0:
        return ""
    name, value = max(parts.items(), key=lambda item: item[1])
    return f"{text.percent_text(min(value / total, 1), 0)} of the round time: {name}"


def cap(view: RunView) -> float | None:
    """Return the epsilon that the run was allowed to spend, where it had a limit."""
    start = view.metrics.start
    limit = start.planned_epsilon if start and start.planned_epsilon else view.table.get("target_epsilon")
    return float(limit) if isinstance(limit, int | float) else None


def spent(view: RunView) -> dict[str, Any] | None:
    """Return the budget line; a run whose epsilon means nothing has none."""
    if not view.may_show_epsilon:
        return None
    so_far = [r.epsilon for r in view.metrics.rounds if r.epsilon is not None]
    name = text.headline(view.receipt) if view.receipt else None
    if view.receipt and name:
        so_far = [view.receipt["views"][name]["epsilon"]]  # the receipt has the last word
    limit = cap(view)
    if not so_far or not limit:
        return None
    return {
        "spent": text.epsilon_text(so_far[-1]),
        "cap": text.epsilon_text(limit),
        "percent": min(100.0, 100 * so_far[-1] / limit),
    }


def _scores(view: RunView) -> dict[str, float]:
    """Return the scores by name: the receipt's, else those of the last evaluation."""
    scores = dict(view.receipt["utility"]) if view.receipt else {}
    if view.metrics.evals:
        last = view.metrics.evals[-1]
        for key, value in (
            ("accuracy", last.accuracy),
            ("macro_f1", last.macro_f1),
            ("majority", last.majority),
            ("n_test", last.n),
        ):
            if value is not None:
                scores.setdefault(key, value)
    return {k: v for k, v in scores.items() if isinstance(v, int | float) and math.isfinite(v)}


def score(view: RunView) -> dict[str, Any] | None:
    """Return the accuracy with its interval, or None where nothing was evaluated."""
    scores = _scores(view)
    if "accuracy" not in scores:
        return None
    n = int(scores.get("n_test", 0))
    half = text.interval(scores["accuracy"], n)
    f1 = scores.get("macro_f1")
    return {
        "accuracy": text.percent_text(scores["accuracy"]),
        "half": None if half is None else f"{100 * half:.1f}",
        "n": f"{n:,}" if n else None,
        "f1": None if f1 is None else f"{f1:.3f}",
    }


def bars(view: RunView) -> tuple[Bar, ...]:
    """Return this model's accuracy between what costs nothing and what protects nobody."""
    scores = _scores(view)
    compared: list[tuple[str, tuple[str, ...]]] = [
        ("Always the commonest answer", ("majority",)),
        ("Head on the frozen model", ("probe_accuracy", "probe")),
        (_THIS_MODEL, ("accuracy",)),
    ]
    if view.may_show_epsilon:
        compared.append(("Same training, no privacy", ("non_private_accuracy", "non_private")))
    found = [(label, scores[key]) for label, keys in compared for key in keys if key in scores]
    if len(found) < 2 or "accuracy" not in scores:
        return ()
    return tuple(
        Bar(
            label=label,
            value=text.percent_text(value),
            percent=min(max(100 * value, 0), 100),
            main=label == _THIS_MODEL,
        )
        for label, value in found
    )


def lost(view: RunView) -> Fact | None:
    """Return the accuracy that privacy cost; without a run to compare with, what is left of it."""
    scores = _scores(view)
    other = scores.get("non_private_accuracy", scores.get("non_private"))
    if not view.may_show_epsilon or "accuracy" not in scores:
        return None
    if other is None:
        if "majority" not in scores:
            return None
        return Fact(
            label="of accuracy over always the commonest answer",
            value=f"{100 * (scores['accuracy'] - scores['majority']):+.1f} points",
            note="What privacy itself cost is not known: no run without it was measured.",
        )
    points = 100 * (other - scores["accuracy"])
    return Fact(label="of accuracy lost to privacy", value=f"{points:.1f} points")
