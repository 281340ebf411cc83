"""The data holder's ledger: what was charged to which data, durable before anything is released, under a cap.

It stores events, never an epsilon; what was spent is computed from them (``ledger_cost``), and the file
format and its tamper evidence are in ``ledger_store``.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from privfed.errors import BudgetExceededError, ConfigError, LedgerError
from privfed.privacy import ledger_cost
from privfed.privacy.accountant import Accountant, Events, check_delta, check_event, merged
from privfed.privacy.ledger_account import (
    Account,
    Cap,
    Charge,
    Entry,
    Steps,
    add_event,
    charge_of,
    content_of_charge,
)
from privfed.privacy.ledger_store import ZERO_HASH, Row, Store, content_of, row_hash
from privfed.types import PrivacyEvent, Unit

__all__ = ["Cap", "Charge", "Entry", "Ledger"]

_UNITS: tuple[Unit, ...] = ("example", "client")


class Ledger:
    """An open ledger; safe to share between threads, and its file between processes. See ``open``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._accounts: dict[str, Account] = {}
        self._seen, self._hash = 0, ZERO_HASH

    @classmethod
    def open(cls, path: Path | str, *, create: bool = True) -> Ledger:
        """Open the ledger at ``path``, creating it if it is missing and ``create``.

        Raises:
            LedgerError: If the file is missing with ``create=False``, is no ledger, or was written by a newer
                version.
        """
        return cls(Store(Path(path), create=create))

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def set_cap(self, *, data_digest: str, unit: Unit, epsilon: float, delta: float) -> None:
        """Set the most that may be spent on ``data_digest`` from now on; recorded in the chain like a charge.

        Raises:
            ConfigError: If ``epsilon`` is not positive and finite, ``delta`` not in (0, 1) or ``unit``
                unknown.
        """
        if not 0 < epsilon < math.inf:
            raise ConfigError(f"Expected a finite cap epsilon above 0, got {epsilon}.")
        if unit not in _UNITS:
            raise ConfigError(f"Expected the unit 'example' or 'client', got {unit!r}.")
        check_delta(delta)
        cap = Cap(data_digest=data_digest, unit=unit, epsilon=float(epsilon), delta=float(delta))
        with self._writing():
            if self._account(data_digest).caps.get(unit) != cap:
                values = {"data_digest": data_digest, "unit": unit, "epsilon": epsilon, "delta": delta}
                self._store.append({"kind": "cap", **values})

    def cap(self, data_digest: str, unit: Unit) -> Cap | None:
        """Return the cap in force, if one was set."""
        with self._reading():
            return self._account(data_digest).caps.get(unit)

    def charge(self, charge: Charge) -> bool:
        """Record a charge; it is on disk when this returns, so call it *before* the release.

        Returns: True for a new charge; False where the same one (run, client, phase, round and input digest)
            is there already, so that a resumed run is not charged twice for a release that is the same to the
            bit.

        Raises:
            BudgetExceededError: If the charge would pass a cap; nothing is recorded.
            LedgerError: If another charge has the same key, or the file is damaged or locked.
            ConfigError: If the event's values are out of range.
        """
        check_event(charge.event)
        content = content_of_charge(charge)
        with self._writing():
            known = self._store.find_charge(content)
            if known is not None:
                if charge_of(known) != charge:
                    raise LedgerError(
                        f"Run {charge.run_id!r} already has another charge of client {charge.client_id!r}, "
                        f"phase {charge.phase!r}, round {charge.round} for the same input: one release has "
                        "one event."
                    )
                return False
            self._enforce(charge)
            self._store.append(content)
        return True

    def approve(self, plan: Mapping[str, Events], *, run_id: str, data_digest: str, partition_digest: str) -> None:
        """Check a whole run against the caps at once, so that its charges need no accounting of their own.

        ``plan`` holds for each client all events of the run from its first round to its last, whether already
        charged or not. It is remembered, in this process only, until ``erase_run_key``. A charge is accepted
        on its strength only while the client's steps of that kind of event stay within it, and only while
        nothing that the check did not know of (a charge outside of every plan, a new cap; also by another
        process) has been recorded: then all plans are checked once more, together, and given up if they no
        longer fit.

        Raises:
            BudgetExceededError: If the plan, on top of everything charged and planned so far, passes a cap.
            ConfigError: If a value is out of range.
        """
        steps: dict[tuple[str, str], Steps] = {}
        for client, events in plan.items():
            for event in events:
                check_event(event)
                add_event(steps.setdefault((partition_digest, client), {}), event)
        with self._reading():
            account = self._account(data_digest)
            before = dict(account.plans)
            account.plans[run_id] = steps
            try:
                for cap in account.caps.values():
                    self._check(cap, account.partitions(planned=True), f"The plan of run {run_id!r}")
            except BaseException:
                account.plans = before
                raise
            account.stale = False

    def entries(self, *, data_digest: str | None = None, run_id: str | None = None) -> list[Entry]:
        """Return the stored charges in order, all or those of one data set or run."""
        with self._lock:
            rows = self._store.rows()
        return [
            Entry(
                sequence=row["sequence"],
                time=row["time"],
                charge=charge_of(row),
                previous_hash=row["previous_hash"],
                hash=row["hash"],
            )
            for row in rows
            if row["kind"] == "charge" and data_digest in (None, row["data_digest"]) and run_id in (None, row["run_id"])
        ]

    def spent(self, *, data_digest: str, unit: Unit, delta: float, accountant: Accountant = "pld") -> float:
        """Return an upper bound on the epsilon that all runs together have spent on a data set, per ``unit``.

        Infinite where no bound exists: see ``ledger_cost.why_unbounded``.

        Raises:
            ConfigError: If ``delta`` is out of range or the accountant cannot account the events.
        """
        check_delta(delta)
        with self._reading():
            partitions = self._account(data_digest).partitions(planned=False)
        return ledger_cost.cost(partitions, unit=unit, delta=delta, accountant=accountant)

    def events_of(self, run_id: str) -> dict[str, tuple[PrivacyEvent, ...]]:
        """Return each client's events of one run, the steps of equal ones added up."""
        events: dict[str, list[PrivacyEvent]] = {}
        for entry in self.entries(run_id=run_id):
            events.setdefault(entry.charge.client_id, []).append(entry.charge.event)
        return {client: merged(each) for client, each in events.items()}

    def first_input(self, run_id: str, client_id: str, phase: str, round_number: int) -> str | None:
        """Return the input digest of the first charge of a client's round, or None if it was never charged."""
        with self._lock:
            return self._store.first_input(run_id, client_id, phase, round_number)

    def head(self) -> str:
        """Return the hash of the last row, 64 zeros where there is none; note it elsewhere to date the
        ledger."""
        with self._lock:
            return self._store.head()[1]

    def verify(self) -> list[str]:
        """Return what is wrong with the file, in sentences; none if it is sound."""
        with self._lock:
            return self._store.problems()

    def run_key(self, run_id: str) -> bytes:
        """Return the secret key of a run, drawn from the operating system and stored on the first call.

        Raises:
            LedgerError: If it was erased.
        """
        with self._lock:
            return self._store.run_key(run_id)

    def erase_run_key(self, run_id: str) -> None:
        """Erase the key of a finished run, whose noise nobody can then compute, and release its plan.

        Raises:
            LedgerError: If another process keeps the key's last copy in use; call again.
        """
        with self._lock:
            for account in self._accounts.values():
                account.plans.pop(run_id, None)
            self._store.erase_run_key(run_id)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            with self._store.transaction(write=False):
                self._catch_up()
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, self._store.transaction():
            self._catch_up()
            yield

    def _account(self, data_digest: str) -> Account:
        return self._accounts.setdefault(data_digest, Account())

    def _catch_up(self) -> None:
        """Take in the rows that were appended since the last call, by whichever process, and check their
        hashes."""
        count, last = self._store.head()
        if (count, last) == (self._seen, self._hash):
            return
        for row in self._store.rows(after=self._seen):
            expected = row_hash(self._seen + 1, self._hash, content_of(row))
            if row["sequence"] != self._seen + 1 or row["previous_hash"] != self._hash or row["hash"] != expected:
                raise LedgerError(f"The ledger {self._store.path} is damaged at row {row['sequence']}: verify it.")
            self._take_in(row)
            self._seen, self._hash = row["sequence"], row["hash"]
        if (self._seen, self._hash) != (count, last):
            raise LedgerError(
                f"The ledger {self._store.path} names {count} rows and has {self._seen}, or ends otherwise: verify it."
            )

    def _take_in(self, row: Row) -> None:
        account = self._account(row["data_digest"])
        if row["kind"] == "cap":
            account.caps[row["unit"]] = Cap(**{name: row[name] for name in ("data_digest", "unit", "epsilon", "delta")})
            account.stale = True
            return
        charge = charge_of(row)
        if not account.in_plan(charge, charge.event.steps):
            account.stale = True
        key = (charge.partition_digest, charge.run_id, charge.client_id)
        add_event(account.charged.setdefault(key, {}), charge.event)

    def _enforce(self, charge: Charge) -> None:
        """Raise ``BudgetExceededError`` if ``charge`` would pass a cap of its data set."""
        account = self._account(charge.data_digest)
        if not account.caps:
            return
        if account.in_plan(charge, charge.event.steps):
            if account.stale:
                self._recheck(account)
            if charge.run_id in account.plans:
                return
        partitions = account.partitions(planned=False, extra=charge)
        for cap in account.caps.values():
            self._check(cap, partitions, f"Round {charge.round} of client {charge.client_id!r}")

    def _recheck(self, account: Account) -> None:
        partitions = account.partitions(planned=True)
        try:
            for cap in account.caps.values():
                self._check(cap, partitions, "The approved plans")
        except BudgetExceededError:
            account.plans.clear()  # from here on every charge is accounted by itself
        account.stale = False

    def _check(self, cap: Cap, partitions: ledger_cost.Partitions, what: str) -> None:
        value = ledger_cost.cost(partitions, unit=cap.unit, delta=cap.delta, limit=cap.epsilon)
        if value <= cap.epsilon:
            return
        before = self._account(cap.data_digest).partitions(planned=False)
        spent = ledger_cost.cost(before, unit=cap.unit, delta=cap.delta)
        why = ledger_cost.why_unbounded(partitions, unit=cap.unit)
        raise BudgetExceededError(
            f"{what} would bring data set {cap.data_digest[:12]!r} to epsilon {value:.4g} at delta "
            f"{cap.delta:g} per {cap.unit}{f' ({why})' if why else ''}; the cap is {cap.epsilon:g}, "
            f"{spent:.4g} is spent and {max(0.0, cap.epsilon - spent):.4g} is left: run fewer steps, add "
            "noise or have the cap raised."
        )
