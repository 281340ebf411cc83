"""What the report says, as values: every number is worded here, the template only lays it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from privfed.report import charts, measures, text
from privfed.report.charts import Chart
from privfed.report.glossary import glossary
from privfed.report.load import RunView
from privfed.report.statements import unit_noun
from privfed.types import VIEWS

VIEW_NAMES = {
    "individual": "One client's own messages",
    "aggregate": "The sum of a round",
    "release": "The trained model",
}
VIEW_READERS = {
    "individual": "A server or eavesdropper who can read what a single client sends.",
    "aggregate": "A server that learns only the sum of all clients of a round.",
    "release": "Anyone who downloads the model, including the models of earlier rounds.",
}
SETTING_WORDS = {
    "local": "each client, on its own machine",
    "central": "the server",
    "distributed": "each client, a share of that of the masked sum",
    None: "nobody",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Banner:
    """Something a reader must see before anything else."""

    kind: str
    title: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """One adversary view."""

    name: str
    title: str
    reader: str
    epsilon: str | None
    delta: str
    why: str
    assumptions: tuple[str, ...]
    hit_rate: str
    mu: str
    measured: str


def page(view: RunView) -> dict[str, Any]:
    """Return all that the template needs."""
    receipt = view.receipt
    return {
        "run": view,
        "receipt": receipt,
        "when": text.when_text(receipt["created"]) if receipt else "",
        "facts": _run_facts(view),
        "banners": _banners(view),
        "promise": _promise(view),
        "guarantees": guarantees(receipt) if receipt else (),
        "audited": any(v.get("empirical_epsilon") is not None for v in _views(receipt)),
        "inverted": [(VIEW_NAMES[name], found) for name, found in view.inverted.items()],
        "share": text.percent_text,
        "against": text.AGAINST,
        "costs": measures.costs(view),
        "lost": measures.lost(view),
        "spent": measures.spent(view),
        "score": measures.score(view),
        "bars": measures.bars(view),
        "charts": _charts(view),
        "attacker": _attacker(receipt),
        "partition": charts.partition_chart(view.partition) if view.partition else None,
        "generation": measures.generation(view),
        "samples": view.metrics.finish.samples if view.metrics.finish else (),
        "per_class": view.metrics.finish.per_class if view.metrics.finish else (),
        "dropped": [(r, d) for r in view.metrics.rounds for d in r.dropped],
        "per_client": _per_client(receipt),
        "curve": _curve_rows(receipt),
        "events": _event_rows(receipt),
        "glossary": glossary(language=any(line.perplexity is not None for line in view.metrics.evals)),
        "setting_words": SETTING_WORDS,
        "unit_noun": unit_noun(view.unit),
    }


def _run_facts(view: RunView) -> tuple[measures.Fact, ...]:
    """Return the line under the title: who trained what."""
    start, config = view.metrics.start, view.config
    facts = []
    if start:
        facts.append(measures.Fact(label="clients", value=f"{start.clients:,}", first=True))
        if start.train_rows:
            facts.append(measures.Fact(label="training examples", value=f"{start.train_rows:,}", first=True))
        if start.trained_parameters and start.model_parameters:
            share = text.percent_text(start.trained_parameters / start.model_parameters, 2)
            facts.append(
                measures.Fact(
                    label="trained parameters",
                    value=f"{start.trained_parameters:,}",
                    note=f"{share} of the model",
                    first=True,
                )
            )
    for table, label in (("model", "base model"), ("data", "data"), ("tuning", "method")):
        name = config.get(table, {}).get("name") if isinstance(config.get(table), dict) else None
        if name:
            facts.append(measures.Fact(label=label, value=str(name)))
    return tuple(facts)


def _banners(view: RunView) -> tuple[Banner, ...]:
    """Return what must not be missed, the worst first."""
    found = []
    if view.reproducible:
        found.append(
            Banner(
                kind="bad",
                title="Not private: an experiment with reproducible noise",
                sentence="The noise of this run can be recomputed from its seed, so it protects nobody. "
                "Use the model for experiments only.",
            )
        )
    if view.receipt is None:
        found.append(
            Banner(
                kind="warn",
                title="This run is not finished",
                sentence="There is no receipt yet. What follows is where the run stands; nothing is promised "
                "before the receipt is written.",
            )
        )
    elif view.receipt["status"] == "stopped":
        setting = view.receipt["setting"]
        found.append(
            Banner(
                kind="warn",
                title="This run was stopped early",
                sentence=f"It did {setting['rounds_done']} of {setting['rounds_planned']} rounds. "
                "The receipt counts what was done.",
            )
        )
    if view.receipt:
        found += [Banner(kind="warn", title="Take care", sentence=s) for s in text.warnings(view.receipt)]
        found += [
            Banner(kind="bad", title=f"The self-check “{name}” did not pass", sentence=str(result))
            for name, result in view.receipt["sentinels"].items()
            if not _passed(result)
        ]
    if view.metrics.torn:
        found.append(
            Banner(
                kind="warn",
                title="The last line of metrics.jsonl was cut off",
                sentence="It was left out; the figures before it are complete.",
            )
        )
    return tuple(found)


def _passed(result: object) -> bool:
    return str(result).lower().startswith(("pass", "ok", "not ", "skip"))


def _promise(view: RunView) -> dict[str, Any]:
    """Return the first answer: what was promised, to whom."""
    receipt = view.receipt
    name = text.headline(receipt) if receipt else None
    if receipt and name:
        entry = receipt["views"][name]
        return {
            "kind": "private",
            "epsilon": text.epsilon_text(entry["epsilon"]),
            "chance": text.chance_text(entry["delta"]),
            "delta": text.delta_text(entry["delta"]),
            "who": f"one {unit_noun(entry['unit'])}",
            "against": text.AGAINST[name],
            "meaning": text.meaning(entry),
            "attack": text.attack_sentence(entry),
        }
    if receipt is None and view.unit != "none":
        return {"kind": "open"}
    return {"kind": "none", "why": receipt["verdict"] if receipt else "the configuration asks for none"}


def guarantees(receipt: dict[str, Any]) -> tuple[Guarantee, ...]:
    """Return one entry per adversary view; a view without a promise has no number in it."""
    return tuple(_guarantee(name, receipt["views"][name]) for name in VIEWS)


def _guarantee(name: str, entry: dict[str, Any]) -> Guarantee:
    has = entry["epsilon"] is not None
    bound, mu = entry.get("attack_bound"), entry.get("mu")
    measured = entry.get("empirical_epsilon")
    exact = "" if entry.get("mu_exact") else " (approximately)"
    return Guarantee(
        name=name,
        title=VIEW_NAMES[name],
        reader=VIEW_READERS[name],
        epsilon=text.epsilon_text(entry["epsilon"]) if has else None,
        delta=text.delta_text(entry["delta"]) if has else "",
        why="" if has else str(entry.get("why") or "no guarantee"),
        assumptions=tuple(entry.get("assumptions") or ()),
        hit_rate=text.percent_up(bound["hit_rate"]) if has and bound else "",
        mu=f"{mu:.3f}{exact}" if has and mu is not None else "",
        measured=f"{measured:.2f}" if isinstance(measured, int | float) else "",
    )


def _charts(view: RunView) -> tuple[Chart, ...]:
    budget = charts.budget_chart(view.metrics, measures.cap(view)) if view.may_show_epsilon else None
    return tuple(chart for chart in (charts.quality_chart(view.metrics), budget) if chart)


def _attacker(receipt: dict[str, Any] | None) -> Chart | None:
    name = text.headline(receipt) if receipt else None
    if not receipt or not name:
        return None
    return charts.attacker_chart([(e, d) for e, d in receipt["views"][name].get("curve", [])])


def _per_client(receipt: dict[str, Any] | None) -> tuple[tuple[str, str], ...]:
    if not receipt:
        return ()
    ordered = sorted(receipt["per_client_epsilon"].items(), key=lambda item: (-item[1], item[0]))
    return tuple((client, text.epsilon_text(epsilon)) for client, epsilon in ordered)


def _views(receipt: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [receipt["views"][name] for name in VIEWS] if receipt else []


def _curve_rows(receipt: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the (epsilon, delta) curve of the headline view."""
    name = text.headline(receipt) if receipt else None
    if not receipt or not name:
        return []
    return [(f"{e:.4g}", text.delta_text(d)) for e, d in receipt["views"][name].get("curve", [])]


def _event_rows(receipt: dict[str, Any] | None) -> list[tuple[str, ...]]:
    return [
        (
            str(number),
            str(event["mechanism"]),
            f"one {unit_noun(event['unit'])}",
            f"{event['noise_multiplier']:.4g}",
            f"{event['sampling_probability']:.4g}",
            f"{event['steps']:,}",
        )
        for number, event in enumerate(receipt["events"] if receipt else [], start=1)
    ]
