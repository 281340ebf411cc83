"""Reconstructions beside the texts that they are of, and beside what is guessed without any update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from privfed.federation.shared import NOTHING, SharedWork
from privfed.types import View
from privfed_audits.reconstruction import PRIOR, reconstruct

EXAMPLES = 12


def gallery(
    folder: Path, attacks: Sequence[str], *, view: View, clients: int, shared: SharedWork = NOTHING
) -> dict[str, Any]:
    """Return the best attack of a view with its scores, the baseline's, and examples: the worst leaks and the median.

    Args:
        folder: The run folder.
        attacks: Inversion attacks.
        view: What the adversary sees.
        clients: Of how many clients single updates are attacked.
        shared: What else has computed the run's data already.
    """
    found = reconstruct(folder, attacks, view=view, clients=clients, keep=True, shared=shared)
    rows = [row for row in found["results"] if row["attack"] != PRIOR]
    prior = [row for row in found["results"] if row["attack"] == PRIOR]
    names = sorted({row["attack"] for row in rows})
    best = max(names, key=lambda name: _mean(rows, name, "token_recall"))
    pairs = [pair for row in rows if row["attack"] == best for pair in row["texts"]]
    guessed = [pair for row in prior for pair in row["texts"]]
    by_truth = {pair["truth"]: pair["found"] for pair in guessed}
    examples = [{**pair, "prior": by_truth.get(pair["truth"], "")} for pair in pairs]
    examples.sort(key=lambda pair: -pair["score"])
    return {
        "attack": best,
        "token_recall": _mean(rows, best, "token_recall"),
        "prior_token_recall": _mean(prior, PRIOR, "token_recall"),
        "token_precision": _mean(rows, best, "token_precision"),
        "prior_token_precision": _mean(prior, PRIOR, "token_precision"),
        "rouge_l": _mean(rows, best, "rougeL"),
        "prior_rouge_l": _mean(prior, PRIOR, "rougeL"),
        "examples": _spread(examples),
    }


def _mean(rows: Sequence[Any], name: str, key: str) -> float:
    values = [float(row[key]) for row in rows if row["attack"] == name]
    return sum(values) / max(1, len(values))


def _spread(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the worst leaks, which come first, and some around the median, each with its ``place``."""
    half = EXAMPLES // 2
    worst = min(half, max(1, len(examples) // 2))
    start = max(worst, len(examples) // 2 - half // 2)
    chosen = [("worst", each) for each in examples[:worst]]
    chosen += [("median", each) for each in examples[start : start + half]]
    return [{"place": place, **each} for place, each in chosen]
