"""What attacks on images know of the model's input.

Shape suffixes: C channels, H height, W width.
"""

from __future__ import annotations

import torch

from privfed.errors import ModelError
from privfed.models.image_examples import ImageFormat, image_format
from privfed_attacks.public_model import PublicModel


def form_of(model: PublicModel) -> ImageFormat:
    """Return the public model's input format.

    Raises:
        ModelError: If it reads texts.
    """
    if model.loaded.processor is None:
        raise ModelError("This model reads texts and has no image processor: use an attack on texts.")
    return image_format(model.loaded.model.config, model.loaded.processor.to_dict())


def pixel_range(model: PublicModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest value that each pixel of the model's input can have, both [1, C, H, W]."""
    form = form_of(model)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (form.mean, form.std))
    shape = (1, form.channels, form.height, form.width)
    return ((0 - mean) / std).expand(shape), ((255 * form.scale - mean) / std).expand(shape)
