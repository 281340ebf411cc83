"""Labelled images: their checks, duplicates and fixed split, from raw pixels to an :class:`ImageDataset`.

An image is a uint8 array [H, W, C]; two images are duplicates where shape and pixels are equal (near-duplicates are
not searched for: crops and recompressions of one picture may fall on both sides of a split that privfed makes).

Shape suffixes: N images, H rows, W columns, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.data.config import DataConfig
from privfed.data.dataset import digest_of
from privfed.data.duplicates import drop_exact, drop_shared
from privfed.data.labels import class_names, class_numbers, keep_classes, limited, same_kind
from privfed.data.records import Form
from privfed.data.rows import Label
from privfed.errors import DataError

Pixels = NDArray[np.uint8]

CHANNELS = (1, 2, 3, 4)
"""Grey, grey with alpha, red-green-blue, and that with alpha."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTable:
    """Images as a reader found them, checked: one label an image, and one client where there are any.

    Attributes:
        origin: What messages call the table, e.g. the file's path.
        images: Each uint8 [H, W, C]; shapes may differ from image to image.
        labels: One an image, all integers or all strings.
        clients: The natural clients' ids, or None.
        label_names: Names of integer labels by value, where the source declares them.
    """

    origin: str
    images: tuple[Pixels, ...] = field(repr=False)
    labels: tuple[Label, ...] = field(repr=False)
    clients: tuple[str, ...] | None = field(default=None, repr=False)
    label_names: Mapping[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        sizes = {len(self.images), len(self.labels), len(self.images if self.clients is None else self.clients)}
        if len(sizes) > 1:
            raise DataError(f"{self.origin} has images, labels and clients of lengths {sorted(sizes)}, expected one.")
        if not self.images:
            raise DataError(f"{self.origin} has no images, expected labelled images: check the file or the name.")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int]) -> ImageTable:
        """Return the rows at ``indices``, in that order; there must be one at least."""
        return ImageTable(
            origin=self.origin,
            images=tuple(self.images[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            clients=None if self.clients is None else tuple(self.clients[i] for i in indices),
            label_names=self.label_names,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RawImages:
    """What a source of images returns: tables, and sentences on where they come from and what was done to them."""

    name: str
    train: ImageTable
    test: ImageTable | None = None
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSplit:
    """One side of a data set: ``images[i]`` (uint8 [H, W, C]) has class ``labels[i]`` and belongs to ``clients[i]``."""

    images: tuple[Pixels, ...] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    clients: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDataset:
    """An image classification data set; the attributes are those of :class:`privfed.data.dataset.TextDataset`.

    Attributes:
        digest: SHA-256 over the set of the source's training images before any choice of the run (classes, limit,
            split, labels): what a ledger calls this data.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    label_names: tuple[str, ...]
    digest: str
    source: str
    notes: tuple[str, ...] = ()
    kind: Form = "image"


def image_hash(image: Pixels) -> str:
    """Return the SHA-256 of an image's shape and pixels."""
    shape = "x".join(map(str, image.shape))
    return hashlib.sha256(f"{shape}:".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def image_dataset(raw: RawImages, config: DataConfig, *, seed: int) -> ImageDataset:
    """Return the data set of ``raw`` images that ``config`` asks for.

    Exact duplicates are dropped, the first is kept. Where the source has no test split, one is held out by the
    images' hashes alone: neither the order of the images nor the run's seed moves an image to the other side. A test
    split that the source has is left as it is, and training images that repeat one of it are dropped.

    Args:
        raw: What a source returned.
        config: The ``[data]`` table.
        seed: The run's seed; it draws the images of ``config.limit`` and nothing else.

    Raises:
        DataError: If the images cannot be used as described.
    """
    rows, dropped = drop_exact(raw.train, _hashes(raw.train), "image")
    notes = [*raw.notes, *dropped]
    # before anything the configuration chooses: a budget belongs to all of the images
    digest = digest_of(_hashes(rows))
    rows = keep_classes(rows, config.classes, rows.origin)
    if raw.test is not None:
        test = keep_classes(raw.test, config.classes, raw.test.origin, all_held=False)
        rows, test = same_kind(rows, test)
        rows, shared = drop_shared(rows, _hashes(rows), set(_hashes(test)), "image", (rows.origin, test.origin))
        notes += shared
    else:
        rows, test = _hold_out(rows, config.test_fraction)
    classes = class_numbers(rows, test, (raw.test or raw.train).origin)
    rows, few = limited(rows, config.limit, seed, "training images")
    notes += few
    if len(set(rows.labels)) < 2:
        raise DataError(
            f"All {len(rows)} training images of {rows.origin} have the label {rows.labels[0]!r}, "
            "expected two classes or more: check [data] classes and limit."
        )
    return ImageDataset(
        name=raw.name,
        train=_encode(rows, classes),
        test=_encode(test, classes),
        label_names=class_names(classes, rows, test),
        digest=digest,
        source=raw.source,
        notes=tuple(notes),
    )


def _hashes(rows: ImageTable) -> list[str]:
    return [image_hash(image) for image in rows.images]


def _hold_out(rows: ImageTable, fraction: float) -> tuple[ImageTable, ImageTable]:
    """Return training and test images; a class that would have no training image keeps all of them there."""
    to_test = [int(key[:12], 16) / 2.0**48 < fraction for key in _hashes(rows)]
    trained = {label for label, test in zip(rows.labels, to_test, strict=True) if not test}
    held = [i for i, test in enumerate(to_test) if test and rows.labels[i] in trained]
    kept = sorted(set(range(len(rows))) - set(held))
    if not held or not kept:
        raise DataError(
            f"{rows.origin}: a test_fraction of {fraction} puts {len(held)} of {len(rows)} images to the test side, "
            "expected images on both sides: give more images, another test_fraction, or a test_path."
        )
    return rows.take(kept), rows.take(held)


def _encode(rows: ImageTable, classes: Mapping[Label, int]) -> ImageSplit:
    return ImageSplit(
        images=rows.images,
        labels=np.array([classes[label] for label in rows.labels], dtype=np.int64),
        clients=rows.clients,
    )
