"""Full fine-tuning: every parameter.

A fully tuned model is no adapter: ``adapter/`` then holds a whole model in transformers' own format, to be
loaded with ``AutoModelForSequenceClassification.from_pretrained``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class FullConfig(Table):
    """No options."""

    name: Literal["full"] = "full"


def apply(loaded: LoadedModel, config: FullConfig, seed: int) -> TunedModel:  # noqa: ARG001
    """Train every parameter that takes part in the output."""
    from privfed.tuning.adapters import head_name

    model = loaded.model

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder))  # type: ignore[operator]

    return TunedModel(model=model, head=head_name(model), save=save)


TUNINGS.register("full")(Tuning(config=FullConfig, apply=apply, linear=True))
