"""Linear probe: only the classification head, on frozen features.

Saved as a peft LoRA adapter without factors whose ``modules_to_save`` is the head, so plain peft loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class HeadConfig(Table):
    """No options."""

    name: Literal["head"] = "head"


def apply(loaded: LoadedModel, config: HeadConfig, seed: int) -> TunedModel:  # noqa: ARG001
    """Freeze all but the head."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from privfed.tuning.adapters import lora_wrapped

    return lora_wrapped(loaded, seed, target_modules=DUMMY_TARGET_MODULES)


TUNINGS.register("head")(Tuning(config=HeadConfig, apply=apply, linear=True))
