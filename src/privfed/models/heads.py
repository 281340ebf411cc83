"""A classifier's head is always new: what a checkpoint learned for other classes is no start for these."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from privfed.errors import ModelError


def renew_head(model: Any, *, missing: Iterable[str], mismatched: Iterable[str], name: str) -> None:
    """Initialise those layers of the head that came from the checkpoint; the caller seeds torch.

    The head is what lies outside of transformers' base model. Layers that the checkpoint lacks, or has in another
    shape, transformers has initialised already.

    Args:
        model: A transformers classifier, just loaded.
        missing: Names of parameters that the checkpoint lacks.
        mismatched: Names of parameters that it has in another shape.
        name: What messages call the model.

    Raises:
        ModelError: If a parameter of the base itself has another shape in the checkpoint.
    """
    if model.base_model is model:
        return
    base = f"{model.base_model_prefix}."
    fresh = {*missing, *mismatched}
    broken = sorted(key for key in mismatched if key.startswith(base))
    if broken:
        raise ModelError(
            f"The weights of {name!r} do not fit its config.json: {broken[0]} has another shape. "
            "Save the model again with a config that fits."
        )
    for place, module in model.named_modules():
        own = [f"{place}.{key}" for key, _ in module.named_parameters(recurse=False)]
        if own and not place.startswith(base) and not fresh.issuperset(own):
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False  # transformers' mark of what it must not touch
            model._init_weights(module)
