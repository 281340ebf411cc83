"""Data sets of the ``datasets`` library that Python code hands over: read as those of the hub are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privfed import objects
from privfed.data.config import DataConfig
from privfed.data.hub import TEST_SPLITS
from privfed.data.records import columns_of, form_of, has_labels
from privfed.data.rows import LABEL_NAME_COLUMN
from privfed.errors import DataError
from privfed.types import Task


def hand_over(data: Any, test: Any, config: DataConfig, task: Task) -> objects.Handed:
    """Take a data set over; it is found by the name of the result as long as that is held.

    Args:
        data: A ``datasets.Dataset`` of training rows, or a ``DatasetDict`` with the split ``train``.
        test: A ``Dataset`` of test rows; None for the split of ``data`` called test, validation or dev, or for rows
            held out.
        config: The ``[data]`` table, which says what columns are read.
        task: The task of the model.

    Raises:
        DataError: If they are something else, or there are two test splits.
    """
    import datasets

    if isinstance(data, datasets.DatasetDict):
        splits = {name: data[name] for name in ("train", *TEST_SPLITS) if name in data}
        if "train" not in splits:
            raise DataError(
                f"The DatasetDict has the splits {', '.join(map(repr, data))}, expected 'train': pass the split you "
                "mean as data=."
            )
    else:
        splits = {"train": data}
    if test is not None:
        if len(splits) > 1:
            raise DataError(
                f"test= was given, and data= has the split {list(splits)[1]!r} to test on: pass data['train'] "
                "as data=, or leave test= out."
            )
        splits["test"] = test
    for key, split in splits.items():
        if not isinstance(split, datasets.Dataset):
            raise DataError(f"{_argument(key)} is a {type(split).__name__}, expected a datasets.Dataset: {_way(split)}")
    # a format that its owner set, torch tensors say, is not what is read
    plain = {name: split.with_format(None) for name, split in splits.items()}
    return objects.hand_over(content_digest(plain, config, task), plain)


def content_digest(splits: Mapping[str, Any], config: DataConfig, task: Task) -> str:
    """Return the SHA-256 of the columns that a run reads, row by row.

    It tells whether a run goes on with the same rows in the same order. What a ledger calls the data is another digest,
    :func:`privfed.data.dataset.digest_of`: the same for an object as for a file of the same records.
    """
    import datasets

    form = form_of(config, task)
    wanted = {*columns_of(config, form, labelled=has_labels(task)).values(), LABEL_NAME_COLUMN}
    if form == "image":
        wanted.add(config.image)
    state = hashlib.sha256()
    for name, split in splits.items():
        for column in sorted(wanted & set(split.column_names)):
            feature = split.features[column]
            if isinstance(feature, datasets.Image):
                split = split.cast_column(column, datasets.Image(decode=False))
            state.update(json.dumps([name, column, getattr(feature, "names", None)]).encode() + b"\n")
            for value in split[column]:
                state.update(_bytes(value) + b"\n")
    return state.hexdigest()


def _bytes(value: Any) -> bytes:
    """Return a value of a column as bytes that no other value has."""
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:  # an image that is not decoded
        content = value["bytes"]
        if content is None and value["path"] is not None:
            content = Path(value["path"]).read_bytes()
        return hashlib.sha256(content or b"").digest()
    return json.dumps(value, sort_keys=True, default=str).encode()


def _argument(split: str) -> str:
    return "data=" if split == "train" else "test=" if split == "test" else f"The split {split!r} of data="


def _way(value: Any) -> str:
    """Return what to do with something that is no data set."""
    name = type(value).__name__
    if name == "IterableDataset":
        return "a stream has no fixed rows to account for; load it without streaming."
    if name == "DataFrame":
        return "use datasets.Dataset.from_pandas(frame)."
    if isinstance(value, list):
        return "use datasets.Dataset.from_list(rows)."
    if isinstance(value, dict):
        return "use datasets.Dataset.from_dict(columns)."
    return "or give the path of a file in [data] path."
