"""Does an example's output depend on the other examples of its batch? A test of the model, not a list of names.

A clip bounds one example's influence only if nothing else of the batch carries it: batch statistics, routers that
look at the whole batch, a batch that is one long sequence. And a pass that draws random numbers has no gradient of
an example to speak of. Both are shown on a probe, by plain autograd, before the engine is asked anything.

Shape suffixes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from privfed.errors import ModelError
from privfed.privacy.per_example.whole import Loss

TOLERANCE = 1e-4
_REPEAT_TOLERANCE = 1e-6
_PASSES = 3  # a mask that rarely drops anything may be the same twice
# below this share of the whole gradient a tensor's own is zero up to rounding (softmax ignores a shift of the keys,
# so attention key biases have none)
VANISHING = 1e-6

BatchOf = Callable[[Sequence[int]], Any]


def check_independent(module: nn.Module, loss: Loss, batch_of: BatchOf, size: int) -> list[torch.Tensor]:
    """Show that losses and gradients of ``size`` examples are the same alone and in two different batches.

    Args:
        module: The model, in the mode it trains in.
        loss: Maps (module, batch) to per-example losses.
        batch_of: Maps example numbers to their batch.
        size: How many examples there are; 3 or more, of different lengths.

    Returns:
        Each trained tensor's gradients [size, ...], by one-at-a-time autograd.

    Raises:
        ModelError: Naming what differs.
    """
    batches = [list(range(size)), [size - 1, 0]]
    _same_twice(module, loss, batch_of(batches[0]))
    alone = torch.cat([_losses(module, loss, batch_of([row])) for row in range(size)])
    for rows in batches:
        together = _losses(module, loss, batch_of(rows))
        if together.shape != (len(rows),):
            raise ModelError(
                f"The loss of {len(rows)} examples has shape {tuple(together.shape)}, expected one value an example: "
                "without it no example can be clipped."
            )
        gap = float(((together - alone[rows]).abs() / alone[rows].abs().clamp(min=1)).max())
        if not gap <= TOLERANCE:
            raise ModelError(
                f"An example's loss differs by {gap:.1g} between a batch of {len(rows)} and the example alone: the "
                "model mixes the examples of a batch, so clipping would not bound one example's influence; choose "
                "another tuning or model, or privacy.unit other than example."
            )
    return _same_gradients(module, loss, batch_of, size, batches)


def comparable(own: float, whole: float) -> float:
    """Return what a tensor's error is set against: its own gradient's norm, or the whole's where that vanishes."""
    return own if own > VANISHING * whole else whole


def _losses(module: nn.Module, loss: Loss, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return loss(module, batch).detach()


def _same_twice(module: nn.Module, loss: Loss, batch: Any) -> None:
    first, *others = [_losses(module, loss, batch) for _ in range(_PASSES)]
    gap = max(float((first - other).abs().max()) for other in others)
    if not gap <= _REPEAT_TOLERANCE * max(1.0, float(first.abs().max())):
        raise ModelError(
            f"Two passes over the same batch differ by {gap:.1g} in an example's loss: the model draws random numbers "
            "as it runs, so an example has no one gradient to clip; set dropout to 0 or choose another tuning."
        )


def _same_gradients(
    module: nn.Module, loss: Loss, batch_of: BatchOf, size: int, batches: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]

    def gradients(rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        total = loss(module, batch_of(rows)).sum()
        return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)

    alone = [torch.stack(rows) for rows in zip(*(gradients([row]) for row in range(size)), strict=True)]
    whole = float(torch.stack([g.norm() for g in alone]).norm())
    for rows in batches:
        for (name, _), found, wanted in zip(named, gradients(rows), alone, strict=True):
            gap = float((found - wanted[rows].sum(dim=0)).norm())
            scale = comparable(float(wanted[rows].norm()), whole)
            if not gap <= TOLERANCE * scale:
                raise ModelError(
                    f"The gradient of {name} for a batch of {len(rows)} differs by {gap / max(scale, 1e-30):.1g} from "
                    "the sum of its examples' own: the model mixes the examples of a batch; choose another tuning or "
                    "model, or privacy.unit other than example."
                )
    return alone
