"""The model as the adversary rebuilds it: public base weights, the tuning's public start, the tensors it saw broadcast.

Shape suffix: D values of trained tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from privfed.errors import ConfigError, ModelError
from privfed.models.examples import device_of
from privfed.models.loading import LoadedModel, load_model
from privfed.tuning import TUNINGS
from privfed_attacks.observation import Observation, SideInformation

if TYPE_CHECKING:
    from privfed.tuning import TunedModel

WARM_START = "warm_start"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicModel:
    """A model of the adversary's own.

    Attributes:
        loaded: The base model, with its tokenizer or processor.
        tuned: The same model with the tuning on it.
    """

    loaded: LoadedModel = field(repr=False)
    tuned: TunedModel = field(repr=False)

    @property
    def module(self) -> nn.Module:
        """The model with the tuning on it."""
        return self.tuned.model

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of texts.

        Raises:
            ModelError: If the model reads images.
        """
        if self.loaded.tokenizer is None:
            raise ModelError("This model reads images and has no tokenizer: use an attack on images.")
        return self.loaded.tokenizer

    def phase_module(self, phase: str) -> nn.Module:
        """Return what trains in a phase, whose tensors an observation names: the whole model, or its head alone.

        Raises:
            ModelError: If the model has no head.
        """
        if phase != WARM_START:
            return self.module
        if self.tuned.head is None:
            raise ModelError("This model has no head, and so no phase that trains it alone.")
        head = self.module.get_submodule(self.tuned.head)
        copies = getattr(head, "modules_to_save", None)
        return head if copies is None else copies["default"]

    def at(self, observation: Observation) -> nn.Module:
        """Set the model to what was broadcast before an observation, and return what trains in its phase."""
        module = self.phase_module(observation.phase)
        write_tensors(module, observation.params)
        return module


def rebuild(side: SideInformation) -> PublicModel:
    """Return the model of a run from what is public about it.

    Raises:
        ConfigError: If the adversary does not know model or tuning.
        ModelError: If the model cannot be had.
    """
    if side.model is None or side.tuning is None:
        raise ConfigError("This adversary knows neither model nor tuning: the attack needs both (ThreatModel.knows).")
    loaded = load_model(side.model, label_names=side.label_names, seed=side.init_seed)
    tuned = TUNINGS.get(str(getattr(side.tuning, "name", None))).apply(loaded, side.tuning, side.init_seed)
    tuned.model.eval()
    return PublicModel(loaded=loaded, tuned=tuned)


def write_tensors(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Set parameters by name; vectors that a rule keeps beside the model are passed over.

    Raises:
        ModelError: If a tensor has another shape in this model.
    """
    own = dict(module.named_parameters())
    device = device_of(module)
    with torch.no_grad():
        for name, value in tensors.items():
            if name not in own:
                continue
            if tuple(own[name].shape) != tuple(value.shape):
                raise ModelError(
                    f"The tensor {name} was broadcast with shape {tuple(value.shape)} and has "
                    f"{tuple(own[name].shape)} in the rebuilt model: it is not the model of this run."
                )
            own[name].copy_(torch.tensor(value).to(device))


def gradients(
    module: nn.Module, loss: torch.Tensor, names: Sequence[str], *, graph: bool = False
) -> list[torch.Tensor]:
    """Return the gradients of a loss by some tensors, zeros where it does not depend on one.

    Args:
        module: The model.
        loss: A scalar.
        names: The tensors.
        graph: Whether the gradients are to be differentiated again.
    """
    own = dict(module.named_parameters())
    wanted = [own[name] for name in names]
    found = torch.autograd.grad(loss, wanted, create_graph=graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
