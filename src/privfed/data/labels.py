"""Labels of checked rows, whatever the rows hold: their classes, numbers and names, and the rows a run keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np

from privfed.data.rows import Label, counted
from privfed.errors import DataError, nearest
from privfed.rng import experiment_rng


class Labelled(Protocol):
    """A dataclass of rows that may have labels: of texts, or of images."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def labels(self) -> tuple[Label, ...] | None:
        """One an example, all integers or all strings; None where records have no class."""

    @property
    def label_names(self) -> Mapping[int, str]:
        """Names of integer labels by value, where the source declares them."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Self:
        """Return the rows at ``indices``, in that order."""


R = TypeVar("R", bound=Labelled)


def keep_classes(rows: R, classes: Sequence[Label] | None, origin: str, *, all_held: bool = True) -> R:
    """Return the rows whose label, or its name, is one of ``classes``; all of them for None.

    Args:
        rows: The rows.
        classes: The labels to keep.
        origin: What messages call the rows.
        all_held: Whether each of ``classes`` must have a row, or one of them is enough (in a test split).

    Raises:
        DataError: If no row has one of them; the message names it.
    """
    if classes is None or rows.labels is None:
        return rows
    known = {name: label for label, name in rows.label_names.items()} | {str(label): label for label in rows.labels}
    held = set(rows.labels)
    wanted = [known.get(str(label), label) for label in classes]
    for asked, label in zip(classes, wanted, strict=True):
        if label not in held and (all_held or held.isdisjoint(wanted)):
            raise DataError(
                f"[data] classes has {asked!r}, but no row of {origin} has that label.{nearest(str(asked), known)} "
                f"Labels: {', '.join(sorted(map(str, held))[:20])}."
            )
    kept = [i for i, label in enumerate(rows.labels) if label in set(wanted)]
    return rows if len(kept) == len(rows) else rows.take(kept)


def same_kind(train: R, test: R) -> tuple[R, R]:
    """Return both with labels of one kind: a file of strings may hold only such as look like integers."""
    if train.labels is None or test.labels is None:
        return train, test
    if len({type(label) for labels in (train.labels, test.labels) for label in labels}) == 1:
        return train, test
    return (
        replace(train, labels=tuple(map(str, train.labels))),
        replace(test, labels=tuple(map(str, test.labels))),
    )


def class_numbers(train: Labelled, test: Labelled, origin: str) -> dict[Label, int]:
    """Return the class number of each training label: in numeric order, or in that of the strings.

    Raises:
        DataError: If a test label is not among the training labels.
    """
    known = set(train.labels or ())
    unseen = Counter(label for label in test.labels or () if label not in known)
    if unseen:
        label, count = unseen.most_common(1)[0]
        more = f" (and {len(unseen) - 1} more such labels)" if len(unseen) > 1 else ""
        raise DataError(
            f"The test label {label!r} in {counted(count, 'row')} of {origin}{more} is not among "
            "the training labels, expected only labels that were trained on: "
            "remove the rows, or add training rows."
        )
    return {label: number for number, label in enumerate(sorted(known, key=_order))}


def class_names(classes: Mapping[Label, int], train: Labelled, test: Labelled) -> tuple[str, ...]:
    """Return the name of each class by its number: as the source names it, or the label itself."""
    names = {**test.label_names, **train.label_names}
    return tuple(names.get(label, str(label)) if isinstance(label, int) else label for label in classes)


def limited(rows: R, limit: int | None, seed: int, noun: str = "training rows") -> tuple[R, list[str]]:
    """Return ``limit`` of the rows, drawn by the run's seed and in their own order, and notes."""
    if limit is None or limit >= len(rows):
        return rows, []
    chosen = experiment_rng(seed, "data", "limit").permutation(len(rows))[:limit]
    return rows.take(np.sort(chosen).tolist()), [f"{limit} of {len(rows)} {noun} used (limit)"]


def _order(label: Label) -> tuple[int, str]:
    return (label, "") if isinstance(label, int) else (0, label)
