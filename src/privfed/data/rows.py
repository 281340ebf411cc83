"""Raw columns to checked rows: the one place where texts, labels and clients are validated.

Every reader hands over a :class:`RawTable` of untyped columns; what leaves is :class:`Rows`. Errors name the
data row, counted from 1 without the header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from privfed.data.config import DataConfig
from privfed.data.records import ASSISTANT, ROLES, Conversation, columns_of, form_of, has_labels, joined
from privfed.errors import DataError, nearest
from privfed.types import Task

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
    """Checked rows: all labels are integers, or all are strings, or there are none.

    ``parts`` holds the parts of records that have several, by their ``[data]`` key; ``texts`` is then those joined.
    """

    texts: tuple[str, ...] = field(repr=False)
    labels: tuple[Label, ...] | None = field(repr=False)
    clients: tuple[str, ...] | None = field(repr=False)
    label_names: Mapping[int, str] = field(default_factory=dict, repr=False)
    parts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at ``indices``, in that order."""
        return Rows(
            texts=tuple(self.texts[i] for i in indices),
            labels=None if self.labels is None else tuple(self.labels[i] for i in indices),
            clients=None if self.clients is None else tuple(self.clients[i] for i in indices),
            label_names=self.label_names,
            parts={key: tuple(column[i] for i in indices) for key, column in self.parts.items()},
        )


def drop_empty(rows: Rows, origin: str) -> tuple[Rows, list[str]]:
    """Return the rows of ``rows`` that have text (what is learned, where that is a part), and notes.

    Raises:
        DataError: If none has.
    """
    key, said = _learned(rows)
    kept = [i for i, text in enumerate(said) if text.strip()]
    if not kept:
        raise DataError(f"All {len(rows)} {key}s of {origin} are empty, expected words: check [data] {key}.")
    dropped = len(rows) - len(kept)
    return (rows.take(kept), [f"{counted(dropped, 'row')} without {key} dropped"]) if dropped else (rows, [])


def _learned(rows: Rows) -> tuple[str, Sequence[str]]:
    """Return the name and the text of that part of each row without which the row teaches nothing."""
    if "response" in rows.parts:
        return "response", rows.parts["response"]
    if "messages" in rows.parts:
        said = [" ".join(content for role, content in turns if role == ASSISTANT) for turns in rows.parts["messages"]]
        return "message", said
    if "text" in rows.parts:
        return "text", [" ".join(pair) for pair in zip(*rows.parts.values(), strict=True)]
    return "text", rows.texts


def counted(count: int, noun: str) -> str:
    """Return such as ``"1 row"`` or ``"212 rows"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check_rows(table: RawTable, config: DataConfig, task: Task = "sequence_classification") -> Rows:
    """Return the rows of ``table`` under the column names of ``config``.

    Raises:
        DataError: If there are no rows, a column is missing, or a value is null or of the wrong type.
    """
    labelled = has_labels(task)
    if len(table) == 0:
        expected = "labelled texts" if labelled else "texts"
        raise DataError(f"{table.origin} has no rows, expected {expected}: check the file or the name.")
    form = form_of(config, task)
    parts: dict[str, tuple[Any, ...]] = {}
    if form == "messages":
        parts["messages"] = _conversations(table, str(config.messages))
    elif form != "text":
        keys = [key for key in columns_of(config, form, labelled=False) if key != "client"]
        parts = {key: _texts(table, str(getattr(config, key)), key) for key in keys}
    labels = _labels(table, config.label) if labelled else None
    return Rows(
        texts=joined(parts) if parts else _texts(table, config.text, "text"),
        labels=labels,
        clients=None if config.client is None else _clients(table, config.client),
        label_names={} if labels is None else _label_names(table, labels),
        parts=parts,
    )


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


def _texts(table: RawTable, name: str, key: str) -> tuple[str, ...]:
    texts: list[str] = []
    for row, value in enumerate(_column(table, name, key)):
        if not isinstance(value, str):
            raise _bad_value(table, row, key, value, "a string")
        texts.append(value)
    return tuple(texts)


def _conversations(table: RawTable, name: str) -> tuple[Conversation, ...]:
    expected = f"a list of objects with a role ({', '.join(ROLES)}) and a content that is a string"
    found: list[Conversation] = []
    for row, value in enumerate(_column(table, name, "messages")):
        turns = [_turn(turn) for turn in value] if isinstance(value, list) else []
        if not turns or None in turns:
            raise _bad_value(table, row, "messages", value, expected)
        found.append(tuple(turn for turn in turns if turn is not None))
    return tuple(found)


def _turn(value: object) -> tuple[str, str] | None:
    if not isinstance(value, Mapping):
        return None
    role, content = value.get("role"), value.get("content")
    return (role, content) if isinstance(role, str) and role in ROLES and isinstance(content, str) else None


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
