"""What a ledger's rows say: the values they hold, and the running account of one data set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from privfed.errors import LedgerError
from privfed.privacy.accountant import Events, kind_of, merged
from privfed.types import PrivacyEvent, Unit

Steps = dict[PrivacyEvent, int]
"""How many steps of each kind of event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One release about to be made from one client's data.

    Attributes:
        run_id: The run.
        data_digest: The data set: budgets of different data sets never mix.
        partition_digest: How the data set was divided into clients.
        client_id: The client whose data it is.
        phase: The part of the run, e.g. ``"head_warm_start"`` or ``"train"``.
        round: The round.
        input_digest: Digest of everything the release depends on; equal digests mean the same release again.
        event: What the release does to the client's data.
        project: A label of the data holder's.
    """

    run_id: str
    data_digest: str
    partition_digest: str
    client_id: str
    phase: str
    round: int
    input_digest: str
    event: PrivacyEvent
    project: str = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """The most that may be spent on a data set, per ``unit``."""

    data_digest: str
    unit: Unit
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A stored charge, with its place in the chain; ``time`` is ISO 8601 in UTC."""

    sequence: int
    time: str
    charge: Charge
    previous_hash: str
    hash: str


@dataclass(slots=True)
class Account:
    """What the rows read so far say of one data set, and what was approved on top of that.

    Attributes:
        charged: (partition, run, client) -> steps.
        plans: run -> (partition, client) -> steps, for approved runs.
        stale: Whether something outside the plans happened since they were checked together.
    """

    charged: dict[tuple[str, str, str], Steps] = field(default_factory=dict)
    caps: dict[Unit, Cap] = field(default_factory=dict)
    plans: dict[str, dict[tuple[str, str], Steps]] = field(default_factory=dict)
    stale: bool = False

    def in_plan(self, charge: Charge, extra: int) -> bool:
        """Return whether the plan has room for the client's steps of this kind so far and ``extra`` more."""
        plan = self.plans.get(charge.run_id, {}).get((charge.partition_digest, charge.client_id), {})
        so_far = self.charged.get((charge.partition_digest, charge.run_id, charge.client_id), {})
        kind = kind_of(charge.event)
        return so_far.get(kind, 0) + extra <= plan.get(kind, -1)

    def partitions(self, *, planned: bool, extra: Charge | None = None) -> dict[str, dict[str, Events]]:
        """Return the events by partition and client, with the approved plans carried out if ``planned``."""
        totals = {key: dict(steps) for key, steps in self.charged.items()}
        if planned:
            for run, plan in self.plans.items():
                for (partition, client), steps in plan.items():
                    total = totals.setdefault((partition, run, client), {})
                    for kind, count in steps.items():
                        total[kind] = max(total.get(kind, 0), count)
        if extra is not None:
            add_event(totals.setdefault((extra.partition_digest, extra.run_id, extra.client_id), {}), extra.event)
        events: dict[str, dict[str, list[PrivacyEvent]]] = {}
        for (partition, _, client), steps in totals.items():
            events.setdefault(partition, {}).setdefault(client, []).extend(_listed(steps))
        return {
            partition: {client: merged(each) for client, each in clients.items()}
            for partition, clients in events.items()
        }


def add_event(steps: Steps, event: PrivacyEvent) -> None:
    """Add an event to a tally."""
    kind = kind_of(event)
    steps[kind] = steps.get(kind, 0) + event.steps


def _listed(steps: Steps) -> list[PrivacyEvent]:
    return [replace(kind, steps=count) for kind, count in steps.items() if count]


_OF_CHARGE = (
    "run_id",
    "data_digest",
    "partition_digest",
    "client_id",
    "phase",
    "round",
    "input_digest",
    "project",
)
_OF_EVENT = ("unit", "noise_multiplier", "sampling_probability", "steps", "relation")


def content_of_charge(charge: Charge) -> dict[str, Any]:
    """Return the content of the row that stores ``charge``."""
    content: dict[str, Any] = {name: getattr(charge, name) for name in _OF_CHARGE}
    event = {name: getattr(charge.event, name) for name in _OF_EVENT}
    return {"kind": "charge", **content, **event, "mechanism": mechanism_text(charge.event)}


def charge_of(row: Mapping[str, Any]) -> Charge:
    """Return the charge that a row stores.

    Raises:
        LedgerError: If the mechanism's parameters cannot be read.
    """
    name, parameters = _mechanism(row["mechanism"])
    event = {name: row[name] for name in _OF_EVENT}
    return Charge(
        **{name: row[name] for name in _OF_CHARGE},
        event=PrivacyEvent(mechanism=name, parameters=parameters, **event),
    )


def mechanism_text(event: PrivacyEvent) -> str:
    """Return an event's mechanism as the ledger stores it: its name, then its parameters as JSON if it has any.

    An event without parameters reads as it always did, so rows from before there were any keep their hashes.
    """
    if not event.parameters:
        return event.mechanism
    return event.mechanism + json.dumps(dict(event.parameters), sort_keys=True, separators=(",", ":"))


def _mechanism(text: str) -> tuple[str, tuple[tuple[str, float | tuple[float, ...]], ...]]:
    """Return the name and parameters in a stored mechanism."""
    name, brace, rest = text.partition("{")
    if not brace:
        return name, ()
    try:
        found = sorted(json.loads(brace + rest).items())
        return name, tuple((key, tuple(map(float, v)) if isinstance(v, list) else float(v)) for key, v in found)
    except (ValueError, TypeError) as error:
        raise LedgerError(f"The mechanism {text!r} of a ledger row cannot be read: {error}.") from error
