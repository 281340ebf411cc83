"""What one data set has been charged, as an epsilon: composition over clients, runs and partitions.

Within one partition the shards are disjoint, so one unit's data is in one client only, and the others' events
do not depend on it: the cost is that of the worst client (parallel composition, McSherry 2009). Runs over the
same partition compose client by client. Over *different* partitions an example may be in any client of each,
so each partition is represented by one list that dominates all of its clients, and these lists compose.

A charge of ``EVERYONE`` falls on every client of its partition: it is added to each one's list, since what one
client was charged by name does not replace what all of them were.

Sampling of clients amplifies nothing here: the server knows who takes part, so only what a client was charged
counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from privfed.privacy.accountant import Accountant, Events, dominating, epsilon, merged, plain
from privfed.types import EVERYONE, PrivacyEvent, Unit

Partitions = Mapping[str, Mapping[str, Events]]
"""Partition digest -> client -> its events over all runs."""

MOST_LISTS = 32
"""With more clients than this of which none is dominated by another, one dominating list stands for all."""


def cost(
    partitions: Partitions,
    *,
    unit: Unit,
    delta: float,
    accountant: Accountant = "pld",
    limit: float = math.inf,
) -> float:
    """Return an upper bound on the epsilon at ``delta`` of all events, per ``unit``.

    A value above ``limit`` is computed again with narrower bins, since it may be above it only by their
    width.

    Raises:
        ConfigError: If the accountant cannot account the events.
    """
    if why_unbounded(partitions, unit=unit):
        return math.inf
    lists = _worst_lists(_restated(partitions, unit))
    value = max((epsilon(events, delta, accountant=accountant) for events in lists), default=0.0)
    if limit < value < math.inf:
        value = max(epsilon(events, delta, accountant=accountant, fine=True) for events in lists)
    return value


def why_unbounded(partitions: Partitions, *, unit: Unit) -> str:
    """Return why no finite epsilon per ``unit`` exists, or ``""`` where one does."""
    events = [event for clients in partitions.values() for each in clients.values() for event in each]
    if any(event.noise_multiplier == 0 for event in events):
        return "some event has no noise"
    if unit == "client" and events:
        if any(event.unit == "example" for event in events):
            return "example-level events do not bound what a whole client's data reveals"
        if sum(1 for clients in partitions.values() if any(clients.values())) > 1:
            return "a client of one partition is no client of another, so no client-level bound holds"
    return ""


def _restated(partitions: Partitions, unit: Unit) -> dict[str, list[tuple[PrivacyEvent, ...]]]:
    """Return each partition's distinct event lists, with all events in one unit and one relation.

    *Client-level events per example.* Adding, removing or replacing one example changes its client's clipped
    contribution from one vector within the clip norm to another: a replacement of the client's contribution,
    never merely an addition or removal. So a client-level event bounds every example at the same noise
    multiplier under ``replace_one`` (distance 2C), and not under ``add_or_remove_one`` (distance C),
    whichever of them it was stated for: the mechanism is the same, only the pair of inputs differs.

    *Mixed relations.* ``replace_one`` also bounds ``add_or_remove_one``: the mechanism cannot tell an absent
    unit from one whose contribution is the zero vector, and the latter is within the clip norm. So a mixture
    counts as ``replace_one`` throughout.
    """
    relations = {
        "replace_one" if event.unit != unit else event.relation
        for clients in partitions.values()
        for events in clients.values()
        for event in events
    }
    relation = relations.pop() if len(relations) == 1 else "replace_one"
    result: dict[str, list[tuple[PrivacyEvent, ...]]] = {}
    for partition, clients in partitions.items():
        shared = clients.get(EVERYONE, ())
        named = [[*each, *shared] for client, each in clients.items() if client != EVERYONE] or [[*shared]]
        lists = (merged(replace(plain(event), unit=unit, relation=relation) for event in each) for each in named)
        distinct = [events for events in dict.fromkeys(lists) if events]
        if distinct:
            result[partition] = distinct
    return result


def _worst_lists(partitions: Mapping[str, list[tuple[PrivacyEvent, ...]]]) -> list[tuple[PrivacyEvent, ...]]:
    """Return lists of events of which the costliest costs at least as much as any unit's."""
    undominated = [_undominated(lists) for lists in partitions.values()]
    if len(undominated) == 1 and len(undominated[0]) <= MOST_LISTS:
        return undominated[0]
    ones = [lists[0] if len(lists) == 1 else _one_list(lists) for lists in undominated]
    return [merged(event for events in ones for event in events)] if ones else []


def _one_list(lists: Sequence[tuple[PrivacyEvent, ...]]) -> tuple[PrivacyEvent, ...]:
    return dominating({str(number): events for number, events in enumerate(lists)})


def _undominated(lists: Sequence[tuple[PrivacyEvent, ...]]) -> list[tuple[PrivacyEvent, ...]]:
    """Return those of ``lists`` that no other one dominates: most clients drop out here, at no accountant's
    cost."""
    kept: list[tuple[PrivacyEvent, ...]] = []
    for events in sorted(lists, key=lambda events: -sum(event.steps for event in events)):
        if any(_one_list((other, events)) == other for other in kept):
            continue
        kept = [other for other in kept if _one_list((events, other)) != events]
        kept.append(events)
        if len(kept) > MOST_LISTS:
            return list(lists)
    return kept
