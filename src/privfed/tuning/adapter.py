"""Bottleneck adapters: h + W_up gelu(W_down h) after the attention's and the feed-forward part's last layer.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, figure 2 (normalisation
layers stay frozen here; ``ln_tuning`` trains them). W_up starts at 0, so the model starts as the base. peft has no
such adapter, so the folder holds ``adapter_model.safetensors`` and ``adapter_config.json`` of our own;
:func:`load` puts them on a base model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from privfed.errors import ModelError
from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    import torch
    from torch import nn

    from privfed.models.loading import LoadedModel

# ends of the names of the layers that write to the residual stream, by the conventions of transformers
ATTENTION = ("attention.output.dense", "o_proj", "out_proj", "c_proj", "out_lin", "attention.dense", "wo", "proj")
FEED_FORWARD = ("output.dense", "down_proj", "fc2", "c_proj", "lin2", "dense_4h_to_h", "fc_out", "w2", "wo")
FORMAT = "privfed_bottleneck_adapter"


class AdapterConfig(Table):
    """Options.

    Attributes:
        bottleneck: Width of W_down's output.
        target_modules: Names of the layers after which an adapter is put; None for the last layer of each block's
            attention and feed-forward part.
    """

    name: Literal["adapter"] = "adapter"
    bottleneck: int = Field(default=32, ge=1)
    target_modules: list[str] | None = None


def apply(loaded: LoadedModel, config: AdapterConfig, seed: int) -> TunedModel:
    """Freeze the model, put adapters in and train them and the head.

    Raises:
        ModelError: If no layer of the model is known to end an attention or feed-forward part.
    """
    import torch

    from privfed.tuning.adapters import CONFIG, WEIGHTS, head_of

    model, head = loaded.model, head_of(loaded)
    targets = _targets(model, config.target_modules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head is not None and name.startswith(f"{head}."))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _insert(model, targets, config.bottleneck)

    def save(folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / WEIGHTS, metadata={"format": "pt"})
        fields = {
            "format": FORMAT,
            "base_model_name_or_path": loaded.source.public_name,
            "bottleneck": config.bottleneck,
            "target_modules": targets,
        }
        (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")

    return TunedModel(model=model, head=head, save=save)


def load(model: nn.Module, folder: Path) -> nn.Module:
    """Return the base ``model`` with the adapters of ``folder`` in it; it is changed in place.

    Args:
        model: The transformers model that was tuned, with a head of the same width.
        folder: What a run with ``tuning.name = "adapter"`` saved.

    Raises:
        ModelError: If the folder holds another kind of adapter, or one for another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from privfed.tuning.adapters import CONFIG, WEIGHTS

    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"There is no adapter in {folder} ({error}): pass the folder that a run saved.") from error
    if fields.get("format") != FORMAT:
        raise ModelError(f"The adapter in {folder} is one of peft's: load it with peft.PeftModel.from_pretrained.")
    names = dict(model.named_modules())
    missing = [name for name in fields["target_modules"] if name not in names]
    if missing:
        raise ModelError(f"The adapter in {folder} needs a layer {missing[0]}, which {type(model).__name__} has not.")
    _insert(model, fields["target_modules"], fields["bottleneck"])
    found = dict(model.named_parameters())
    wrong = [n for n, value in weights.items() if n not in found or found[n].shape != value.shape]
    if wrong:
        raise ModelError(f"The adapter in {folder} does not fit {type(model).__name__}: {wrong[0]} differs in shape.")
    model.load_state_dict(weights, strict=False)
    return model


def _targets(model: nn.Module, given: list[str] | None) -> list[str]:
    """Return the whole names of the layers after which an adapter is put."""
    from privfed.tuning.targets import blocks, is_linear, matched

    if given is not None:
        chosen = set(map(id, matched(model, given)))
        found = [name for name, module in model.named_modules() if id(module) in chosen]
        wrong = [name for name in found if not is_linear(model.get_submodule(name))]
        if wrong:
            raise ModelError(
                f"tuning.target_modules takes {wrong[0]}, which is no linear layer: name the layers themselves."
            )
        return found
    out: list[str] = []
    for name, block in blocks(model):
        layers = [f"{name}.{n}" for n, module in block.named_modules() if n and is_linear(module)]
        attention = [n for n in layers if "att" in n.removeprefix(name) and _ends(n, ATTENTION)]
        forward = [n for n in layers if "att" not in n.removeprefix(name) and _ends(n, FEED_FORWARD)]
        out.extend([*attention[-1:], *forward[-1:]])
    if not out:
        raise ModelError(
            f"Where the attention and feed-forward parts of {type(model).__name__} end is not known: set "
            "tuning.target_modules to the names of their last layers."
        )
    return out


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _insert(model: nn.Module, targets: list[str], bottleneck: int) -> None:
    from torch import nn

    class Adapted(nn.Module):
        """A frozen layer followed by a bottleneck and the sum of both."""

        def __init__(self, base: nn.Module, width: int) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Linear(width, bottleneck)
            self.up = nn.Linear(bottleneck, width)
            nn.init.normal_(self.down.weight, std=1e-2)
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.base(x)
            return h + self.up(nn.functional.gelu(self.down(h)))  # type: ignore[no-any-return]

    for name in targets:
        parent, _, child = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        width = int(getattr(layer, "out_features", 0) or layer.nf)
        setattr(model.get_submodule(parent), child, Adapted(layer, width).to(layer.weight.device))


TUNINGS.register("adapter")(Tuning(config=AdapterConfig, apply=apply, linear=False, load=load))
