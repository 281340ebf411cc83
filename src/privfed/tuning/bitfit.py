"""BitFit: every bias, and the head where the task has one.

Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning", arXiv 2106.10199. Saved as a peft LoRA
adapter without factors (``bias="all"``), so plain peft loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from privfed.errors import ModelError
from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class BitfitConfig(Table):
    """No options."""

    name: Literal["bitfit"] = "bitfit"


def apply(loaded: LoadedModel, config: BitfitConfig, seed: int) -> TunedModel:  # noqa: ARG001
    """Train every bias of the base model, and the head where the task has one.

    Raises:
        ModelError: If the model has no biases (many decoders).
    """
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from privfed.tuning.adapters import head_of, lora_wrapped

    head = head_of(loaded)
    names = [n for n, _ in loaded.model.named_parameters() if n.endswith("bias")]
    if not any(head is None or not n.startswith(f"{head}.") for n in names):
        raise ModelError("The tuning 'bitfit' trains biases and this model has none: use tuning.name = \"ffa_lora\".")
    return lora_wrapped(loaded, seed, name="bitfit", target_modules=DUMMY_TARGET_MODULES, bias="all")


TUNINGS.register("bitfit")(Tuning(config=BitfitConfig, apply=apply, linear=True))
