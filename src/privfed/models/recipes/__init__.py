"""Pretraining recipes, one file each: a small base model from public data, for machines that can download none.

What a recipe reads is public by the caller's declaration: nothing of it is charged to any budget, so private data have
no place here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.registry import Registry
from privfed.table import Table

Pixels = NDArray[np.uint8]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicImages:
    """Labelled images to pretrain on: ``images[i]`` (uint8 [H, W, C]) has class ``labels[i]`` of ``classes``."""

    images: Sequence[Pixels] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    test_images: Sequence[Pixels] = field(repr=False)
    test_labels: NDArray[np.int64] = field(repr=False)
    classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """What a recipe returns.

    Attributes:
        save: Writes the backbone, without a head, to a folder in transformers' own format (safetensors).
        preprocessor: The content of its ``preprocessor_config.json``.
        facts: Figures for ``pretraining.json``, e.g. the accuracy on held-out images of the pretraining classes.
    """

    save: Callable[[Path], None]
    preprocessor: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A way to pretrain a small model.

    Attributes:
        config: Its table of options, ``seed`` among them.
        data: The ``[data]`` table it reads by default; empty where the caller must name one.
        train: From public images, the table and a function that is told how it goes, to the model. Equal arguments
            give equal weights on one machine.
    """

    config: type[Table]
    data: Mapping[str, Any]
    # Any: each recipe takes its own table, and a field of a function type is contravariant in it.
    train: Callable[[PublicImages, Any, Say], Pretrained]


RECIPES: Registry[Recipe] = Registry("pretraining recipe", "privfed.models.recipes")
