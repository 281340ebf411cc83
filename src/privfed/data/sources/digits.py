"""``digits``: 1,797 real 8 x 8 images of handwritten digits that scikit-learn carries; no download.

A copy of the test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998,
doi 10.24432/C50P49, CC BY 4.0): 32 x 32 bitmaps of forms filled in by 13 people, of whom no record is kept, so there
are no natural clients.
"""

from __future__ import annotations

import numpy as np

from privfed.data.config import DataConfig
from privfed.data.images import ImageTable, RawImages
from privfed.data.load import SOURCES
from privfed.errors import ConfigError

LEVELS = 16
"""A pixel counts the inked dots, 0 to 16, of a 4 x 4 block."""


@SOURCES.register("digits")
def read_digits(config: DataConfig) -> RawImages:
    """Return the images, grey from 0 to 255, labelled 0 to 9.

    Raises:
        ConfigError: If the table asks for natural clients.
    """
    from sklearn.datasets import load_digits

    if config.client is not None:
        raise ConfigError(
            f"[data] has client = {config.client!r}, but the built-in data set 'digits' has no natural clients: "
            "remove client and divide it with [partition] name = 'dirichlet' or 'iid'."
        )
    bunch = load_digits()
    pixels_NHW = np.rint(bunch.images * (255 / LEVELS)).astype(np.uint8)
    return RawImages(
        name="digits",
        train=ImageTable(
            origin="digits",
            images=tuple(pixels_NHW[..., None]),
            labels=tuple(int(label) for label in bunch.target),
        ),
        source=(
            "Optical Recognition of Handwritten Digits (UCI, CC BY 4.0; Alpaydin and Kaynak 1998), "
            "its 1,797 test images as scikit-learn carries them."
        ),
    )
