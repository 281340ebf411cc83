"""Images as tensors: resized to the model's input, its channels, its scale.

An image goes through torch alone (antialiased bilinear resizing, as Pillow does it), so that the same pixels give
the same tensor wherever a model runs; of a model's image processor only the numbers are used. No augmentation: an
example would then have no single gradient to clip.

Shape suffixes: B examples of a microbatch, C channels, H rows, W columns, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from privfed.errors import ModelError
from privfed.models.examples import Batch, LabelledExamples, Rows
from privfed.rng import experiment_rng

if TYPE_CHECKING:
    from privfed.models.config import ModelConfig
    from privfed.models.loading import LoadedModel

Pixels = NDArray[np.uint8]

# ITU-R BT.601, as Pillow's conversion to grey
LUMA = (0.299, 0.587, 0.114)

PROBE_COUNT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFormat:
    """What a model takes: pixels [C, H, W] as (value * scale - mean) / std.

    Attributes:
        tokens: Positions of the model's transformer for one image, 1 where it has none: what a cache has to hold.
    """

    height: int
    width: int
    channels: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens: int = 1


def image_format(model_config: Any, processor: Mapping[str, Any]) -> ImageFormat:
    """Return the input format of a transformers vision model.

    Args:
        model_config: Its configuration; ``image_size`` and ``num_channels`` are taken from here where it has them.
        processor: The content of its ``preprocessor_config.json``, empty where it has none.

    Raises:
        ModelError: If the size is nowhere told, or mean and std do not fit the channels.
    """
    channels = int(getattr(model_config, "num_channels", 3))
    height, width = _size(model_config, processor)
    normalise = bool(processor.get("do_normalize", True))
    mean = _per_channel(processor.get("image_mean", 0.5) if normalise else 0.0, channels)
    std = _per_channel(processor.get("image_std", 0.5) if normalise else 1.0, channels)
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise ModelError(
            f"The model takes {channels} channels, but its image_mean = {mean} and image_std = {std} do not give one "
            "number (std above 0) for each: fix its preprocessor_config.json."
        )
    scale = float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 1.0
    tokens = _tokens(model_config, height, width)
    return ImageFormat(height=height, width=width, channels=channels, scale=scale, mean=mean, std=std, tokens=tokens)


class ImageExamples(LabelledExamples):
    """Images with labels; every batch is float32 [B, C, H, W] in the model's format.

    Args:
        images: One uint8 [H, W, C] an example; sizes and channels may differ from image to image.
        labels: Class numbers, one an example.
        form: What the model takes.

    Raises:
        ModelError: If the images' channels cannot be turned into the model's.
    """

    def __init__(self, images: Sequence[Pixels], labels: NDArray[np.int64], form: ImageFormat) -> None:
        self._images = tuple(images)
        self.labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        self.form = form
        for channels in sorted({int(image.shape[2]) for image in self._images}):
            check_channels(channels, form.channels)
        self.lengths = np.full(len(self._images), form.tokens, dtype=np.int64)

    def unprefixed(self, rows: Rows) -> Batch:
        """Return the images ``rows`` as the model takes them."""
        pixels_BCHW = to_pixel_values([self._images[row] for row in rows], self.form)
        return self.labelled(rows, {"pixel_values": pixels_BCHW})

    def probe(self, classes: int) -> ImageExamples:
        """Return three images of random pixels with labels."""
        shape = (PROBE_COUNT, self.form.height, self.form.width, self.form.channels)
        pixels = experiment_rng(0, "probe").integers(0, 256, shape, dtype=np.uint8)
        return ImageExamples(tuple(pixels), np.arange(PROBE_COUNT, dtype=np.int64) % classes, self.form)


def image_examples(split: Any, kind: str, loaded: LoadedModel, config: ModelConfig) -> ImageExamples:  # noqa: ARG001
    """Return labelled images for this model: what ``models/tasks.py`` names."""
    return ImageExamples(split.images, split.labels, image_format(loaded.model.config, loaded.processor.to_dict()))


def to_pixel_values(images: Sequence[Pixels], form: ImageFormat) -> torch.Tensor:
    """Return ``images``, each uint8 [H, W, C], as float32 [B, C, H, W] in the format ``form``; each on its own."""
    sizes = {image.shape for image in images}
    groups = [images] if len(sizes) == 1 else [[image] for image in images]
    values_BCHW = torch.cat([_resized(group, form) for group in groups])
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (form.mean, form.std))
    return (values_BCHW * form.scale - mean) / std


def check_channels(found: int, wanted: int) -> None:
    """Check that images of ``found`` channels can become images of ``wanted``.

    Raises:
        ModelError: If not.
    """
    if found not in (1, 2, 3, 4) or wanted not in (1, 3, found):
        raise ModelError(
            f"The images have {found} channels and the model takes {wanted}, expected a model of 1 or 3: "
            "choose another model, or convert the images."
        )


def _resized(images: Sequence[Pixels], form: ImageFormat) -> torch.Tensor:
    """Return images of one shape as float32 [B, C, H, W] from 0 to 255, in the model's size and channels."""
    pixels_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    pixels_BCHW = _in_channels(pixels_BCHW, form.channels)
    if pixels_BCHW.shape[2:] == (form.height, form.width):
        return pixels_BCHW
    size = (form.height, form.width)
    return interpolate(pixels_BCHW, size=size, mode="bilinear", antialias=True, align_corners=False)


def _in_channels(pixels_BCHW: torch.Tensor, channels: int) -> torch.Tensor:
    if pixels_BCHW.shape[1] == channels:
        return pixels_BCHW
    if pixels_BCHW.shape[1] in (2, 4):  # alpha comes last; the picture under it is kept as it is
        pixels_BCHW = pixels_BCHW[:, :-1]
    if pixels_BCHW.shape[1] == channels:
        return pixels_BCHW
    if channels == 1:
        return (pixels_BCHW * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    return pixels_BCHW.expand(-1, channels, -1, -1)


def _size(model_config: Any, processor: Mapping[str, Any]) -> tuple[int, int]:
    """Return (rows, columns): the model's own where it is fixed, else what its processor makes."""
    for told in (getattr(model_config, "image_size", None), processor.get("crop_size"), processor.get("size")):
        if isinstance(told, Mapping):
            edge = told.get("shortest_edge")
            told = (told.get("height", edge), told.get("width", edge))
        pair = (told, told) if isinstance(told, int) else told
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair):
            return int(pair[0]), int(pair[1])
    raise ModelError(
        "The model tells no image size, neither image_size in its config.json nor size in its "
        "preprocessor_config.json: add one of them."
    )


def _per_channel(told: Any, channels: int) -> tuple[float, ...]:
    """Return one number a channel; a single one, or three equal ones of a grey model, serve all."""
    values = tuple(float(value) for value in told) if isinstance(told, list | tuple) else (float(told),) * channels
    return values[:1] * channels if len(set(values)) == 1 else values


def _tokens(model_config: Any, height: int, width: int) -> int:
    patch = getattr(model_config, "patch_size", None)
    return 1 + (height // patch) * (width // patch) if isinstance(patch, int) and patch > 0 else 1
