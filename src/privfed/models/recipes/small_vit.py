"""``small_vit``: a small ViT for 28 x 28 grey images, from any public image file: give data.path."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from privfed.models.recipes import RECIPES, Pretrained, PublicImages, Recipe, Say
from privfed.table import Table

# named, so that a recipe with other defaults keeps their bounds
Size = Annotated[int, Field(ge=4, le=1024)]
Count = Annotated[int, Field(ge=1)]
Shift = Annotated[int, Field(ge=0)]


class SmallVitConfig(Table):
    """A vision transformer and how it is trained.

    Attributes:
        seed: Of the initial weights, the batches and the augmentation.
        image_size: Rows and columns of the model's input.
        patch_size: Rows and columns of a patch; it divides ``image_size``.
        num_channels: 1 for grey, 3 for colour.
        hidden_size: Width of a token.
        layers: Transformer blocks.
        heads: Attention heads; their number divides ``hidden_size``.
        epochs: Passes over the images.
        batch_size: Images a step.
        learning_rate: The highest of a one-cycle schedule, under AdamW.
        shift: Images are moved by up to this many pixels each way.
        reconstruction: Weight of the mean squared error of a linear decoder from the class token to the pixels,
            beside the cross-entropy: without it the token forgets all but the pretraining classes.
    """

    seed: int = Field(default=0, ge=0)
    image_size: Size = 28
    patch_size: Count = 7
    num_channels: int = Field(default=1, ge=1, le=4)
    hidden_size: int = Field(default=64, ge=4)
    layers: Count = 4
    heads: Count = 4
    epochs: Count = 8
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=2e-3, gt=0.0)
    shift: Shift = 2
    reconstruction: float = Field(default=10.0, ge=0.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.patch_size or self.patch_size == self.image_size:
            raise ValueError(
                f"patch_size = {self.patch_size} with image_size = {self.image_size}: "
                "expected a smaller size that divides it"
            )
        if self.hidden_size % self.heads:
            raise ValueError(f"heads = {self.heads} with hidden_size = {self.hidden_size}: expected a divisor of it")
        if self.shift >= self.image_size:
            raise ValueError(f"shift = {self.shift} moves whole images of {self.image_size} pixels out of sight")
        return self


def train(data: PublicImages, config: SmallVitConfig, say: Say) -> Pretrained:
    """Return the trained backbone."""
    from privfed.models.pretrain import pretrain_vit  # loads torch and transformers

    return pretrain_vit(data, config, say)


RECIPES.register("small_vit")(Recipe(config=SmallVitConfig, data={}, train=train))
