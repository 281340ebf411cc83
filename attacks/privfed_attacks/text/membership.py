"""Which (token, position) pairs are behind what was observed: the first half of the span attack.

Shape suffixes: N candidates, S positions, d width, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from privfed_attacks.observation import Observation
from privfed_attacks.public_model import PublicModel
from privfed_attacks.text.inputs import Group, fingerprint, groups, payload_rows
from privfed_attacks.text.pursuit import Explained, Limits, dictionary_of, explain
from privfed_attacks.text.spans import Span, noise_of, span_of

Rows = tuple[NDArray[np.float64], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """What passed the test.

    Attributes:
        pairs: (token, position); position -1 where the input does not depend on it.
        evidence: How much stronger each is than noise would be.
        positional: Whether positions are known.
        facts: For the report.
    """

    pairs: tuple[tuple[int, int], ...]
    evidence: NDArray[np.float64] = field(repr=False)
    positional: bool
    facts: dict[str, float | int | str]

    def at(self, position: int) -> tuple[int, ...]:
        """Return the tokens that may be at a position, the surest first."""
        sure = sorted(zip(-self.evidence, self.pairs, strict=True))
        return tuple(token for _, (token, place) in sure if place in (-1, position))


_OUTSIDE = 8  # with fewer directions outside a span, distances from it vary too much to tell anything


def members(
    observations: Sequence[Observation], model: PublicModel, max_tokens: int, limits: Limits | None = None
) -> Members:
    """Return the tokens at positions whose inputs explain what was observed.

    Args:
        observations: Of one client, or of sums over the same clients; each may be of another round.
        model: The adversary's model; its parameters are set to what was broadcast.
        max_tokens: How long texts may be.
        limits: When the search stops.
    """
    stacked = _stacked(observations, model, max_tokens)
    facts: dict[str, float | int | str] = {"dictionaries": len(stacked), "rank": 0}
    pairs: dict[tuple[int, int], float] = {}
    positional = False
    for last, group, rows in stacked:
        span = span_of(rows)
        if span.rank >= int(facts["rank"]):
            facts |= {"rank": span.rank, "width": span.width, "rows": span.rows, "saturated": int(span.saturated)}
        positional |= group.positional
        if span.saturated or span.width - span.rank < _OUTSIDE:
            continue
        found = _explained(model.at(last), model, group, span, max_tokens, limits)
        facts |= {"null": round((1 - found.usual) ** 0.5, 4), "left": round(found.left, 2)}
        for pair, evidence in zip(found.pairs, found.evidence_s, strict=True):
            place = pair if group.positional else (pair[0], -1)
            pairs[place] = max(float(evidence), pairs.get(place, 0.0))
    order = sorted(pairs)
    facts["members"] = len(order)
    return Members(
        pairs=tuple(order),
        evidence=np.array([pairs[pair] for pair in order]),
        positional=positional,
        facts=facts,
    )


def _stacked(
    observations: Sequence[Observation], model: PublicModel, length: int
) -> list[tuple[Observation, Group, list[Rows]]]:
    """Return (an observation, its first group, rows of all rounds in which the dictionary is the same)."""
    vocabulary = len(model.tokenizer)
    found: dict[tuple[bytes, str], tuple[Observation, Group, list[Rows]]] = {}
    for observation in observations:
        module = model.at(observation)
        for group in groups(module, observation.layout.names, vocabulary, min(8, length)):
            if group.depth:
                continue
            key = (fingerprint(module, group.first, vocabulary), group.first.tensor)
            entry = found.setdefault(key, (observation, group, []))
            for site, rows in payload_rows(group, observation.payload):
                entry[2].append((rows, noise_of(observation, site.tensor)))
    return list(found.values())


def _explained(
    module: torch.nn.Module,
    model: PublicModel,
    group: Group,
    span: Span,
    max_tokens: int,
    limits: Limits | None,
) -> Explained:
    """Return which inputs of a group's layer explain the span's rows."""
    words = np.arange(len(model.tokenizer), dtype=np.int64)
    entries = dictionary_of(module, group.first, words, max_tokens if group.positional else 1)
    rows_kd = span.values_k.double().numpy()[:, None] * span.basis_dk.numpy().T
    return explain(rows_kd, entries, limits)
