"""The baseline of every inversion of images: the mean of pictures from elsewhere, without any update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from privfed.table import Table
from privfed_attacks.inversion import ATTACKS, Attack, Reconstruction, Setting

if TYPE_CHECKING:
    from privfed_attacks.observation import Observation
    from privfed_attacks.public_model import PublicModel


class PriorImagesConfig(Table):
    """No options."""

    name: Literal["prior_images"] = "prior_images"


def run(
    observations: Sequence[Observation],  # noqa: ARG001  (that is the point)
    model: PublicModel,
    setting: Setting,
    config: PriorImagesConfig,  # noqa: ARG001
) -> Reconstruction:
    """Return the mean of the pictures from elsewhere for every example; grey where there are none."""
    from privfed_attacks.images import pixel_range

    low, high = pixel_range(model)
    grey = ((low + high) / 2).numpy()[0]
    picture = grey if setting.images is None else setting.images.mean(axis=0)
    count = setting.sequences or 1
    return Reconstruction(images=np.repeat(picture[None].astype(np.float32), count, axis=0))


ATTACKS.register("prior_images")(Attack(config=PriorImagesConfig, run=run, reads="images"))
