"""The receipt of a run: what was promised to whom, under which assumptions, as plain JSON.

A view of the adversary that has no guarantee carries ``"epsilon": null``, a sentence why, and no number at
all, so that neither a reader nor a program can mistake an absent promise for a large one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from privfed.errors import ConfigError
from privfed.files import write_atomic
from privfed.report import statements
from privfed.report.tradeoff import FALSE_ALARM, clean_curve, hit_rate_bound
from privfed.types import VIEWS, PrivacyEvent, Relation, View

FORMAT = "privfed-receipt"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewFacts:
    """What one adversary view was promised.

    Attributes:
        epsilon: The promise at the run's delta, or None where there is none.
        why: Why there is no promise; only read where ``epsilon`` is None.
        curve: Points (epsilon, delta), each of which holds for the whole run.
        mu: Parameter of the Gaussian trade-off (mu-GDP), where known.
        mu_exact: Whether ``mu`` is a theorem for this mechanism and not a fit to the curve.
        assumptions: Sentences that hold for this view only.
        epsilon_survivors: With distributed noise, epsilon for the clients that really survived each round.
    """

    epsilon: float | None
    why: str | None = None
    curve: tuple[tuple[float, float], ...] = ()
    mu: float | None = None
    mu_exact: bool = False
    assumptions: tuple[str, ...] = ()
    epsilon_survivors: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptFacts:
    """Everything a receipt is made from; the caller measures, this package only words it.

    Attributes:
        unit: What one neighbouring data set adds or removes; ``"none"`` for a run without privacy.
        placement: Who adds the noise: each client (``"local"``), the server (``"central"``), or each client a share
            of that of the masked sum (``"distributed"``).
        noise_description: How the noise is drawn, as a clause, e.g. ``"float64 Gaussian"``.
        views: The promise per adversary view; a view left out has none.
        per_client: Epsilon by client, where each client keeps its own ledger.
        events: What happened to the data of the client with the largest epsilon.
        utility: Scores by name: accuracy, macro_f1, majority, n_test, and where measured probe_accuracy and
            non_private_accuracy.
        beats_probe: Whether training beat a head on the frozen base model; None where that was not measured.
        sentinels: Result of each self-check of the training.
        released: What leaves the protected side.
        delta_set_aside: The part of delta that the accountant did not get, for what it does not cover.
    """

    run_id: str
    created: str
    config_digest: str
    data_name: str
    data_digest: str
    partition_digest: str
    ledger_head: str
    unit: Literal["example", "client", "none"]
    placement: Literal["local", "central", "distributed"]
    secagg: bool
    relation: Relation
    accountant: str
    delta: float
    mechanism: str
    noise_multiplier: float | None
    l2_clip_norm: float
    noise_source: Literal["csprng", "reproducible", "none"]
    noise_description: str
    sampling: Literal["poisson", "scheduled", "shuffled"]
    views: Mapping[View, ViewFacts]
    per_client: Mapping[str, float] = field(default_factory=dict)
    events: tuple[PrivacyEvent, ...] = ()
    rounds_planned: int
    rounds_done: int
    clients: int
    versions: Mapping[str, str]
    utility: Mapping[str, float] = field(default_factory=dict)
    adapter_digest: str
    beats_probe: bool | None = None
    sentinels: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    released: Literal["every_iterate", "last", "sum_only"] = "every_iterate"
    delta_set_aside: float = 0.0


def build_receipt(facts: ReceiptFacts) -> dict[str, Any]:
    """Return the receipt of a run as plain JSON values.

    Args:
        facts: What was measured and accounted.

    Returns:
        A dict that ``json.dumps(..., allow_nan=False)`` accepts.
    """
    void = _void_reason(facts)
    views = {view: _view(facts, view, void) for view in VIEWS}
    epsilons = [entry["epsilon"] for entry in views.values() if entry["epsilon"] is not None]
    private = bool(epsilons)
    receipt: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "run_id": facts.run_id,
        "created": facts.created,
        "status": "finished" if facts.rounds_done >= facts.rounds_planned else "stopped",
        "private": private,
        "verdict": _verdict(facts, void, private),
        "views": views,
        "setting": _setting(facts),
        "coverage": statements.coverage(private),
        "released": statements.released(facts.released),
        "mechanism": _mechanism(facts),
        "accountant": _accountant(facts) if private else None,
        "per_client_epsilon": _finite(facts.per_client) if private else {},
        "events": [_event(event) for event in facts.events],
        "ledger_head": facts.ledger_head,
        "hazards": statements.hazards(unit=facts.unit, largest_epsilon=max(epsilons, default=None), private=private),
        "data": {
            "name": facts.data_name,
            "digest": facts.data_digest,
            "partition_digest": facts.partition_digest,
        },
        "config_digest": facts.config_digest,
        "adapter_sha256": facts.adapter_digest,
        "versions": dict(facts.versions),
        "utility": _finite(facts.utility),
        "beats_probe": facts.beats_probe,
        "sentinels": dict(facts.sentinels),
        "notes": list(facts.notes),
    }
    if facts.noise_source == "reproducible" and facts.unit != "none":
        receipt["simulated"] = _simulated(facts)
    return receipt


def _void_reason(facts: ReceiptFacts) -> str | None:
    """Return why no view of this run can have a guarantee, or None."""
    if facts.unit == "none" or facts.noise_source == "none":
        return statements.NO_NOISE
    return statements.REPRODUCIBLE if facts.noise_source == "reproducible" else None


def _verdict(facts: ReceiptFacts, void: str | None, private: bool) -> str:
    if void:
        return void
    if not private:
        return "not private: no adversary view of this run has a guarantee"
    noun = statements.unit_noun(facts.unit)
    return f"differentially private for one {noun}, for the views that state an epsilon"


def _view(facts: ReceiptFacts, view: View, void: str | None) -> dict[str, Any]:
    given = facts.views.get(view)
    if void or given is None or given.epsilon is None or not math.isfinite(given.epsilon):
        return _no_guarantee(given, void)
    curve = clean_curve((*given.curve, (given.epsilon, facts.delta)))
    actual = given.epsilon_survivors
    return {
        "epsilon": float(given.epsilon),
        **({} if actual is None else {"epsilon_survivors": float(actual)}),
        "delta": float(facts.delta),
        "unit": facts.unit,
        "neighboring_relation": facts.relation,
        "accountant": facts.accountant,
        "assumptions": list(given.assumptions),
        "curve": [list(point) for point in curve],
        "mu": given.mu if given.mu is not None and math.isfinite(given.mu) else None,
        "mu_exact": given.mu_exact if given.mu is not None else False,
        "attack_bound": {"false_alarm": FALSE_ALARM, "hit_rate": hit_rate_bound(curve, FALSE_ALARM)},
    }


def _no_guarantee(given: ViewFacts | None, void: str | None) -> dict[str, Any]:
    """Return the entry of a view without a promise: the same keys, no number."""
    why = void or (given.why if given else None)
    if why is None and given is not None and given.epsilon is not None:
        why = "the accountant finds no finite epsilon"
    return {
        "epsilon": None,
        "why": why or "no guarantee was established for this view",
        "delta": None,
        "unit": None,
        "neighboring_relation": None,
        "accountant": None,
        "assumptions": [],
        "curve": [],
        "mu": None,
        "mu_exact": False,
        "attack_bound": None,
    }


def _setting(facts: ReceiptFacts) -> dict[str, Any]:
    return {
        "kind": "federated training: the clients keep their data and send model updates",
        "unit": facts.unit,
        "placement": facts.placement if facts.unit != "none" else None,
        "secure_aggregation": facts.secagg,
        "clients": facts.clients,
        "rounds_planned": facts.rounds_planned,
        "rounds_done": facts.rounds_done,
        "trust_model": statements.trust_model(unit=facts.unit, placement=facts.placement, secagg=facts.secagg),
    }


def _mechanism(facts: ReceiptFacts) -> dict[str, Any]:
    noisy = facts.unit != "none" and facts.noise_source != "none"
    return {
        "name": facts.mechanism,
        "noise_multiplier": facts.noise_multiplier if noisy else None,
        "l2_clip_norm": facts.l2_clip_norm if noisy else None,
        "sampling": facts.sampling,
        "noise_source": facts.noise_source if noisy else "none",
        "noise_description": facts.noise_description if noisy else "no noise was added",
    }


def _accountant(facts: ReceiptFacts) -> dict[str, Any]:
    amplified = any(event.sampling_probability < 1 for event in facts.events)
    return {
        "name": facts.accountant,
        "delta": facts.delta,
        "delta_set_aside": facts.delta_set_aside,
        "neighboring_relation": facts.relation,
        "relation_sentence": statements.relation(facts.relation, facts.unit),
        "assumptions": statements.assumptions(
            sampling=facts.sampling,
            amplified=amplified,
            noise_source=facts.noise_source,
            noise_description=facts.noise_description,
            exact_noise=facts.placement == "distributed",
        ),
    }


def _simulated(facts: ReceiptFacts) -> dict[str, Any]:
    """Return what the accountant says of an experiment whose noise is not secret: no promise."""
    return {
        "sentence": "What this run would guarantee had its noise been secret. It guarantees nothing.",
        "delta": facts.delta,
        "epsilon": _finite({view: given.epsilon for view, given in facts.views.items()}),
    }


def _event(event: PrivacyEvent) -> dict[str, Any]:
    """Return an event as JSON values; a third party computes epsilon from these alone."""
    parameters = {name: list(value) if isinstance(value, tuple) else value for name, value in event.parameters}
    return {**asdict(event), "parameters": parameters}


def _finite(values: Mapping[Any, float | None]) -> dict[str, float]:
    """Return the finite numbers of a mapping; JSON has no other."""
    return {str(key): value for key, value in values.items() if value is not None and math.isfinite(value)}


def write_receipt(path: Path, receipt: Mapping[str, Any]) -> None:
    """Write a receipt so that a crash leaves the old file or the new one."""
    write_atomic(path, rendered(receipt))


def rendered(receipt: Mapping[str, Any]) -> bytes:
    """Return a receipt as the bytes of its file; a lone surrogate becomes a question mark."""
    text = json.dumps(receipt, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", errors="replace")


def with_audit(receipt: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a receipt with what attacks proved, by view; a signature is left out, for it was over other content.

    Args:
        receipt: The receipt.
        found: By view ``empirical_epsilon``, ``interval``, ``attack``, ``bound``, ``canaries`` and ``confidence``.
    """
    views = {view: {**entry, **found.get(view, {})} for view, entry in receipt["views"].items()}
    return {**{key: value for key, value in receipt.items() if key != "signature"}, "views": views}


