"""Raw columns to checked rows: the one place where texts, labels and clients are validated.

Every reader hands over a :class:`RawTable` of untyped columns; what leaves is :class:`Rows`. Errors name the
data row, counted from 1 without the header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from privfed.data.config import DataConfig
from privfed.errors import DataError, nearest

LABEL_NAME_COLUMN = "label_name"
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")

Label = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTable:
    """Columns as a reader found them.

    Attributes:
        origin: What messages call the table, e.g. the file's path.
        columns: Columns by name; those that nobody asks for may be left empty.
        label_names: Names of integer labels by value, where the source declares them.
    """

    origin: str
    columns: Mapping[str, Sequence[object]] = field(repr=False)
    label_names: Mapping[int, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawDataset:
    """What a source returns: raw tables, and sentences on where they come from and what was done to them."""

    name: str
    train: RawTable
    test: RawTable | None = None
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Checked rows: all labels are integers or all are strings."""

    texts: tuple[str, ...] = field(repr=False)
    labels: tuple[Label, ...] = field(repr=False)
    clients: tuple[str, ...] | None = field(repr=False)
    label_names: Mapping[int, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at ``indices``, in that order."""
        return Rows(
            texts=tuple(self.texts[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            clients=None if self.clients is None else tuple(self.clients[i] for i in indices),
            label_names=self.label_names,
        )


def drop_empty(rows: Rows, origin: str) -> tuple[Rows, list[str]]:
    """Return the rows of ``rows`` that have text, and notes.

    Raises:
        DataError: If none has.
    """
    kept = [i for i, text in enumerate(rows.texts) if text.strip()]
    if not kept:
        raise DataError(f"All {len(rows)} texts of {origin} are empty, expected words: check [data] text.")
    dropped = len(rows) - len(kept)
    return (rows.take(kept), [f"{counted(dropped, 'row')} without text dropped"]) if dropped else (rows, [])


def counted(count: int, noun: str) -> str:
    """Return such as ``"1 row"`` or ``"212 rows"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check_rows(table: RawTable, config: DataConfig) -> Rows:
    """Return the rows of ``table`` under the column names of ``config``.

    Raises:
        DataError: If there are no rows, a column is missing, or a value is null or of the wrong type.
    """
    if len(table) == 0:
        raise DataError(f"{table.origin} has no rows, expected labelled texts: check the file or the name.")
    texts = _texts(table, config.text)
    labels = _labels(table, config.label)
    clients = None if config.client is None else _clients(table, config.client)
    return Rows(texts=texts, labels=labels, clients=clients, label_names=_label_names(table, labels))


def _column(table: RawTable, name: str, key: str) -> Sequence[object]:
    if name not in table.columns:
        known = ", ".join(repr(column) for column in table.columns)
        raise DataError(
            f"{table.origin} has no column {name!r}, only {known}.{nearest(name, table.columns)} "
            f"Set [data] {key} to the right one."
        )
    return table.columns[name]


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _bad_value(table: RawTable, row: int, key: str, value: object, expected: str) -> DataError:
    if _is_null(value):
        found = "null" if value is None else "NaN"
    elif isinstance(value, str):
        found = "empty"
    else:
        found = f"{value!r:.60} ({type(value).__name__})"
    return DataError(
        f"{table.origin}: data row {row + 1} has {found} as its {key}, expected {expected}: fix or remove the row."
    )


def _texts(table: RawTable, name: str) -> tuple[str, ...]:
    texts: list[str] = []
    for row, value in enumerate(_column(table, name, "text")):
        if not isinstance(value, str):
            raise _bad_value(table, row, "text", value, "a string")
        texts.append(value)
    return tuple(texts)


def _labels(table: RawTable, name: str) -> tuple[Label, ...]:
    labels: list[Label] = []
    kinds: dict[type, int] = {}
    for row, value in enumerate(_column(table, name, "label")):
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise _bad_value(table, row, "label", value, "an integer or a non-empty string")
        kinds.setdefault(type(value), row)
        labels.append(value)
    if len(kinds) > 1:
        rows = " and ".join(f"{kind.__name__} in data row {row + 1}" for kind, row in kinds.items())
        raise DataError(f"{table.origin} mixes kinds of labels ({rows}), expected one kind: convert the column.")
    return _as_integers(labels)


def _as_integers(labels: list[Label]) -> tuple[Label, ...]:
    """Return labels that are all written as integers (as csv must) as integers, so that 10 sorts after 2."""
    distinct = set(labels)
    if all(isinstance(label, str) and _INTEGER.fullmatch(label) for label in distinct):
        values = {label: int(label) for label in distinct}
        return tuple(values[label] for label in labels)
    return tuple(labels)


def _clients(table: RawTable, name: str) -> tuple[str, ...]:
    clients: list[str] = []
    for row, value in enumerate(_column(table, name, "client")):
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise _bad_value(table, row, "client", value, "an integer or a non-empty string")
        clients.append(str(value))
    return tuple(clients)


def _label_names(table: RawTable, labels: tuple[Label, ...]) -> dict[int, str]:
    names = dict(table.label_names)
    if LABEL_NAME_COLUMN not in table.columns:
        return names
    for row, (label, name) in enumerate(zip(labels, table.columns[LABEL_NAME_COLUMN], strict=True)):
        if not isinstance(label, int):
            return {}
        if not isinstance(name, str) or not name:
            raise _bad_value(table, row, LABEL_NAME_COLUMN, name, "a non-empty string")
        if names.setdefault(label, name) != name:
            raise DataError(
                f"{table.origin}: data row {row + 1} names label {label} {name!r}, "
                f"earlier rows {names[label]!r}, expected one name a label: "
                f"fix the column {LABEL_NAME_COLUMN!r}."
            )
    return names
