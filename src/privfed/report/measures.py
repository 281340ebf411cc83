"""What a run cost and how good its model is, worded for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from privfed.report import text
from privfed.report.load import Round, RunView

_THIS_MODEL = "This model"
_OPEN = "Same training, no privacy"
_UNKNOWN = "What privacy itself cost is not known: no run without it was measured."
_FREE_CLASSES = (
    ("Always the commonest answer", ("majority",)),
    ("Head on the frozen model", ("probe_accuracy", "probe")),
)
_FREE_LANGUAGE = (("The base model, before tuning", ("base_perplexity",)),)


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
        names = ("accuracy", "macro_f1", "matthews", "majority", "perplexity", "token_accuracy")
        for key, value in (*((name, getattr(last, name)) for name in names), ("n_test", last.n)):
            if value is not None:
                scores.setdefault(key, value)
        first = view.metrics.evals[0]
        if first.perplexity is not None and first.round == 0:
            scores.setdefault("base_perplexity", first.perplexity)
    return {k: v for k, v in scores.items() if isinstance(v, int | float) and math.isfinite(v)}


def score(view: RunView) -> dict[str, str] | None:
    """Return the score as ``value``, the ``word`` after it and the line ``under`` it; None if nothing was evaluated."""
    scores = _scores(view)
    n = int(scores.get("n_test", 0))
    if "perplexity" in scores:
        under = ["smaller is better"]
        if n:
            under.append(f"on {n:,} test examples")
        if "token_accuracy" in scores:
            under.append(f"the next token is right {text.percent_text(scores['token_accuracy'])} of the time")
        return {"value": text.perplexity_text(scores["perplexity"]), "word": "perplexity", "under": "; ".join(under)}
    if "accuracy" not in scores:
        return None
    half = text.interval(scores["accuracy"], n)
    under = [f"of {n:,} test examples" + ("" if half is None else f", ± {100 * half:.1f} points")] if n else []
    if "macro_f1" in scores:
        under.append(f"macro-F1 {scores['macro_f1']:.3f}")
    return {"value": text.percent_text(scores["accuracy"]), "word": "right", "under": "; ".join(under)}


def bars(view: RunView) -> tuple[Bar, ...]:
    """Return this model's score between what costs nothing and what protects nobody."""
    scores = _scores(view)
    language = "perplexity" in scores
    free = _FREE_LANGUAGE if language else _FREE_CLASSES
    compared: list[tuple[str, tuple[str, ...]]] = [*free, (_THIS_MODEL, (_primary(scores),))]
    if view.may_show_epsilon:
        compared.append((_OPEN, (f"non_private_{_primary(scores)}", "non_private")))
    found = [(label, scores[key]) for label, keys in compared for key in keys if key in scores]
    if len(found) < 2 or _primary(scores) not in scores:
        return ()
    whole = max(value for _, value in found) if language else 1.0
    return tuple(
        Bar(
            label=label,
            value=text.perplexity_text(value) if language else text.percent_text(value),
            percent=min(max(100 * value / whole, 0), 100),
            main=label == _THIS_MODEL,
        )
        for label, value in found
    )


def _primary(scores: dict[str, float]) -> str:
    return "perplexity" if "perplexity" in scores else "accuracy"


def lost(view: RunView) -> Fact | None:
    """Return the quality that privacy cost; without a run to compare with, what is left of it."""
    scores = _scores(view)
    primary = _primary(scores)
    other = scores.get(f"non_private_{primary}", scores.get("non_private"))
    if not view.may_show_epsilon or primary not in scores:
        return None
    if primary == "perplexity":
        return _lost_perplexity(scores, other)
    if other is None:
        if "majority" not in scores:
            return None
        return Fact(
            label="of accuracy over always the commonest answer",
            value=f"{100 * (scores['accuracy'] - scores['majority']):+.1f} points",
            note=_UNKNOWN,
        )
    points = 100 * (other - scores["accuracy"])
    return Fact(label="of accuracy lost to privacy", value=f"{points:.1f} points")


def _lost_perplexity(scores: dict[str, float], other: float | None) -> Fact | None:
    if other is not None:
        return Fact(label="of perplexity lost to privacy", value=f"{scores['perplexity'] - other:+.2f}")
    if "base_perplexity" not in scores:
        return None
    return Fact(
        label="of perplexity against the base model before tuning (less is better)",
        value=f"{100 * (scores['perplexity'] / scores['base_perplexity'] - 1):+.1f}%",
        note=_UNKNOWN,
    )


def generation(view: RunView) -> tuple[Fact, ...]:
    """Return how close a language model's texts are to the references, as far as that was measured."""
    finish = view.metrics.finish
    found = finish.generation if finish else {}
    facts = [
        Fact(label=f"ROUGE-{name.removeprefix('rouge')}", value=f"{found[name]:.3f}")
        for name in ("rouge1", "rouge2", "rougeL")
        if name in found
    ]
    if "bleu" in found:
        facts.append(Fact(label="BLEU", value=f"{found['bleu']:.1f}"))
    return tuple(facts)
