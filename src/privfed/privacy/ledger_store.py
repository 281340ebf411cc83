"""The ledger's file: one SQLite database with a hash chain of rows that are only ever appended.

Every row carries the SHA-256 of the row before it and of its own content, and a second table holds the number
of rows and the last hash, so that changed, missing, reordered and cut-off rows are found. Triggers refuse
updates and deletions. What this cannot find is a rewrite of the whole file by someone who computes the chain
anew: for that, compare ``head`` with one that was noted elsewhere, such as on a receipt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privfed.errors import LedgerError
from privfed.rng import secret_key

Row = dict[str, Any]

SCHEMA_VERSION = 1
APPLICATION_ID = 0x50464C47  # "PFLG"
ZERO_HASH = "0" * 64
BUSY_SECONDS = 30.0

COLUMNS: dict[str, type] = {
    "time": str,
    "kind": str,  # charge | cap
    "project": str,
    "run_id": str,
    "data_digest": str,
    "partition_digest": str,
    "client_id": str,
    "phase": str,
    "round": int,
    "input_digest": str,
    "unit": str,
    "mechanism": str,
    "noise_multiplier": float,
    "sampling_probability": float,
    "steps": int,
    "relation": str,
    "epsilon": float,
    "delta": float,
}
"""A row's content. A cap uses data_digest, unit, epsilon and delta; a charge all but the last two."""

_SQL_TYPE = {str: "TEXT", int: "INTEGER", float: "REAL"}
_TRIGGERS = {
    "chain_no_update": "BEFORE UPDATE ON chain BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "chain_no_delete": "BEFORE DELETE ON chain BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "head_no_delete": "BEFORE DELETE ON head BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "head_forward": "BEFORE UPDATE ON head WHEN NEW.count <> OLD.count + 1 "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
}
_SCHEMA = [
    "CREATE TABLE chain (sequence INTEGER PRIMARY KEY, "
    + ", ".join(f"{name} {_SQL_TYPE[kind]} NOT NULL" for name, kind in COLUMNS.items())
    + ", previous_hash TEXT NOT NULL, hash TEXT NOT NULL) STRICT",
    "CREATE UNIQUE INDEX one_charge ON chain (run_id, client_id, phase, round, input_digest) WHERE kind = 'charge'",
    "CREATE TABLE head (one INTEGER PRIMARY KEY CHECK (one = 1), count INTEGER NOT NULL, hash TEXT NOT NULL) STRICT",
    "CREATE TABLE run_keys (run_id TEXT PRIMARY KEY, key BLOB) STRICT",
    *(f"CREATE TRIGGER {name} {body}" for name, body in _TRIGGERS.items()),
    f"INSERT INTO head VALUES (1, 0, '{ZERO_HASH}')",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
    f"PRAGMA application_id = {APPLICATION_ID}",
]


