"""The values that a source ends in. Shape suffix: N examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from privfed.data.records import Form


class AnySplit(Protocol):
    """One side of a data set of any kind: record i has class ``labels[i]`` and belongs to ``clients[i]``."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers [N], or None where records have no class."""

    @property
    def clients(self) -> tuple[str, ...] | None:
        """Natural clients, or None where there are none."""

    def __len__(self) -> int:
        """Return N."""


class Dataset(Protocol):
    """A data set of any kind, as far as a run looks at it; what a record is only its examples' builder knows."""

    @property
    def name(self) -> str:
        """The built-in or hub name, or the file's name."""

    @property
    def kind(self) -> Form:
        """What one record is."""

    @property
    def train(self) -> AnySplit:
        """The training split."""

    @property
    def test(self) -> AnySplit:
        """The held-out split."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of class i at position i; empty where records have no class."""

    @property
    def digest(self) -> str:
        """SHA-256 of the set of source records, before any choice of the run: what a ledger calls this data."""

    @property
    def source(self) -> str:
        """A sentence that says where the records come from."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the records on the way in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One side of a text data set: ``texts[i]`` has class ``labels[i]`` and belongs to ``clients[i]``.

    Attributes:
        texts: The text of each record; of a record of several parts, the parts joined.
        labels: Class numbers, or None where records have no class.
        clients: Natural clients, or None where there are none.
        parts: The parts of each record by their ``[data]`` key; empty where the text is all.
    """

    texts: tuple[str, ...] = field(repr=False)
    labels: NDArray[np.int64] | None = field(repr=False)
    clients: tuple[str, ...] | None = field(default=None, repr=False)
    parts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        columns = [self.texts, self.labels, self.clients, *self.parts.values()]
        sizes = {len(column) for column in columns if column is not None}
        if len(sizes) > 1:
            raise ValueError(f"Expected texts, labels, clients and parts of one length, got {sorted(sizes)}.")
        if self.labels is not None:
            self.labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDataset:
    """A data set of texts, of pairs of texts, of prompts with their responses, or of conversations.

    Attributes:
        name: The built-in or hub name, or the file's name.
        label_names: The name of class i at position i; empty where records have no class.
        kind: What one record is.
        digest: SHA-256 over the source's training texts before any choice of the run (limit, split, labels): what a
            ledger calls this data. The same on every machine.
        source: A sentence that says where the rows come from, with the licence where it is known.
        notes: What was done to the rows on the way in, e.g. ``"212 duplicate rows dropped"``.
    """

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    digest: str
    source: str
    notes: tuple[str, ...] = ()
    kind: Form = "text"


def taken(split: Any, rows: NDArray[np.int64]) -> Any:
    """Return these records of a split, of whatever kind."""
    found = {each.name: _picked(getattr(split, each.name), rows) for each in fields(split)}
    return replace(split, **found)


def _picked(value: Any, rows: NDArray[np.int64]) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _picked(column, rows) for name, column in value.items()}
    return value[rows] if isinstance(value, np.ndarray) else tuple(value[row] for row in rows)


def digest_of(texts: Iterable[str]) -> str:
    """Return the SHA-256 of a set of texts, whatever their order.

    It names the data in a ledger, so it must not change with what a run chooses: not with the labels, the split, the
    limit or the clients. Otherwise another choice would open a fresh account for the same people's texts.
    """
    state = hashlib.sha256()
    for text in sorted(texts):
        # JSON escapes every separator, so no two different lists of texts share one byte string
        state.update(json.dumps(text).encode() + b"\n")
    return state.hexdigest()
