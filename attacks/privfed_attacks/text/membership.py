"""Which (token, position) pairs have their input in the span of what was observed: the first half of the span attack.

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
from privfed_attacks.text.inputs import Group, dictionary, fingerprint, groups, payload_rows
from privfed_attacks.text.spans import Span, noise_of, span_of

Rows = tuple[NDArray[np.float64], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """What passed the test.

    Attributes:
        pairs: (token, position); position -1 where the input does not depend on it.
        distances: Their relative distances from the span.
        positional: Whether positions are known.
        facts: For the report.
    """

    pairs: tuple[tuple[int, int], ...]
    distances: NDArray[np.float64] = field(repr=False)
    positional: bool
    facts: dict[str, float | int | str]

    def at(self, position: int) -> tuple[int, ...]:
        """Return the tokens that may be at a position, the nearest first."""
        near = sorted(zip(self.distances, self.pairs, strict=True))
        return tuple(token for _, (token, place) in near if place in (-1, position))


def members(
    observations: Sequence[Observation],
    model: PublicModel,
    setting: object,
    tolerance: float,
    deviations: float,
    most: float,
) -> Members:
    """Test every token of the vocabulary at every position.

    Args:
        observations: Of one client, or of sums over the same clients; each may be of another round.
        model: The adversary's model; its parameters are set to what was broadcast.
        setting: ``Setting``: how long texts may be.
        tolerance: The largest relative distance of a member that noise does not explain.
        deviations: How many times the explained distance is accepted.
        most: The largest distance that is ever accepted.
    """
    length = int(getattr(setting, "max_tokens", 32))
    stacked = _stacked(observations, model, length)
    facts: dict[str, float | int | str] = {"groups": len(stacked)}
    pairs: dict[tuple[int, int], float] = {}
    positional = False
    for last, group, rows in stacked:
        span = span_of(rows)
        facts |= {"rank": span.rank, "width": span.width, "rows": span.rows, "saturated": int(span.saturated)}
        positional |= group.positional
        if span.saturated:
            continue
        module = model.at(last)
        for pair, distance in _passing(module, model, group, span, length, (tolerance, deviations, most)):
            pairs[pair] = min(distance, pairs.get(pair, np.inf))
    order = sorted(pairs)
    facts["members"] = len(order)
    return Members(
        pairs=tuple(order),
        distances=np.array([pairs[pair] for pair in order]),
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


@torch.no_grad()
def _passing(
    module: torch.nn.Module,
    model: PublicModel,
    group: Group,
    span: Span,
    length: int,
    limits: tuple[float, float, float],
) -> list[tuple[tuple[int, int], float]]:
    tolerance, deviations, most = limits
    tokens = np.arange(len(model.tokenizer), dtype=np.int64)
    found = []
    for some, x in dictionary(module, group.first, tokens, length if group.positional else 1):
        distance, expected = span.distances(x)
        limit = (deviations * expected).clamp(min=tolerance, max=most)
        for row, place in (distance <= limit).nonzero().tolist():
            position = place if group.positional else -1
            found.append(((int(some[row]), position), float(distance[row, place])))
    return found