def read_receipt(path: Path) -> dict[str, Any]:
    """Read a receipt and check that it is one.

    Raises:
        ConfigError: If the file is missing, garbled, or of another format.
    """
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise ConfigError(f"There is no receipt at {path}: the run has not finished, or never ran.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"The receipt {path} cannot be read as JSON: {error}.") from error
    problem = _problem(receipt)
    if problem:
        raise ConfigError(f"{path} is not a privfed receipt of format {FORMAT_VERSION}: {problem}.")
    return dict(receipt)


_SHAPE: dict[str, type | tuple[type, ...]] = {
    "run_id": str,
    "created": str,
    "status": str,
    "private": bool,
    "verdict": str,
    "views": dict,
    "setting": dict,
    "coverage": dict,
    "released": dict,
    "mechanism": dict,
    "accountant": (dict, type(None)),
    "per_client_epsilon": dict,
    "events": list,
    "ledger_head": str,
    "hazards": list,
    "data": dict,
    "config_digest": str,
    "adapter_sha256": str,
    "versions": dict,
    "utility": dict,
    "sentinels": dict,
    "notes": list,
}
_EPSILONS = ("epsilon", "empirical_epsilon", "delta")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _problem(receipt: object) -> str | None:
    """Return what keeps a value from being a receipt, or None."""
    if not isinstance(receipt, dict):
        return "it is not an object"
    if (receipt.get("format"), receipt.get("format_version")) != (FORMAT, FORMAT_VERSION):
        return f"its format is {receipt.get('format')!r}, version {receipt.get('format_version')!r}"
    for key, kind in _SHAPE.items():
        if not isinstance(receipt.get(key), kind) or key not in receipt:
            return f"{key!r} is missing or of the wrong kind"
    for view in VIEWS:
        entry = receipt["views"].get(view)
        if not isinstance(entry, dict) or "epsilon" not in entry:
            return f"the view {view!r} is missing"
        for key in _EPSILONS:
            value = entry.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                return f"{key!r} of the view {view!r} is not a number"
    return None
