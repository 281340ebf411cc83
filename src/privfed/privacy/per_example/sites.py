"""Layers whose per-example gradients have a closed form: linear, convolution, table, norm, Opacus-registered.

Shape suffixes: B examples of a microbatch, S positions, L and R the two sides of a matrix, H features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from privfed.errors import ClientError
from privfed.privacy.per_example.contributions import Dense, Lookup, outer
from privfed.privacy.per_example.tap import NO_GRADIENT, Recorder

Detach = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Site(ABC):
    """Part of a model that hands over the per-example gradients of tensors of its own.

    Args:
        module: The layer.
        indices: Number of the trained tensor, by its name within ``module``.
        recorder: Where gradients go.
    """

    way: str

    def __init__(self, module: nn.Module, indices: Mapping[str, int], recorder: Recorder) -> None:
        self.module, self.indices, self.recorder = module, dict(indices), recorder

    @abstractmethod
    def attach(self) -> list[Detach]:
        """Start listening; return how to stop."""

    def add(self, name: str, gradients: torch.Tensor) -> None:
        """Hand over the gradients [B, ...] of the tensor ``name``, if it is trained."""
        if name in self.indices:
            self.recorder.add(self.indices[name], Dense(gradients))


class CallSite(Site):
    """A module whose output is tapped whenever it is called."""

    def attach(self) -> list[Detach]:
        return [self.module.register_forward_hook(self._called, with_kwargs=True).remove]

    def _called(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.listen(Call(args, kwargs, output)) if self.recorder.listening else None

    @abstractmethod
    def listen(self, call: Call) -> Any:
        """Return the module's output, tapped."""


class LeafSite(CallSite):
    """A layer with one input, in which examples are rows."""

    def listen(self, call: Call) -> Any:
        given = call.args[0] if call.args else next(iter(call.kwargs.values()))
        saved = [given] if "weight" in self.indices else []
        return self.recorder.tap_one(call.output, saved, self.deliver)

    @abstractmethod
    def deliver(self, gradient: torch.Tensor, *saved: torch.Tensor) -> None:
        """Hand over what the output's gradient [B, ...] and the saved input say."""


def _positions_sum(gradient: torch.Tensor) -> torch.Tensor:
    """Return the sum over all but the first and the last dimension, [B, H]."""
    return gradient.reshape(len(gradient), -1, gradient.shape[-1]).sum(dim=1)


class LinearSite(LeafSite):
    """nn.Linear: y = x W^T + b."""

    way = "closed form linear"

    def deliver(self, gradient: torch.Tensor, *saved: torch.Tensor) -> None:
        if saved:
            index = self.indices["weight"]
            self.recorder.add(index, outer(gradient, saved[0].float(), self.module.weight.shape))  # type: ignore[arg-type]
        if "bias" in self.indices:
            self.add("bias", _positions_sum(gradient))


class Conv1DSite(LeafSite):
    """GPT-2's Conv1D: y = x W + b."""

    way = "closed form conv1d"

    def deliver(self, gradient: torch.Tensor, *saved: torch.Tensor) -> None:
        if saved:
            index = self.indices["weight"]
            self.recorder.add(index, outer(saved[0].float(), gradient, self.module.weight.shape))  # type: ignore[arg-type]
        if "bias" in self.indices:
            self.add("bias", _positions_sum(gradient))


class Conv2dSite(LeafSite):
    """nn.Conv2d with one group and zero padding: a linear layer on patches."""

    way = "closed form conv2d"

    def deliver(self, gradient: torch.Tensor, *saved: torch.Tensor) -> None:
        layer: Any = self.module
        gradient_BSL = gradient.flatten(2).transpose(1, 2)
        if saved:
            patches_BSR = F.unfold(
                saved[0].float(), layer.kernel_size, layer.dilation, layer.padding, layer.stride
            ).transpose(1, 2)
            self.recorder.add(self.indices["weight"], outer(gradient_BSL, patches_BSR, layer.weight.shape))
        if "bias" in self.indices:
            self.add("bias", gradient_BSL.sum(dim=1))


