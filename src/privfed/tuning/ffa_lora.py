"""FFA-LoRA: LoRA with A frozen at its random start, only B trained; the default with privacy.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", ICLR, arXiv 2403.12313. With A fixed
the update is linear in what is trained: the average of the clients' B is the average of their BA, noise has no
product term, and half as many values are trained, noised and sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from privfed.tuning import TUNINGS, TunedModel, Tuning, lora
from privfed.tuning.lora_options import LoraOptions

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class FfaLoraConfig(LoraOptions):
    """Options, by peft's names; see :class:`privfed.tuning.lora_options.LoraOptions`. DoRA is not among them: it is
    not linear in B."""

    name: Literal["ffa_lora"] = "ffa_lora"


def apply(loaded: LoadedModel, config: FfaLoraConfig, seed: int) -> TunedModel:
    """Wrap the model, then freeze every A; the adapter saved is a plain LoRA adapter."""
    tuned = lora.apply(loaded, config, seed)
    for name, parameter in tuned.model.named_parameters():
        if ".lora_A." in name or ".lora_embedding_A." in name:
            parameter.requires_grad_(False)
    return tuned


TUNINGS.register("ffa_lora")(Tuning(config=FfaLoraConfig, apply=apply, linear=True))
