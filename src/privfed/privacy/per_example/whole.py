"""The whole model, one example at a time: under ``vmap(grad)``, or in a loop.

The last resort, slower and with every gradient in memory, for tensors that belong to no call of their own.

Shape suffix: B examples of a microbatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from privfed.privacy.per_example.units import following

Loss = Callable[[nn.Module, Any], torch.Tensor]
_CHUNK = 8


def map_batch(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of ``batch`` with every tensor changed; dicts, lists, tuples and dataclasses are followed."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_batch(getattr(batch, f.name), change) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, Mapping):
        return {key: map_batch(value, change) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)([map_batch(value, change) for value in batch])
    return batch


class _Losses(nn.Module):
    """A loss of a module as a module, so that the module's parameters can be replaced."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self._loss = loss

    def forward(self, batch: Any) -> torch.Tensor:
        return self._loss(self.module, batch).sum()


def vmap_gradients(
    module: nn.Module, parameters: Mapping[str, torch.Tensor], loss: Loss, batch: Any, size: int
) -> list[torch.Tensor]:
    """Return the per-example gradients [B, ...] of ``parameters``, by name, under vmap(grad)."""
    whole = _Losses(module, loss)
    tensors: list[torch.Tensor] = []
    map_batch(batch, lambda t: tensors.append(t) or t)  # type: ignore[func-returns-value]
    dims = tuple(0 if t.dim() and t.shape[0] == size else None for t in tensors)

    def one(own: Mapping[str, torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = iter([t if dim is None else t.unsqueeze(0) for t, dim in zip(given, dims, strict=True)])
        result: torch.Tensor = functional_call(whole, dict(own), (map_batch(batch, lambda _: next(rows)),))
        return result

    own = {f"module.{name}": p.detach() for name, p in parameters.items()}
    with following():
        found: dict[str, torch.Tensor] = vmap(grad(one), in_dims=(None, dims), chunk_size=_CHUNK)(own, tuple(tensors))
    return list(found.values())


def loop_gradients(
    module: nn.Module, parameters: Sequence[nn.Parameter], loss: Loss, batch: Any, size: int
) -> list[torch.Tensor]:
    """Return the per-example gradients [B, ...], by one backward pass an example."""
    rows: list[tuple[torch.Tensor, ...]] = []
    for i in range(size):
        single = map_batch(batch, lambda t, i=i: t[i : i + 1] if t.dim() and t.shape[0] == size else t)  # type: ignore[misc]
        total = loss(module, single).sum()
        rows.append(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))
    return [torch.stack(column) for column in zip(*rows, strict=True)]
