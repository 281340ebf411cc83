"""What a site remembers of runs on disk, beside its ledger: which sessions it entered and which rounds it answered.

Every entry is durable before the site answers, so a site that was killed and started again neither enters a session
twice nor answers a round that is over.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privfed.errors import LedgerError, StageError
from privfed.privacy.ledger_store import transaction

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run_id TEXT PRIMARY KEY, binding TEXT NOT NULL, attempt INTEGER NOT NULL,
                                 closed INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE IF NOT EXISTS rounds (run_id TEXT, client TEXT, phase INTEGER, round INTEGER, digest TEXT NOT NULL,
                                   PRIMARY KEY (run_id, client, phase, round)) STRICT;
CREATE TABLE IF NOT EXISTS sums (run_id TEXT, phase INTEGER, round INTEGER, survivors TEXT NOT NULL,
                                 PRIMARY KEY (run_id, phase, round)) STRICT;
"""


class SiteMemory:
    """One SQLite file, safe to share between threads; see the module.

    Args:
        path: Made where it is missing.

    Raises:
        LedgerError: If it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        with self._translated():
            self._database = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def open_run(self, run_id: str, binding: str) -> None:
        """Note a run, bound to its configuration and roster.

        Raises:
            StageError: If the run is over, or was bound to others before.
        """
        with self._transaction():
            row = self._database.execute("SELECT binding, closed FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            if row is None:
                self._database.execute(
                    "INSERT INTO runs (run_id, binding, attempt) VALUES (?, ?, 0)", (run_id, binding)
                )
            elif row[1]:
                raise StageError(f"Run {run_id} is over at this site: start a new one.")
            elif row[0] != binding:
                raise StageError(f"Run {run_id} had another configuration or roster at this site: start a new run.")

    def close_run(self, run_id: str) -> None:
        """Note that a run is over."""
        with self._transaction():
            self._database.execute("UPDATE runs SET closed = 1 WHERE run_id = ?", (run_id,))

    def enter(self, run_id: str, attempt: int) -> None:
        """Note that the site enters a session; attempts count upwards over the whole run.

        Raises:
            StageError: If a session with this attempt or a later one was entered before.
        """
        with self._transaction():
            row = self._database.execute("SELECT attempt FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            if row is None or attempt <= row[0]:
                last = None if row is None else row[0]
                raise StageError(
                    f"The server asks for attempt {attempt}, and this site was in {last}: sessions do not repeat."
                )
            self._database.execute("UPDATE runs SET attempt = ? WHERE run_id = ?", (attempt, run_id))

    def answer(self, run_id: str, client: str, place: tuple[int, int], digest: str, most: int) -> None:
        """Note that a client answers a round.

        The same broadcast again is let through: after a crash it gives the same answer, at no new charge.

        Args:
            run_id: The run.
            client: The client.
            place: (number of the phase, round).
            digest: SHA-256 of the broadcast.
            most: In how many rounds of the phase the client takes part.

        Raises:
            StageError: If the client has answered a later round, this one for another broadcast, or as many as planned.
        """
        with self._transaction():
            query = "SELECT phase, round, digest FROM rounds WHERE run_id = ? AND client = ?"
            known = {(row[0], row[1]): row[2] for row in self._database.execute(query, (run_id, client))}
            last = max(known, default=(-1, 0))
            if known.get(place) == digest and place == last:
                return
            if place <= last:
                raise StageError(
                    f"{client} answered round {last[1]} before and is asked for round {place[1]}"
                    f"{' with another broadcast' if place == last else ''}: rounds do not repeat."
                )
            if sum(1 for phase, _ in known if phase == place[0]) >= most:
                raise StageError(f"{client} has taken part in {most} rounds, which is all that was approved.")
            self._database.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", (run_id, client, *place, digest))

    def sign(self, run_id: str, place: tuple[int, int], survivors: str) -> None:
        """Note the survivors of a round under whom the site's clients sign.

        Args:
            run_id: The run.
            place: (number of the phase, round).
            survivors: Digest of their names.

        Raises:
            StageError: If the site has signed others for this round before.
        """
        with self._transaction():
            query = "SELECT survivors FROM sums WHERE run_id = ? AND phase = ? AND round = ?"
            row = self._database.execute(query, (run_id, *place)).fetchone()
            if row is None:
                self._database.execute("INSERT INTO sums VALUES (?, ?, ?, ?)", (run_id, *place, survivors))
            elif row[0] != survivors:
                raise StageError(
                    f"This site signed another set of survivors of round {place[1]} before: a round has one sum."
                )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._translated(), transaction(self._database):
            yield

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(f"The site's memory {self._path} cannot be used: {error}.") from error
