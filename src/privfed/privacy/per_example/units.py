"""Any module as a unit: its second forward pass under ``vmap(grad)``, or example by example.

For a module whose parameters are not those of a known layer (most of peft's tuner layers), the gradient of its
own parameters for example i is that of sum(output_i * output_gradient_i), with inputs and output gradient from
the model's one backward pass.

Shape suffix: B examples of a microbatch.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from privfed.errors import ClientError, ModelError
from privfed.privacy.per_example.sites import Call, CallSite
from privfed.privacy.per_example.tap import NO_GRADIENT, Recorder, exact_products

# what vmap raises at operations that it cannot follow: data-dependent control flow, in-place writes, shapes
FOLLOW_ERRORS = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """One call of a unit: its inputs as a tree without tensors, the tensors, and the gradients of its outputs."""

    spec: pytree.TreeSpec
    leaves: list[Any]
    tensors: Sequence[torch.Tensor]
    places: list[int]
    outputs: list[int]
    gradients: list[torch.Tensor | None]
    autocast: tuple[bool, torch.dtype]


class UnitSite(CallSite):
    """A module as a unit."""

    way = "unit-vmap"

    def __init__(self, module: nn.Module, indices: Mapping[str, int], recorder: Recorder) -> None:
        super().__init__(module, indices, recorder)
        for name, part in module.named_modules():
            if isinstance(part, _DropoutNd) and part.p > 0:
                raise ModelError(
                    f"{type(module).__name__} has dropout ({name}, p = {part.p:g}) beside trained tensors whose "
                    "per-example gradients need a second pass, which would draw other values: set it to 0."
                )

    def listen(self, call: Call) -> Any:
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        results, output_spec = pytree.tree_flatten(call.output)
        chosen = [i for i, r in enumerate(results) if isinstance(r, torch.Tensor) and r.is_floating_point()]
        kept = [None if i in set(places) else leaf for i, leaf in enumerate(leaves)]
        device = results[chosen[0]].device.type if chosen else "cpu"
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

        def deliver(gradients: Sequence[torch.Tensor | None], saved: Sequence[torch.Tensor]) -> None:
            recorded = _Recorded(
                spec=spec,
                leaves=kept,
                tensors=[t.detach() for t in saved],
                places=places,
                outputs=chosen,
                gradients=list(gradients),
                autocast=autocast,
            )
            self.recorder.later(lambda: self._compute(recorded))

        tapped = self.recorder.tap([results[i] for i in chosen], [leaves[i] for i in places], deliver)
        for i, result in zip(chosen, tapped, strict=True):
            results[i] = result
        return pytree.tree_unflatten(results, output_spec)

    def _compute(self, call: _Recorded) -> None:
        present = [g for g in call.gradients if g is not None]
        if any(g.dim() == 0 or g.shape[0] != self.recorder.size for g in present):
            raise ClientError(NO_GRADIENT)
        parameters = {name: self.module.get_parameter(name).detach() for name in self.indices}
        found = self._all_at_once(call, parameters, present) if self.way == "unit-vmap" else None
        if found is None:
            found = self._one_by_one(call, parameters, present)
        for name, gradients in found.items():
            self.add(name, gradients)

    def _objective(
        self, call: _Recorded, parameters: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor], given: Any
    ) -> torch.Tensor:
        """Return sum(output * output gradient) of one example; its tensors have a batch dimension of 1."""
        leaves = list(call.leaves)
        for place, tensor in zip(call.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        device = tensors[0].device.type if tensors else "cpu"
        enabled, dtype = call.autocast
        with torch.autocast(device, enabled=enabled, dtype=dtype) if enabled else contextlib.nullcontext():
            output = functional_call(self.module, dict(parameters), args, kwargs)
        results = pytree.tree_leaves(output)
        present = [results[i] for i, g in zip(call.outputs, call.gradients, strict=True) if g is not None]
        total: torch.Tensor = sum((r.float() * g.float()).sum() for r, g in zip(present, given, strict=True))
        return total

    def _all_at_once(
        self, call: _Recorded, parameters: dict[str, torch.Tensor], present: list[torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        size = self.recorder.size
        dims = tuple(0 if t.dim() and t.shape[0] == size else None for t in call.tensors)

        def one(own: dict[str, torch.Tensor], tensors: Sequence[torch.Tensor], given: Any) -> torch.Tensor:
            single = [t if dim is None else t.unsqueeze(0) for t, dim in zip(tensors, dims, strict=True)]
            return self._objective(call, own, single, [g.unsqueeze(0) for g in given])

        try:
            with following(), exact_products(present[0].device.type):
                found: dict[str, torch.Tensor] = vmap(grad(one), in_dims=(None, dims, 0))(
                    parameters, tuple(call.tensors), tuple(present)
                )
        except FOLLOW_ERRORS:
            self.way = "unit-loop"
            return None
        return found

    def _one_by_one(
        self, call: _Recorded, parameters: dict[str, torch.Tensor], present: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        size = self.recorder.size
        own = {name: p.clone().requires_grad_(True) for name, p in parameters.items()}
        rows: list[tuple[torch.Tensor, ...]] = []
        for i in range(size):
            single = [t[i : i + 1] if t.dim() and t.shape[0] == size else t for t in call.tensors]
            with torch.enable_grad(), exact_products(present[0].device.type):
                total = self._objective(call, own, single, [g[i : i + 1] for g in present])
                rows.append(torch.autograd.grad(total, list(own.values()), allow_unused=True, materialize_grads=True))
        return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(own)}


@contextlib.contextmanager
def following() -> Iterator[None]:
    """Let vmap follow transformers' models.

    Masks are not looked into (is anything padded?), which vmap cannot follow; and operations for which it has no
    fast rule may be slow without a warning.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    before = getattr(masks, "is_tracing", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        if before is not None:
            masks.is_tracing = lambda *_args: True
        try:
            yield
        finally:
            if before is not None:
                masks.is_tracing = before
