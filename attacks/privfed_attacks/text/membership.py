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


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """When a candidate is a member.

    Once the observed rows span all inputs, members are as far from the span as the noise explains, and there are at
    least as many of them as the span has directions: then no others are. Where the rows do not span all inputs yet,
    members lie *near* the span, and how near the others lie is seen on the vocabulary, nearly all of which is not in
    the batch: of the distances of all tokens (each at its best position) the median is the *null*, and a token
    below ``share`` of it is a member. Its positions are those where its distance is what the noise explains, or little
    more than the least.

    Attributes:
        share: A member's largest distance as a share of the null.
        deviations: A member's largest distance at its positions, in multiples of what the noise explains.
        slack: ... or in multiples of its least distance, where that is larger.
    """

    share: float = 0.85
    deviations: float = 1.5
    slack: float = 1.25


_COMPLETE = 0.9
_OUTSIDE = 8  # with fewer directions outside a span, distances from it vary too much to tell anything


def members(
    observations: Sequence[Observation], model: PublicModel, max_tokens: int, test: Test | None = None
) -> Members:
    """Test every token of the vocabulary at every position.

    Args:
        observations: Of one client, or of sums over the same clients; each may be of another round.
        model: The adversary's model; its parameters are set to what was broadcast.
        max_tokens: How long texts may be.
        test: When a candidate is a member.
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
        found, null = _passing(model.at(last), model, group, span, max_tokens, test or Test())
        facts["null"] = round(null, 4)
        for pair, distance in found:
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
    module: torch.nn.Module, model: PublicModel, group: Group, span: Span, max_tokens: int, test: Test
) -> tuple[list[tuple[tuple[int, int], float]], float]:
    """Return the members with their distances, and the null."""
    tokens = np.arange(len(model.tokenizer), dtype=np.int64)
    length = max_tokens if group.positional else 1
    parts = [span.distances(x) for _, x in dictionary(module, group.first, tokens, length)]
    distance = torch.cat([part[0] for part in parts])
    expected = torch.cat([part[1] for part in parts])
    least = distance.min(dim=1).values
    null = float(least.median())
    explained = distance <= test.deviations * expected
    complete = int(explained.sum()) >= _COMPLETE * span.rank
    near = explained if complete else explained | (distance <= test.slack * least[:, None])
    inside = near.any(dim=1) if complete else near.any(dim=1) & (least < test.share * null)
    found = []
    for row, place in (near & inside[:, None]).nonzero().tolist():
        position = place if group.positional else -1
        found.append(((int(tokens[row]), position), float(distance[row, place])))
    return found, null
