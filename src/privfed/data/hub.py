"""Data sets of the Hugging Face hub, through the ``datasets`` library.

Files are downloaded whole (no streaming) into that library's own cache, whose place ``HF_HOME`` sets, and are
found there again without a network. Code that comes with a data set is never run.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from privfed import objects
from privfed.data.config import DataConfig
from privfed.data.records import columns_of, form_of, has_labels
from privfed.data.rows import LABEL_NAME_COLUMN, RawDataset, RawTable
from privfed.errors import DataError, nearest
from privfed.types import Task

TEST_SPLITS = ("test", "validation", "dev")
"""Splits to test on, in order of preference; one without labels is passed over."""


def read_hub(config: DataConfig, built_in: tuple[str, ...] = (), task: Task = "sequence_classification") -> RawDataset:
    """Return the tables of the hub data set ``config.name``.

    Args:
        config: The ``[data]`` table.
        built_in: Names to suggest where the data set cannot be had.
        task: The task of the model, which says what columns are read.

    Raises:
        DataError: If it cannot be had, or has no split called ``train``.
    """
    splits, called = download(config, built_in)
    tables = {
        name: _table(f"split {name!r} of {called}", splits[name], config, task)
        for name in ("train", *TEST_SPLITS)
        if name in splits
    }
    tests = [
        name
        for name in TEST_SPLITS
        if name in tables and (not has_labels(task) or _any_labels(tables[name], config.label))
    ]
    return RawDataset(
        name=objects.short(str(config.name)),
        train=tables["train"],
        test=tables[tests[0]] if tests else None,
        source=source_of(called, splits["train"]),
        notes=(f"tested on the split {tests[0]!r}",) if tests else (),
    )


def download(config: DataConfig, built_in: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Return the splits of the hub data set or the object ``config.name``, and what messages call it.

    Raises:
        DataError: If it cannot be had, or has no split called ``train``.
    """
    if objects.is_object(config.name):
        return _handed(str(config.name)), "the data set that was handed over"
    splits = _download(config, built_in)
    called = repr(config.name) + (f" (subset {config.subset!r})" if config.subset is not None else "")
    if "train" not in splits:
        raise DataError(
            f"The hub data set {called} has the splits {', '.join(map(repr, splits))}, expected 'train': "
            "export the split you mean to a file and set [data] path."
        )
    return splits, called


def source_of(called: str, train: Any) -> str:
    """Return the sentence that says where the rows come from, with the licence where the hub tells it."""
    if not called.startswith("'"):
        return f"{called[0].upper()}{called[1:]}, a datasets.Dataset."
    return f"The hub data set {called}; {getattr(train.info, 'license', '') or 'see its page for the licence'}."


def _handed(name: str) -> dict[str, Any]:
    splits: dict[str, Any] | None = objects.find(name)
    if splits is None:
        raise DataError(
            f"[data] name = {objects.short(name)!r}... stands for a data set that Python code handed over, and it is "
            "not here: pass the same data= (and test=) to privfed.train or privfed.load_run, or set [data] path."
        )
    return splits


def _download(config: DataConfig, built_in: tuple[str, ...]) -> dict[str, Any]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"The data set {config.name!r} is not built in.{nearest(str(config.name), built_in)} "
            "Data sets of the hub need the package datasets, which is not installed: run `pip install "
            "'privfed[hub]'`, or set [data] path to a csv, tsv, jsonl or parquet file."
        )
    import datasets

    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        return dict(datasets.load_dataset(config.name, config.subset))
    except failures as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"The data set {config.name!r} is not built in and could not be had from the Hugging Face hub "
            f"({reason:.300}).{nearest(str(config.name), built_in)} "
            "Set [data] path to a csv, tsv, jsonl or parquet file, "
            "or run once online so that the data set is in the cache under HF_HOME."
        ) from error


def _table(origin: str, split: Any, config: DataConfig, task: Task) -> RawTable:
    # Only the columns asked for are read (others may be images); the rest is named, for the error messages.
    wanted = set(columns_of(config, form_of(config, task), labelled=has_labels(task)).values()) | {LABEL_NAME_COLUMN}
    columns = {name: list(split[name]) if name in wanted else [] for name in split.column_names}
    names = getattr(split.features.get(config.label), "names", None) or ()
    return RawTable(origin=origin, columns=columns, label_names=dict(enumerate(names)))


def _any_labels(table: RawTable, label: str) -> bool:
    """Whether any row is labelled; the hub writes -1 into test splits whose labels are withheld."""
    return any(value not in (-1, None) for value in table.columns.get(label, ()))
