"""LoRA: W + (alpha / r) B A with both factors trained.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Averaging A and B apart
is not averaging BA (FedIT, arXiv 2305.05644), and noise on both factors has a product term: with privacy
``ffa_lora`` is the better default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class LoraConfig(Table):
    """Options, by peft's names.

    Attributes:
        r: Rank.
        lora_alpha: Scale; the update is multiplied by lora_alpha / r.
        target_modules: Names of the layers to adapt; None for peft's default of the model (query and value).
        layers_to_transform: Numbers of the blocks to adapt; None for all. Adapting the last few only needs less
            noise (fewer values are trained) and less time (nothing below is back-propagated).
    """

    name: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    target_modules: list[str] | None = None
    layers_to_transform: list[int] | None = None


def apply(loaded: LoadedModel, config: LoraConfig, seed: int) -> TunedModel:
    """Wrap the model with trained A and B."""
    from privfed.tuning.adapters import lora_wrapped

    return lora_wrapped(loaded, seed, **config.model_dump(exclude={"name"}))


TUNINGS.register("lora")(Tuning(config=LoraConfig, apply=apply, linear=False))
