"""From a ``[data]`` table to a data set: read, check, drop duplicates, split, encode the labels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal, overload

import numpy as np

from privfed.data.config import DataConfig
from privfed.data.dataset import Dataset, Split, TextDataset, digest_of
from privfed.data.duplicates import drop_exact, drop_shared, normalise
from privfed.data.images import RawImages
from privfed.data.labels import class_names, class_numbers, keep_classes, limited, same_kind
from privfed.data.records import form_of, has_labels
from privfed.data.rows import Label, RawDataset, Rows, check_rows, drop_empty
from privfed.data.splits import hold_out
from privfed.errors import ConfigError, DataError
from privfed.registry import Registry
from privfed.types import Task

TextTask = Literal["sequence_classification", "causal_lm"]
Source = Callable[[DataConfig], RawDataset | RawImages]
SOURCES: Registry[Source] = Registry("data set", "privfed.data.sources")
"""Built-in data sets by name: functions from the ``[data]`` table to raw tables, or to images."""

BUILT_IN_CLIENT = "client_id"
"""The column of natural clients of a built-in source; it is used without being asked for."""


READERS: dict[Task, str] = {
    "sequence_classification": "privfed.data.load:load_texts",
    "causal_lm": "privfed.data.load:load_texts",
    "image_classification": "privfed.data.image_load:load_images",
}
"""How the data of a task are read, as ``module:function``: from (table, task, seed) to a data set."""


@overload
def load_dataset(config: DataConfig, *, seed: int, task: TextTask = "sequence_classification") -> TextDataset: ...


@overload
def load_dataset(config: DataConfig, *, seed: int, task: Task) -> Dataset: ...


def load_dataset(config: DataConfig, *, seed: int, task: Task = "sequence_classification") -> Dataset:
    """Return the data set that ``config`` describes, as ``task`` reads it.

    Records without text and exact duplicates (up to case and white space) are dropped. Where the source has no
    test split, one is held out: near-duplicates stay on one side together, and the split depends on the records
    alone. A test split that the source has is left as it is, and training records that repeat one of its texts
    are dropped.

    Args:
        config: The ``[data]`` table.
        seed: The run's seed; it draws the records of ``config.limit`` and nothing else.
        task: The task of the model.

    Raises:
        DataError: If the data cannot be used as described.
        ConfigError: If the table asks for what the source or the task does not have.
    """
    form_of(config, task)
    if task not in READERS:
        raise ConfigError(f'There is no reader of data for model.task = "{task}", only for {", ".join(READERS)}.')
    module, _, function = READERS[task].partition(":")
    read: Callable[[DataConfig, Task, int], Dataset] = getattr(importlib.import_module(module), function)
    return read(config, task, seed)


def load_texts(config: DataConfig, task: Task, seed: int) -> TextDataset:
    """Return a data set of texts; see :func:`load_dataset`."""
    raw, config = _read(config, task)
    rows = check_rows(raw.train, config, task)
    notes = list(raw.notes)
    rows, empty = drop_empty(rows, raw.train.origin)
    rows, dropped = drop_exact(rows, [normalise(text) for text in rows.texts], "row")
    notes += empty + dropped
    digest = digest_of(rows.texts)  # before anything the configuration chooses: a budget belongs to all of the rows
    rows = keep_classes(rows, config.classes, raw.train.origin)
    rows, test, changed = _sides(raw, rows, config, task)
    notes += changed
    classes = {} if rows.labels is None else class_numbers(rows, test, (raw.test or raw.train).origin)
    rows, few = limited(rows, config.limit, seed)
    notes += few
    if rows.labels is not None and len(set(rows.labels)) < 2:
        raise DataError(
            f"All {len(rows)} training rows of {raw.train.origin} have the label {rows.labels[0]!r}, "
            "expected two classes or more: check [data] label and limit."
        )
    return TextDataset(
        name=raw.name,
        train=_encode(rows, classes),
        test=_encode(test, classes),
        label_names=class_names(classes, rows, test),
        kind=form_of(config, task),
        digest=digest,
        source=raw.source,
        notes=tuple(notes),
    )


def _sides(raw: RawDataset, rows: Rows, config: DataConfig, task: Task) -> tuple[Rows, Rows, list[str]]:
    """Return training rows, test rows and notes: the source's own test split, or one that is held out."""
    if raw.test is None:
        return hold_out(rows, config.test_fraction, origin=raw.train.origin)
    test = keep_classes(check_rows(raw.test, config, task), config.classes, raw.test.origin, all_held=False)
    if not has_labels(task):  # with classes a test row without text is still to be scored
        test, _ = drop_empty(test, raw.test.origin)
    rows, test = same_kind(rows, test)
    keys, held_out = [normalise(text) for text in rows.texts], {normalise(text) for text in test.texts}
    rows, notes = drop_shared(rows, keys, held_out, "row", (raw.train.origin, raw.test.origin))
    return rows, test, notes


def _read(config: DataConfig, task: Task) -> tuple[RawDataset, DataConfig]:
    """Return the raw data set, and the table with the natural clients that a built-in source brings."""
    if config.path is not None:
        from privfed.data.files import read_files
        from privfed.data.image_files import is_image_file

        if is_image_file(config.path):
            raise ConfigError(
                f'[data] has path = {config.path!r}, a file of images, and model.task is "{task}": '
                'set model.task = "image_classification" and model.name to a vision model.'
            )
        return read_files(config, labelled=has_labels(task)), config
    if config.name in SOURCES.names():
        if config.subset is not None:
            raise ConfigError(
                f"[data] has subset = {config.subset!r}, but the built-in data set {config.name!r} has none: "
                "remove subset."
            )
        raw = SOURCES.get(config.name)(config)
        if isinstance(raw, RawImages):
            raise ConfigError(
                f'The built-in data set {config.name!r} holds images and model.task is "{task}": '
                'set model.task = "image_classification" and model.name to a vision model.'
            )
        if config.client is None and BUILT_IN_CLIENT in raw.train.columns:
            config = config.model_copy(update={"client": BUILT_IN_CLIENT})
        return raw, config
    from privfed.data.hub import read_hub

    return read_hub(config, tuple(SOURCES.names()), task), config


def _encode(rows: Rows, classes: dict[Label, int]) -> Split:
    labels = None if rows.labels is None else np.array([classes[label] for label in rows.labels], dtype=np.int64)
    return Split(texts=rows.texts, labels=labels, clients=rows.clients, parts=rows.parts)
