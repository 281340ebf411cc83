"""From a ``[data]`` table to a data set: read, check, drop duplicates, split, encode the labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from privfed.data.config import DataConfig
from privfed.data.dataset import Split, TextDataset, digest_of
from privfed.data.duplicates import drop_exact, drop_shared
from privfed.data.rows import Label, RawDataset, Rows, check_rows, counted, drop_empty
from privfed.data.splits import hold_out
from privfed.errors import ConfigError, DataError
from privfed.registry import Registry
from privfed.rng import experiment_rng

Source = Callable[[DataConfig], RawDataset]
SOURCES: Registry[Source] = Registry("data set", "privfed.data.sources")
"""Built-in data sets by name: functions from the ``[data]`` table to raw tables."""

BUILT_IN_CLIENT = "client_id"
"""The column of natural clients of a built-in source; it is used without being asked for."""


def load_dataset(config: DataConfig, *, seed: int) -> TextDataset:
    """Return the data set that ``config`` describes.

    Rows without text and exact duplicates (up to case and white space) are dropped. Where the source has no
    test split, one is held out: near-duplicates stay on one side together, and the split depends on the rows
    alone. A test split that the source has is left as it is, and training rows that repeat one of its texts
    are dropped.

    Args:
        config: The ``[data]`` table.
        seed: The run's seed; it draws the rows of ``config.limit`` and nothing else.

    Raises:
        DataError: If the data cannot be used as described.
        ConfigError: If the table asks for what the source does not have.
    """
    raw, config = _read(config)
    rows = check_rows(raw.train, config)
    notes = list(raw.notes)
    rows, empty = drop_empty(rows, raw.train.origin)
    rows, dropped = drop_exact(rows)
    notes += empty + dropped
    digest = digest_of(rows.texts)  # before anything the configuration chooses: a budget belongs to all of the rows
    if raw.test is not None:
        test = check_rows(raw.test, config)
        rows, test = _same_kind(rows, test)
        rows, shared = drop_shared(rows, test)
        notes += shared
        if not rows:
            raise DataError(
                f"Every training row of {raw.train.origin} repeats a row of {raw.test.origin}, "
                "expected other rows to train on: check [data] path and test_path."
            )
    else:
        rows, test, held_out = hold_out(rows, config.test_fraction, origin=raw.train.origin)
        notes += held_out
    classes = _classes(rows, test, (raw.test or raw.train).origin)
    rows, limited = _limit(rows, config.limit, seed)
    notes += limited
    if len(set(rows.labels)) < 2:
        raise DataError(
            f"All {len(rows)} training rows of {raw.train.origin} have the label {rows.labels[0]!r}, "
            "expected two classes or more: check [data] label and limit."
        )
    label_names = _names(classes, rows, test)
    train = _encode(rows, classes)
    return TextDataset(
        name=raw.name,
        train=train,
        test=_encode(test, classes),
        label_names=label_names,
        digest=digest,
        source=raw.source,
        notes=tuple(notes),
    )


def _read(config: DataConfig) -> tuple[RawDataset, DataConfig]:
    """Return the raw data set, and the table with the natural clients that a built-in source brings."""
    if config.path is not None:
        from privfed.data.files import read_files

        return read_files(config), config
    if config.name in SOURCES.names():
        if config.subset is not None:
            raise ConfigError(
                f"[data] has subset = {config.subset!r}, but the built-in data set {config.name!r} has none: "
                "remove subset."
            )
        raw = SOURCES.get(config.name)(config)
        if config.client is None and BUILT_IN_CLIENT in raw.train.columns:
            config = config.model_copy(update={"client": BUILT_IN_CLIENT})
        return raw, config
    from privfed.data.hub import read_hub

    return read_hub(config, tuple(SOURCES.names())), config


def _limit(rows: Rows, limit: int | None, seed: int) -> tuple[Rows, list[str]]:
    if limit is None or limit >= len(rows):
        return rows, []
    chosen = experiment_rng(seed, "data", "limit").permutation(len(rows))[:limit]
    return rows.take(np.sort(chosen).tolist()), [f"{limit} of {len(rows)} training rows used (limit)"]


def _same_kind(train: Rows, test: Rows) -> tuple[Rows, Rows]:
    """Return both with labels of one kind: a file of strings may hold only such as look like integers."""
    if len({type(label) for rows in (train, test) for label in rows.labels}) == 1:
        return train, test
    return (
        replace(train, labels=tuple(map(str, train.labels))),
        replace(test, labels=tuple(map(str, test.labels))),
    )


def _classes(train: Rows, test: Rows, origin: str) -> dict[Label, int]:
    """Return the class number of each training label: in numeric order, or in that of the strings."""
    known = set(train.labels)
    unseen = Counter(label for label in test.labels if label not in known)
    if unseen:
        label, count = unseen.most_common(1)[0]
        more = f" (and {len(unseen) - 1} more such labels)" if len(unseen) > 1 else ""
        raise DataError(
            f"The test label {label!r} in {counted(count, 'row')} of {origin}{more} is not among "
            "the training labels, expected only labels that were trained on: "
            "remove the rows, or add training rows."
        )
    return {label: number for number, label in enumerate(sorted(known, key=_order))}


def _order(label: Label) -> tuple[int, str]:
    return (label, "") if isinstance(label, int) else (0, label)


def _names(classes: dict[Label, int], train: Rows, test: Rows) -> tuple[str, ...]:
    names = {**test.label_names, **train.label_names}
    return tuple(names.get(label, str(label)) if isinstance(label, int) else label for label in classes)


def _encode(rows: Rows, classes: dict[Label, int]) -> Split:
    return Split(
        texts=rows.texts,
        labels=np.array([classes[label] for label in rows.labels], dtype=np.int64),
        clients=rows.clients,
    )