def row_hash(sequence: int, previous_hash: str, content: Mapping[str, Any]) -> str:
    """Return the SHA-256 that chains a row to the one before it."""
    text = json.dumps({"sequence": sequence, **content}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{previous_hash}\n{text}".encode()).hexdigest()


def content_of(row: Mapping[str, Any]) -> Row:
    """Return what a row's hash covers besides its place."""
    return {name: row[name] for name in COLUMNS}


class Store:
    """An open ledger file. Not for use from two threads at once; the caller locks.

    Args:
        path: The file.
        create: Whether to create it where it is missing.

    Raises:
        LedgerError: If the file is missing, is no ledger, or was written by a newer version.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        if not path.exists():
            if not create:
                raise LedgerError(f"There is no ledger at {path}.")
            _create_file(path)
        with _translated(path):
            # autocommit: every transaction here is an explicit BEGIN IMMEDIATE
            self._database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._database.row_factory = sqlite3.Row
        try:
            with _translated(path):
                self._prepare()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextlib.contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[None]:
        """Hold the write lock; what was written is durable when this returns, or undone when it raises.

        Without ``write``: see one state of the file throughout, and keep nobody from writing.
        """
        with _translated(self.path), transaction(self._database, write=write):
            yield

    def append(self, content: Mapping[str, Any]) -> Row:
        """Append a row, within a ``transaction``; columns that ``content`` lacks are empty. Returns the
        row."""
        count, previous = self.head()
        full: Row = {name: kind(content.get(name, kind())) for name, kind in COLUMNS.items()}
        full["time"] = datetime.now(UTC).isoformat(timespec="microseconds")
        sequence = count + 1
        row = {
            "sequence": sequence,
            **full,
            "previous_hash": previous,
            "hash": row_hash(sequence, previous, full),
        }
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        self._database.execute(f"INSERT INTO chain ({names}) VALUES ({marks})", tuple(row.values()))
        self._database.execute("UPDATE head SET count = ?, hash = ?", (sequence, row["hash"]))
        return row

    def head(self) -> tuple[int, str]:
        """Return how many rows there should be and the last one's hash."""
        with _translated(self.path):
            row = self._database.execute("SELECT count, hash FROM head").fetchone()
        if row is None:
            raise LedgerError(f"The ledger {self.path} has lost its head.")
        return int(row["count"]), str(row["hash"])

    def rows(self, after: int = 0) -> list[Row]:
        """Return the rows whose sequence number is above ``after``, in order."""
        with _translated(self.path):
            query = "SELECT * FROM chain WHERE sequence > ? ORDER BY sequence"
            return [dict(row) for row in self._database.execute(query, (after,))]

    def find_charge(self, key: Mapping[str, Any]) -> Row | None:
        """Return the charge with this run_id, client_id, phase, round and input_digest, if there is one."""
        query = (
            "SELECT * FROM chain WHERE kind = 'charge' AND run_id = ? AND client_id = ? AND phase = ? "
            "AND round = ? AND input_digest = ?"
        )
        values = [key[name] for name in ("run_id", "client_id", "phase", "round", "input_digest")]
        row = self._database.execute(query, values).fetchone()
        return None if row is None else dict(row)

    def first_input(self, run_id: str, client_id: str, phase: str, round_number: int) -> str | None:
        """Return the input digest of a round's first charge, if there is one."""
        query = (
            "SELECT input_digest FROM chain WHERE kind = 'charge' AND run_id = ? AND client_id = ? AND phase = ? "
            "AND round = ? ORDER BY sequence LIMIT 1"
        )
        with _translated(self.path):
            row = self._database.execute(query, (run_id, client_id, phase, round_number)).fetchone()
        return None if row is None else str(row["input_digest"])

    def problems(self) -> list[str]:
        """Return what is wrong with the file, in sentences; none if it is sound."""
        try:
            return [*self._chain_problems(), *self._file_problems()]
        except (LedgerError, sqlite3.DatabaseError) as error:
            return [f"The file cannot be read: {error}"]

    def run_key(self, run_id: str) -> bytes:
        """Return the run's secret key, made and stored on the first call.

        Raises:
            LedgerError: If it was erased.
        """
        with self.transaction():
            row = self._database.execute("SELECT key FROM run_keys WHERE run_id = ?", (run_id,)).fetchone()
            if row is None:
                key = secret_key()
                self._database.execute("INSERT INTO run_keys VALUES (?, ?)", (run_id, key))
                return key
        if row["key"] is None:
            raise LedgerError(f"The secret key of run {run_id!r} was erased when it finished: start a new run.")
        return bytes(row["key"])

    def erase_run_key(self, run_id: str) -> None:
        """Overwrite and delete the run's key in the file and its write-ahead log.

        What the file system or the disk itself kept of earlier versions is out of reach from here.

        Raises:
            LedgerError: If another process keeps the log in use; call again.
        """
        with self.transaction():
            self._database.execute("INSERT OR IGNORE INTO run_keys VALUES (?, NULL)", (run_id,))
            # the same length, so that the page's bytes are overwritten before they are let go
            query = "UPDATE run_keys SET key = zeroblob(length(key)) WHERE run_id = ? AND key IS NOT NULL"
            self._database.execute(query, (run_id,))
            self._database.execute("UPDATE run_keys SET key = NULL WHERE run_id = ?", (run_id,))
        with _translated(self.path):
            busy = self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise LedgerError(
                f"The key of run {run_id!r} may remain in the log of {self.path}: it is in use, try again."
            )

    def _prepare(self) -> None:
        self._database.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        self._check_identity()  # before anything is written to a file that may be someone else's
        self._write_ahead()
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("PRAGMA secure_delete = ON")
        self._database.execute("BEGIN IMMEDIATE")
        try:
            if self._check_identity():
                for statement in _SCHEMA:
                    self._database.execute(statement)
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise

    def _check_identity(self) -> bool:
        """Return whether the file is still empty; raise ``LedgerError`` if it is not ours or too new."""
        tables = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = self._database.execute("PRAGMA application_id").fetchone()[0]
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if tables == 0 and application == 0:
            return True
        if application != APPLICATION_ID:
            raise LedgerError(f"The file {self.path} is not a privacy ledger.")
        if version != SCHEMA_VERSION:
            raise LedgerError(
                f"The ledger {self.path} has format {version}, this privfed reads format {SCHEMA_VERSION}: upgrade it."
            )
        return False

    def _write_ahead(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        while True:  # the busy timeout does not cover the change of journal mode
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _chain_problems(self) -> Iterator[str]:
        expected, previous = 1, ZERO_HASH
        for row in self.rows(after=-(2**62)):
            sequence = row["sequence"]
            if sequence != expected:
                yield f"Expected row {expected} and found row {sequence}: rows are missing or were moved."
            if row["previous_hash"] != previous:
                yield f"Row {sequence} does not follow from the row before it."
            if row["hash"] != row_hash(sequence, row["previous_hash"], content_of(row)):
                yield f"Row {sequence} was changed."
            expected, previous = sequence + 1, row["hash"]
        count, last = self.head()
        if (count, last) != (expected - 1, previous):
            yield (
                f"The head names {count} rows that end in {last[:12]}, there are {expected - 1} that end in "
                f"{previous[:12]}."
            )

    def _file_problems(self) -> Iterator[str]:
        for (line,) in self._database.execute("PRAGMA integrity_check"):
            if line != "ok":
                yield f"SQLite reports: {line}."
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        found = {row["name"]: row["sql"] for row in self._database.execute(query)}
        for name, body in _TRIGGERS.items():
            if found.get(name) != f"CREATE TRIGGER {name} {body}":
                yield f"The trigger {name} that refuses changes is missing or was changed."


def _create_file(path: Path) -> None:
    try:
        # it will hold run keys: nobody but the owner reads it
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise LedgerError(f"The ledger {path} cannot be created: {error.strerror}.") from error


@contextlib.contextmanager
def transaction(database: sqlite3.Connection, *, write: bool = True) -> Iterator[None]:
    """Run the body as one transaction of a connection that commits by itself otherwise.

    Args:
        database: Opened with ``isolation_level=None``.
        write: Whether to hold the write lock from the start.
    """
    database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ``LedgerError``."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise LedgerError(f"The ledger {path} cannot be used now: {error}.") from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"The file {path} is not a privacy ledger or is damaged: {error}.") from error
