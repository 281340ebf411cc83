"""Numbers and guarantees in plain words, shared by the command line and the report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privfed.report.statements import unit_noun
from privfed.report.tradeoff import odds_factor
from privfed.types import VIEWS

# Written out here because strftime's names follow the machine's locale.
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
# Which promise is the headline where several hold: the one most readers meet first.
HEADLINE_ORDER = ("release", "aggregate", "individual")
AGAINST = {
    "individual": "whoever reads one client's own messages",
    "aggregate": "whoever sees the sum of a round's updates",
    "release": "anyone who gets the trained model",
}


def epsilon_text(epsilon: float) -> str:
    """Return an epsilon with two decimals, never rounded down."""
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:,.2f}"


def chance_text(delta: float) -> str:
    """Return a small probability as "1 in N", never understated."""
    if delta <= 0:
        return "zero"
    return f"1 in {math.floor(1 / delta + 1e-6):,}"


def delta_text(delta: float) -> str:
    """Return a delta in short scientific notation, such as 1e-5."""
    return re.sub(r"e([+-])0*", r"e\1", f"{delta:.6g}")


def factor_text(epsilon: float) -> str:
    """Return e^epsilon with two digits, never rounded down."""
    factor = odds_factor(epsilon)
    if factor >= 1e15:
        return "more than a million billion"
    if factor < 10:
        return f"{math.ceil(factor * 10 - 1e-9) / 10:.1f}"
    unit = 10 ** (math.floor(math.log10(factor)) - 1)
    return f"{math.ceil(factor / unit - 1e-9) * unit:,}"


def percent_text(share: float, digits: int = 1) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.{digits}f}%"


def perplexity_text(value: float) -> str:
    """Return a perplexity with three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def percent_up(share: float) -> str:
    """Return a bound on a share as a percentage, never rounded down."""
    return percent_text(math.ceil(1000 * share - 1e-9) / 1000)


def bytes_text(count: float) -> str:
    """Return a number of bytes with a unit that keeps it short."""
    for limit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {name}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """Return a duration in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def when_text(moment: str) -> str:
    """Return an ISO moment as a person writes it, or the text itself where it is none."""
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    if parsed.tzinfo is not None:
        parsed = parsed.astimezone(UTC)
    return f"{parsed.day} {_MONTHS[parsed.month - 1]} {parsed:%Y, %H:%M}{' UTC' if parsed.tzinfo else ''}"


def meaning(view: Mapping[str, Any]) -> str:
    """Return one honest sentence on what a view's epsilon and delta say."""
    verb = "Replacing" if view["neighboring_relation"] == "replace_one" else "Adding or removing"
    return (
        f"{verb} any one {unit_noun(view['unit'])} changes the odds of anything that can be observed by a "
        f"factor of at most {factor_text(view['epsilon'])}, except with a chance of at most "
        f"{chance_text(view['delta'])}."
    )


def attack_sentence(view: Mapping[str, Any]) -> str | None:
    """Return the same guarantee as a limit on an attacker, or None where the receipt has no bound."""
    bound = view.get("attack_bound")
    if not isinstance(bound, Mapping):
        return None
    hits = math.ceil(100 * bound["hit_rate"] - 1e-9)
    return (
        f"An attacker who wrongly accuses 1 in 100 can be right about at most {hits} in 100 "
        f"of the {unit_noun(view['unit'])}s that really were used."
    )


def headline(receipt: Mapping[str, Any]) -> str | None:
    """Return the view whose promise comes first, or None where no view has one."""
    for view in HEADLINE_ORDER:
        if receipt["views"][view]["epsilon"] is not None:
            return view
    return None


def interval(share: float, n: float) -> float | None:
    """Return the half width of the 95% interval of a share measured on ``n`` examples (Wilson)."""
    if n < 1 or not 0 <= share <= 1:
        return None
    z = 1.96
    return z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))


def summarise(receipt: Mapping[str, Any], folder: Path | None = None) -> list[str]:
    """Return the plain lines that close a training run on the command line.

    Args:
        receipt: A receipt as built or read.
        folder: The run folder; adds a line that says where things are.
    """
    lines = [_guarantee_line(receipt)]
    if receipt["private"]:
        lines.append(f"By view:    {'; '.join(_view_text(receipt['views'][v], v) for v in VIEWS)}")
    lines += [_model_line(receipt), _run_line(receipt)]
    lines += [f"Warning:    {sentence}" for sentence in warnings(receipt)]
    if folder is not None:
        lines.append(f"Files:      {folder}: receipt.json, report.html, adapter/, ledger.sqlite")
    return lines


def _guarantee_line(receipt: Mapping[str, Any]) -> str:
    name = headline(receipt)
    if name is None:
        return f"Guarantee:  none. This run is {receipt['verdict']}."
    view = receipt["views"][name]
    return (
        f"Guarantee:  epsilon {epsilon_text(view['epsilon'])} at delta {delta_text(view['delta'])} for one "
        f"{unit_noun(view['unit'])}, against {AGAINST[name]}."
    )


def _view_text(view: Mapping[str, Any], name: str) -> str:
    if view["epsilon"] is None:
        return f"{name} none ({view['why']})"
    return f"{name} epsilon {epsilon_text(view['epsilon'])}"


def _model_line(receipt: Mapping[str, Any]) -> str:
    scores = receipt["utility"]
    if "perplexity" in scores:
        return f"Model:      {_language_scores(scores)}."
    if "accuracy" not in scores:
        return "Model:      not evaluated."
    parts = [f"accuracy {percent_text(scores['accuracy'])}"]
    if "n_test" in scores:
        parts[0] += f" on {int(scores['n_test']):,} test examples"
    if "macro_f1" in scores:
        parts.append(f"macro-F1 {scores['macro_f1']:.3f}")
    if "majority" in scores:
        parts.append(f"always the commonest answer {percent_text(scores['majority'])}")
    return f"Model:      {', '.join(parts)}."


def _language_scores(scores: Mapping[str, float]) -> str:
    first = f"perplexity {perplexity_text(scores['perplexity'])}"
    if "n_test" in scores:
        first += f" on {int(scores['n_test']):,} test examples"
    if "base_perplexity" in scores:
        first += f" (the base model before tuning: {perplexity_text(scores['base_perplexity'])})"
    if "token_accuracy" in scores:
        first += f", next token right {percent_text(scores['token_accuracy'])} of the time"
    return first


def _run_line(receipt: Mapping[str, Any]) -> str:
    setting = receipt["setting"]
    return (
        f"Run:        {receipt['run_id']} {receipt['status']} after {setting['rounds_done']} of "
        f"{setting['rounds_planned']} rounds, {setting['clients']} clients."
    )


def warnings(receipt: Mapping[str, Any]) -> list[str]:
    """Return the sentences not to be missed: a large epsilon, a broken assumption, a poor model."""
    found = [h["sentence"] for h in receipt["hazards"] if h["name"] == "large_epsilon" and h["applies"]]
    accountant = receipt["accountant"] or {"assumptions": []}
    found += [a["sentence"] for a in accountant["assumptions"] if a["status"] == "not_met"]
    if receipt.get("beats_probe") is False:
        found.append("The trained model does not beat a simple head on the frozen base model.")
    return found
