"""From a ``[data]`` table to a data set of images: a safetensors file, a built-in source, or the hub."""

from __future__ import annotations

from typing import Any

import numpy as np

from privfed import objects
from privfed.data.config import DataConfig
from privfed.data.hub import TEST_SPLITS, download, source_of
from privfed.data.image_files import SUFFIX, is_image_file, read_image_files
from privfed.data.images import ImageDataset, ImageTable, Pixels, RawImages, image_dataset
from privfed.data.load import SOURCES
from privfed.errors import ConfigError, DataError, nearest
from privfed.types import Task

_MODES = {"L": "L", "1": "L", "RGB": "RGB", "LA": "LA", "RGBA": "RGBA"}


def load_images(config: DataConfig, task: Task, seed: int) -> ImageDataset:
    """Return the data set of images that ``config`` describes; see :func:`privfed.data.images.image_dataset`.

    Raises:
        ConfigError: If it describes something else than images.
        DataError: If the images cannot be used as described.
    """
    return image_dataset(_read(config, task), config, seed=seed)


def _read(config: DataConfig, task: Task) -> RawImages:
    if config.path is not None:
        if not is_image_file(config.path):
            raise ConfigError(
                f'[data] has path = {config.path!r} and model.task is "{task}", expected a {SUFFIX} file of images: '
                "convert it, or set the task that fits."
            )
        return read_image_files(config)
    if config.name not in SOURCES.names():
        return _read_hub(config)
    if config.subset is not None:
        raise ConfigError(
            f"[data] has subset = {config.subset!r}, but the built-in data set {config.name!r} has none: remove subset."
        )
    raw = SOURCES.get(config.name)(config)
    if not isinstance(raw, RawImages):
        raise ConfigError(
            f'The built-in data set {config.name!r} holds no images and model.task is "{task}": '
            'use [data] name = "digits" or a file of images, or set model.task = "sequence_classification".'
        )
    return raw


def _read_hub(config: DataConfig) -> RawImages:
    """Return the images of a hub data set: PNG, JPEG and what else Pillow decodes, in the sizes they have."""
    splits, called = download(config, tuple(SOURCES.names()))
    tables = {
        name: _table(f"split {name!r} of {called}", splits[name], config)
        for name in ("train", *TEST_SPLITS)
        if name in splits and (name == "train" or _any_labels(splits[name], config.label))
    }
    tests = [name for name in TEST_SPLITS if name in tables]
    return RawImages(
        name=objects.short(str(config.name)),
        train=tables["train"],
        test=tables[tests[0]] if tests else None,
        source=source_of(called, splits["train"]),
        notes=(f"tested on the split {tests[0]!r}",) if tests else (),
    )


def _any_labels(split: Any, label: str) -> bool:
    """Whether any row is labelled; the hub writes -1 into test splits whose labels are withheld."""
    return label in split.column_names and any(value not in (-1, None) for value in split[label])


def _table(origin: str, split: Any, config: DataConfig) -> ImageTable:
    import datasets

    held = list(split.column_names)
    for key, column in (("image", config.image), ("label", config.label), ("client", config.client)):
        if column is not None and column not in held:
            raise DataError(
                f"{origin} has no column {column!r}, only {', '.join(map(repr, held))}.{nearest(column, held)} "
                f"Set [data] {key} to the right one."
            )
    if not isinstance(split.features[config.image], datasets.Image):
        raise DataError(f"{origin} has no images in its column {config.image!r}: set [data] image to the right one.")
    labels = list(split[config.label])
    if not all(isinstance(label, int | str) and not isinstance(label, bool) for label in labels):
        raise DataError(f"{origin} has labels that are no integers or strings, or null: fix the column.")
    names = getattr(split.features[config.label], "names", None) or ()
    return ImageTable(
        origin=origin,
        images=tuple(_pixels(image, origin, row) for row, image in enumerate(split[config.image])),
        labels=tuple(labels),
        clients=None if config.client is None else tuple(map(str, split[config.client])),
        label_names=dict(enumerate(names)),
    )


def _pixels(image: Any, origin: str, row: int) -> Pixels:
    """Return a Pillow image as uint8 [H, W, C]."""
    if image is None:
        raise DataError(f"{origin}: data row {row + 1} has null as its image: fix or remove the row.")
    pixels = np.asarray(image.convert(_MODES.get(image.mode, "RGB")), dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels
