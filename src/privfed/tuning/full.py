"""Full fine-tuning: every parameter.

A fully tuned model is no adapter: ``adapter/`` then holds a whole model in transformers' own format, to be
loaded with ``from_pretrained`` of transformers' class for the task, such as ``AutoModelForSequenceClassification``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    from torch import nn

    from privfed.models.loading import LoadedModel


class FullConfig(Table):
    """No options."""

    name: Literal["full"] = "full"


def apply(loaded: LoadedModel, config: FullConfig, seed: int) -> TunedModel:  # noqa: ARG001
    """Train every parameter that takes part in the output."""
    from privfed.tuning.adapters import head_of, quiet

    model = loaded.model

    def save(folder: Path) -> None:
        with quiet():
            model.save_pretrained(str(folder))  # type: ignore[operator]

    return TunedModel(model=model, head=head_of(loaded), save=save)


def load(model: nn.Module, folder: Path) -> nn.Module:
    """Return ``model`` with the weights of ``folder``, as ``type(model).from_pretrained(folder)`` has them."""
    from privfed.tuning.adapters import quiet

    with quiet():
        loaded: nn.Module = type(model).from_pretrained(str(folder))  # type: ignore[attr-defined]
    return loaded


TUNINGS.register("full")(Tuning(config=FullConfig, apply=apply, linear=True, load=load))
