"""What distributed noise promised for those who really survived, from the ledger's rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from privfed.privacy.accountant import epsilon
from privfed.privacy.ledger import Entry
from privfed.types import EVERYONE, PrivacyEvent


def survived_events(entries: Sequence[Entry]) -> dict[str, tuple[PrivacyEvent, ...]]:
    """Return each client's charges with the honest noise that the revealed sums had.

    A charge was made at what ``n_min`` survivors give; the record of its round says what there was. A round without a
    record was not revealed to anyone who kept to the protocol, and counts as charged.
    """
    records: dict[tuple[str, int], PrivacyEvent] = {}
    for entry in entries:
        if entry.charge.client_id == EVERYONE:  # the first is the one that was revealed
            records.setdefault((entry.charge.phase, entry.charge.round), entry.charge.event)
    found: dict[str, list[PrivacyEvent]] = {}
    for entry in entries:
        charge = entry.charge
        if charge.client_id == EVERYONE:
            continue
        event, record = charge.event, records.get((charge.phase, charge.round))
        if record is not None:
            event = replace(
                record, sampling_probability=event.sampling_probability, steps=event.steps, relation=event.relation
            )
        found.setdefault(charge.client_id, []).append(event)
    return {client: tuple(events) for client, events in found.items()}


def survivors_epsilon(entries: Sequence[Entry], delta: float) -> float | None:
    """Return the largest epsilon of any client at what really survived; None where nothing was charged."""
    lists = {tuple(sorted(events, key=repr)) for events in survived_events(entries).values()}
    return max((epsilon(events, delta, accountant="rdp") for events in lists), default=None)
