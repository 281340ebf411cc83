"""FeDeRA: LoRA started from the largest singular directions of W, what is left of W frozen.

Yan et al. 2024, "FeDeRA: Efficient Fine-tuning of Language Models in Federated Learning Leveraging Weight
Decomposition", arXiv 2404.18848: W = U S V^T, B0 = U_r sqrt(S_r), A0 = sqrt(S_r) V_r^T, W - B0 A0
frozen; clients average A and B apart, which helps where their labels differ. The start is that of peft's ``pissa``.
Saved as the difference to the start, a plain LoRA of rank 2 r that fits the original base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning
from privfed.tuning.lora_options import difference_from_start

if TYPE_CHECKING:
    from privfed.models.loading import LoadedModel


class FederaConfig(Table):
    """Options, by peft's names; see :class:`privfed.tuning.lora_options.LoraOptions`.

    Attributes:
        svd_iterations: 0 for the exact decomposition; more for a randomised one with as many subspace iterations,
            faster on large layers.
    """

    name: Literal["federa"] = "federa"
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None
    svd_iterations: int = Field(default=0, ge=0)


def apply(loaded: LoadedModel, config: FederaConfig, seed: int) -> TunedModel:
    """Wrap the model; W, A and B together are the base model until they are trained."""
    from privfed.tuning.adapters import lora_wrapped

    remember, convert = difference_from_start()
    start = f"pissa_niter_{config.svd_iterations}" if config.svd_iterations else "pissa"
    options = config.model_dump(exclude={"name", "svd_iterations"})
    return lora_wrapped(
        loaded, seed, name="federa", prepare=remember, convert=convert, init_lora_weights=start, **options
    )


TUNINGS.register("federa")(Tuning(config=FederaConfig, apply=apply, linear=False))
