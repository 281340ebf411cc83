"""What the peft-backed tuning files share: wrap a model, find its head, save it for plain peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfed.errors import ModelError
from privfed.tuning import TunedModel

if TYPE_CHECKING:
    from torch import nn

    from privfed.models.loading import LoadedModel

# the names that transformers gives the last layer of its sequence classifiers
HEAD_NAMES = ("classifier", "score")


def head_name(model: nn.Module) -> str:
    """Return the attribute of a transformers sequence classifier that holds its head.

    Raises:
        ModelError: If it has none of the usual names.
    """
    for name in HEAD_NAMES:
        if hasattr(model, name):
            return name
    raise ModelError(f"{type(model).__name__} has none of the heads {HEAD_NAMES}: choose another model.")


def lora_wrapped(loaded: LoadedModel, seed: int, **options: Any) -> TunedModel:
    """Wrap ``loaded`` in a peft LoRA model whose head is trained and saved along.

    Args:
        loaded: The base model; it is changed in place, as peft does.
        seed: Seed of the fresh factors.
        **options: Passed to ``peft.LoraConfig``.

    Raises:
        ModelError: If a target matches no module of the model, or peft refuses for another reason.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    head = None if loaded.task == "causal_lm" else head_name(loaded.model)
    kind = {"task_type": "CAUSAL_LM"} if head is None else {"task_type": "SEQ_CLS", "modules_to_save": [head]}
    config = LoraConfig(**kind, lora_dropout=0.0, **options)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft 0.21 asks transformers 5 by a name that it is about to drop
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            # GPT-2's Conv1D: peft sets the option right itself, and says so
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
            torch.manual_seed(seed)
            model = get_peft_model(loaded.model, config)
    except ValueError as error:
        first = str(error).split(". ")[0]
        targets = options.get("target_modules") or "peft's defaults"
        raise ModelError(
            f"tuning.target_modules = {targets} does not fit {type(loaded.model).__name__} ({first}): "
            "set tuning.target_modules to names of its layers."
        ) from error

    def save(folder: Path) -> None:
        for adapter in model.peft_config.values():
            adapter.base_model_name_or_path = loaded.source.public_name  # not a path of this machine
            if isinstance(adapter.target_modules, set):  # whose order differs from process to process
                adapter.target_modules = sorted(adapter.target_modules)
        with warnings.catch_warnings():
            # peft asks the hub whether the base's vocabulary grew; ours never does
            warnings.simplefilter("ignore")
            model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty model card with this machine's path in it

    return TunedModel(model=model, head=None if head is None else f"base_model.model.{head}", save=save)
