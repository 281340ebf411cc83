"""``digits_vit``: an 8 x 8 ViT from half of the built-in digits (0 to 4); fine-tune it on the other half."""

from __future__ import annotations

from privfed.models.recipes import RECIPES, Pretrained, PublicImages, Recipe, Say
from privfed.models.recipes.small_vit import Count, Shift, Size, SmallVitConfig


class DigitsVitConfig(SmallVitConfig):
    """A small ViT for 8 x 8 images: 17 tokens. The options are :class:`SmallVitConfig`'s."""

    image_size: Size = 8
    patch_size: Count = 2
    shift: Shift = 1
    epochs: Count = 60


def train(data: PublicImages, config: DigitsVitConfig, say: Say) -> Pretrained:
    """Return the trained backbone."""
    from privfed.models.pretrain import pretrain_vit  # loads torch and transformers

    return pretrain_vit(data, config, say)


RECIPES.register("digits_vit")(
    Recipe(config=DigitsVitConfig, data={"name": "digits", "classes": [0, 1, 2, 3, 4]}, train=train)
)
