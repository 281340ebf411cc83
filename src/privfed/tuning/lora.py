"""LoRA: W + (alpha / r) B A with both factors trained.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Averaging A and B apart
is not averaging BA (FedIT, arXiv 2305.05644), and noise on both factors has a product term: with privacy
``ffa_lora`` is the better default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from privfed.tuning import TUNINGS, TunedModel, Tuning
from privfed.tuning.lora_options import LoraOptions, difference_from_start

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class LoraConfig(LoraOptions):
    """Options, by peft's names; see :class:`privfed.tuning.lora_options.LoraOptions`.

    Attributes:
        use_dora: Train the norm of each column apart from its direction (DoRA).
    """

    name: Literal["lora"] = "lora"
    use_dora: bool = False


def apply(loaded: LoadedModel, config: LoraOptions, seed: int) -> TunedModel:
    """Wrap the model with trained A and B."""
    from privfed.tuning.adapters import lora_wrapped

    name = str(getattr(config, "name", "lora"))
    if not config.mutating:
        return lora_wrapped(loaded, seed, name=name, **config.options())
    remember, convert = difference_from_start()
    return lora_wrapped(loaded, seed, name=name, prepare=remember, convert=convert, **config.options())


TUNINGS.register("lora")(Tuning(config=LoraConfig, apply=apply, linear=False))
