"""Image files: one ``.safetensors`` with the tensors ``images``, ``labels`` and, for natural clients, ``client``.

``images`` is uint8 [N, H, W] (grey) or [N, H, W, C] (C channels, last); ``labels`` and ``client`` are integers [N].
The file's metadata may name them: ``label_names`` and ``client_names`` are JSON, a list of names or an object from
number to name. safetensors holds no code, and nothing of a file is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privfed.data.config import DataConfig
from privfed.data.images import CHANNELS, ImageTable, Pixels, RawImages
from privfed.errors import ConfigError, DataError, nearest

SUFFIX = ".safetensors"
IMAGES, LABELS, CLIENT = "images", "labels", "client"
INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "I64")

Tensors = dict[str, NDArray[np.generic]]


def is_image_file(path: str | None) -> bool:
    """Whether a ``[data] path`` names a file of images."""
    return path is not None and path.lower().endswith(SUFFIX)


def read_image_files(config: DataConfig) -> RawImages:
    """Return the images of ``config.path`` and, where given, ``config.test_path``.

    Raises:
        ConfigError: If the test rows are of another kind of file.
        DataError: If a file is not there, or does not hold labelled images.
    """
    path = Path(str(config.path))
    if config.test_path is not None and not is_image_file(config.test_path):
        raise ConfigError(
            f"[data] has path = {config.path!r} with test_path = {config.test_path!r}, "
            f"expected images ({SUFFIX}) in both: convert the one that is not."
        )
    test = None if config.test_path is None else Path(config.test_path)
    return RawImages(
        name=path.name,
        train=read_image_table(path, client=config.client),
        test=None if test is None else read_image_table(test, client=config.client),
        source=f"The file {path.name}" + (f", tested on {test.name}." if test is not None else "."),
    )


def read_image_table(path: Path, *, client: str | None = None) -> ImageTable:
    """Return the labelled images of the file at ``path``.

    Args:
        path: A safetensors file.
        client: The tensor of natural clients; without it, ``client`` where there is one.

    Raises:
        DataError: If it is not there, or does not hold labelled images.
    """
    tensors, metadata = _read(path, client)
    images = _images(path, tensors[IMAGES])
    labels = [int(label) for label in _integers(path, LABELS, tensors[LABELS], len(images))]
    owner = client or CLIENT
    clients = None
    if owner in tensors:
        names = _names(path, metadata, "client_names")
        clients = tuple(
            names.get(int(number), str(number)) for number in _integers(path, owner, tensors[owner], len(images))
        )
    return ImageTable(
        origin=str(path),
        images=images,
        labels=tuple(labels),
        clients=clients,
        label_names=_names(path, metadata, "label_names"),
    )


def _read(path: Path, client: str | None) -> tuple[Tensors, Mapping[str, str]]:
    """Return the tensors that matter, and the metadata; what has a wrong type is refused before it is read."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise DataError(
            f"The image file {str(path)!r} is {kind}, expected a file.{near} Paths are relative to the current folder."
        )
    wanted = [IMAGES, LABELS, *([client] if client else [])]
    try:
        with safe_open(path, framework="np") as file:
            held = list(file.keys())
            for name in wanted:
                _check_held(path, name, held)
            chosen = [name for name in (*wanted, CLIENT) if name in held]
            for name in chosen:
                _check_type(path, name, str(file.get_slice(name).get_dtype()))
            return {name: file.get_tensor(name) for name in chosen}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"The image file {str(path)!r} is not a whole safetensors file ({str(error).splitlines()[0]}): "
            "write or download it again."
        ) from error


def _check_held(path: Path, name: str, held: list[str]) -> None:
    if name not in held:
        known = ", ".join(map(repr, held)) or "none"
        raise DataError(
            f"The image file {str(path)!r} has no tensor {name!r}, only {known}.{nearest(name, held)} "
            f"Expected {IMAGES!r} uint8 [N, H, W] or [N, H, W, C] and integer {LABELS!r} [N]."
        )


def _check_type(path: Path, name: str, found: str) -> None:
    allowed = ("U8",) if name == IMAGES else INTEGERS
    if found not in allowed:
        expected = "U8 (pixels from 0 to 255)" if name == IMAGES else "integers"
        raise DataError(
            f"The image file {str(path)!r} has {name!r} of type {found}, expected {expected}: convert the tensor."
        )


def _images(path: Path, tensor: NDArray[np.generic]) -> tuple[Pixels, ...]:
    if tensor.ndim not in (3, 4) or 0 in tensor.shape:
        raise DataError(
            f"The image file {str(path)!r} has {IMAGES!r} of shape {list(tensor.shape)}, "
            "expected [N, H, W] or [N, H, W, C] without a zero: reshape the tensor."
        )
    images = tensor[..., None] if tensor.ndim == 3 else tensor
    if images.shape[3] not in CHANNELS:
        raise DataError(
            f"The image file {str(path)!r} has {IMAGES!r} of shape {list(tensor.shape)}: {images.shape[3]} channels, "
            "expected 1 to 4 in the last dimension: move the channels there."
        )
    pixels = np.ascontiguousarray(images, dtype=np.uint8)
    pixels.setflags(write=False)
    return tuple(pixels)


def _integers(path: Path, name: str, tensor: NDArray[np.generic], count: int) -> list[int]:
    if tensor.shape != (count,):
        raise DataError(
            f"The image file {str(path)!r} has {name!r} of shape {list(tensor.shape)}, "
            f"expected [{count}], one for each image: write both from the same rows."
        )
    found: list[int] = tensor.tolist()
    return found


def _names(path: Path, metadata: Mapping[str, str], key: str) -> dict[int, str]:
    if key not in metadata:
        return {}
    try:
        raw = json.loads(metadata[key])
        names = dict(enumerate(raw)) if isinstance(raw, list) else {int(number): raw[number] for number in raw}
    except (ValueError, TypeError) as error:
        raise _bad_names(path, key, metadata[key]) from error
    if not all(isinstance(name, str) and name for name in names.values()) or len(set(names.values())) < len(names):
        raise _bad_names(path, key, metadata[key])
    return names


def _bad_names(path: Path, key: str, found: str) -> DataError:
    return DataError(
        f"The image file {str(path)!r} has the metadata {key} = {found!r:.80}, expected JSON, a list of different "
        'names or an object such as {"0": "cat", "1": "dog"}: write it again.'
    )
