"""The values that a source ends in. Shape suffix: N examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One side of a data set: ``texts[i]`` has class ``labels[i]`` and belongs to ``clients[i]``."""

    texts: tuple[str, ...] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    clients: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        sizes = {len(self.texts), len(self.labels), len(self.texts if self.clients is None else self.clients)}
        if len(sizes) > 1:
            raise ValueError(f"Expected texts, labels and clients of one length, got {sorted(sizes)}.")
        self.labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDataset:
    """A text classification data set.

    Attributes:
        name: The built-in or hub name, or the file's name.
        label_names: The name of class i at position i.
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
