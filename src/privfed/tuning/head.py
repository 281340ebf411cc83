"""Linear probe: only the classification head, on frozen features.

Saved as a peft LoRA adapter without factors whose ``modules_to_save`` is the head, so plain peft loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from privfed.errors import ModelError
from privfed.table import Table
from privfed.tuning import TUNINGS, WITH_HEAD, TunedModel, Tuning

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class HeadConfig(Table):
    """No options."""

    name: Literal["head"] = "head"


def apply(loaded: LoadedModel, config: HeadConfig, seed: int) -> TunedModel:  # noqa: ARG001
    """Freeze all but the head.

    Raises:
        ModelError: If the task has none.
    """
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from privfed.tuning.adapters import head_of, lora_wrapped

    if head_of(loaded) is None:
        raise ModelError("The tuning 'head' trains a classifier's head and this task has none: use \"ffa_lora\".")
    return lora_wrapped(loaded, seed, name="head", target_modules=DUMMY_TARGET_MODULES)


TUNINGS.register("head")(Tuning(config=HeadConfig, apply=apply, linear=True, tasks=WITH_HEAD))
