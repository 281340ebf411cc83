"""LoRA with one option set: dora, rslora and pissa, also to be had as options of ``lora``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from privfed.tuning import TUNINGS, TunedModel, Tuning, lora
from privfed.tuning.lora_options import LoraOptions

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class DoraConfig(LoraOptions):
    """Options, by peft's names; see :class:`privfed.tuning.lora_options.LoraOptions`."""

    name: Literal["dora"] = "dora"
    use_dora: Literal[True] = True
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True


class RsloraConfig(LoraOptions):
    """Options, by peft's names; see :class:`privfed.tuning.lora_options.LoraOptions`."""

    name: Literal["rslora"] = "rslora"
    use_rslora: Literal[True] = True


class PissaConfig(LoraOptions):
    """Options, by peft's names; see :class:`privfed.tuning.lora_options.LoraOptions`."""

    name: Literal["pissa"] = "pissa"
    init_lora_weights: str = Field(default="pissa", pattern=r"^pissa(_niter_\d+)?$")


def apply(loaded: LoadedModel, config: LoraOptions, seed: int) -> TunedModel:
    """Wrap the model as ``lora`` does with these options."""
    return lora.apply(loaded, config, seed)


DORA = "LoRA whose column norms are trained apart from the direction (Liu et al. 2024, arXiv 2402.09353)."
RSLORA = "LoRA scaled by alpha / sqrt(r), stable at high ranks (Kalajdzievski 2023, arXiv 2312.03732)."
PISSA = "LoRA started from the largest singular directions of W (Meng et al. 2024, arXiv 2404.02948)."

TUNINGS.register("dora")(Tuning(config=DoraConfig, apply=apply, linear=False, summary=DORA))
TUNINGS.register("rslora")(Tuning(config=RsloraConfig, apply=apply, linear=False, summary=RSLORA))
TUNINGS.register("pissa")(Tuning(config=PissaConfig, apply=apply, linear=False, summary=PISSA))