class EmbeddingSite(LeafSite):
    """nn.Embedding; a look-up that a model makes once for the whole batch is made for each example.

    Position and token-type tables are given indices with a batch dimension of 1: their gradient would come out as
    one for all examples.
    """

    way = "closed form embedding"

    def attach(self) -> list[Detach]:
        return [self.module.register_forward_pre_hook(self._expand).remove, *super().attach()]

    def _expand(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        size = self.recorder.size
        if self.recorder.listening and args and args[0].dim() > 1 and args[0].shape[0] == 1 and size > 1:
            return (args[0].expand(size, *args[0].shape[1:]), *args[1:])
        return None

    def deliver(self, gradient: torch.Tensor, *saved: torch.Tensor) -> None:
        layer: Any = self.module
        ids_BS = saved[0].reshape(self.recorder.size, -1)
        gradient_BSH = gradient.reshape(*ids_BS.shape, -1)
        if layer.padding_idx is not None:
            gradient_BSH = gradient_BSH * (ids_BS != layer.padding_idx)[:, :, None]
        self.recorder.add(self.indices["weight"], Lookup(ids_BS, gradient_BSH, layer.weight.shape))


class LayerNormSite(LeafSite):
    """nn.LayerNorm."""

    way = "closed form norm"

    def normalised(self, given: torch.Tensor) -> torch.Tensor:
        """Return the input as it was before scale and shift."""
        layer: Any = self.module
        return F.layer_norm(given, layer.normalized_shape, eps=layer.eps)

    def deliver(self, gradient: torch.Tensor, *saved: torch.Tensor) -> None:
        layer: Any = self.module
        shape = next(getattr(layer, name).shape for name in self.indices)
        if gradient.dim() <= len(shape):
            raise ClientError(NO_GRADIENT)
        if saved:
            scaled = gradient * self.normalised(saved[0].float())
            self.add("weight", scaled.reshape(len(gradient), -1, *shape).sum(dim=1))
        self.add("bias", gradient.reshape(len(gradient), -1, *shape).sum(dim=1))


class RmsNormSite(LayerNormSite):
    """nn.RMSNorm and transformers' variants of it; y = w x / rms(x), or (1 + w) x / rms(x)."""

    def normalised(self, given: torch.Tensor) -> torch.Tensor:
        epsilon = getattr(self.module, "variance_epsilon", getattr(self.module, "eps", None))
        return F.rms_norm(given, given.shape[-1:], eps=epsilon)


class OpacusSite(LeafSite):
    """A layer for which someone registered a gradient sampler with Opacus."""

    way = "opacus sampler"

    def listen(self, call: Call) -> Any:
        given = [a for a in call.args if isinstance(a, torch.Tensor)]
        return self.recorder.tap_one(call.output, given, self.deliver)

    def deliver(self, gradient: torch.Tensor, *saved: torch.Tensor) -> None:
        layer = self.module
        own = [layer.get_parameter(name) for name in self.indices]
        for parameter in own:  # samplers leave frozen tensors out
            parameter.requires_grad_(True)
        try:
            found = _samplers()[type(layer)](layer, list(saved), gradient)
        finally:
            for parameter in own:
                parameter.requires_grad_(False)
        by_id = {id(parameter): g for parameter, g in found.items()}
        for name, parameter in zip(self.indices, own, strict=True):
            gradients = by_id.get(id(parameter))
            if gradients is None or gradients.shape != (self.recorder.size, *parameter.shape):
                raise ClientError(NO_GRADIENT)
            self.add(name, gradients)


def _samplers() -> dict[type[nn.Module], Callable[..., Any]]:
    from opacus import GradSampleModule

    found: dict[type[nn.Module], Callable[..., Any]] = GradSampleModule.GRAD_SAMPLERS
    return found


def leaf_site(module: nn.Module) -> type[Site] | None:
    """Return the closed form for the tensors that ``module`` itself owns, or None.

    Subclasses may compute something else: only exact types count.
    """
    kind: type[nn.Module] = type(module)
    if kind is nn.Linear:
        return LinearSite
    if isinstance(module, nn.Embedding) and kind is nn.Embedding:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return EmbeddingSite if plain else None
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        simple = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return Conv2dSite if simple else _registered(kind)
    if kind is nn.LayerNorm:
        return LayerNormSite
    if kind is nn.RMSNorm or _is_rms_norm(module):
        return RmsNormSite
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return Conv1DSite
    return _registered(kind)


def _registered(kind: type[nn.Module]) -> type[Site] | None:
    return OpacusSite if kind in _samplers() else None


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether one of transformers' many RMS norms computes what its name says: shown, not believed."""
    weight = module._parameters.get("weight")
    named = type(module).__name__.endswith("RMSNorm") and type(module).__module__.startswith("transformers.")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not named or weight is None or weight.dim() != 1 or epsilon is None or len(module._parameters) != 1:
        return False
    with torch.no_grad():
        shown = torch.linspace(-1, 2, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
        expected = F.rms_norm(shown, shown.shape[-1:], eps=epsilon)
        found = module(shown)
        return any(torch.allclose(found, expected * w, rtol=1e-3, atol=1e-5) for w in (weight, 1 + weight))
