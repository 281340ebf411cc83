"""Taps: where the engine listens to a backward pass.

While the engine runs, trained tensors take no part in autograd at all, so no weight gradient is ever computed by
it. A tap on a layer's output is an identity that gives the output's gradient to the engine on the way back.

Shape suffixes: B examples of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from privfed.errors import ClientError
from privfed.privacy.per_example.contributions import Contribution, gather

Deliver = Callable[[Sequence[torch.Tensor | None], Sequence[torch.Tensor]], None]

NO_GRADIENT = "A trained tensor has no gradient for each example: this model cannot be trained privately."


class _Tap(torch.autograd.Function):
    """Identity on ``count`` outputs; hands their gradients and the saved tensors to ``deliver``."""

    @staticmethod
    def forward(ctx: Any, deliver: Deliver, _anchor: torch.Tensor, count: int, *tensors: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.deliver, ctx.count, ctx.total = deliver, count, len(tensors)
        ctx.save_for_backward(*tensors[count:])
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if any(g is not None for g in gradients):
            ctx.deliver(gradients, ctx.saved_tensors)
        return (None, None, None, *gradients, *[None] * (ctx.total - ctx.count))


class Recorder:
    """What one pass delivered, by trained tensor.

    Args:
        count: Number of trained tensors.
    """

    def __init__(self, count: int) -> None:
        self.active = False
        self.size = 0
        # makes a layer's output part of the backward pass where nothing below it is
        self._anchor = torch.zeros((), requires_grad=True)
        self._count = count
        self._found: list[list[Contribution]] = []
        self._later: list[Callable[[], None]] = []
        self.forget()

    def forget(self) -> None:
        """Drop what is there; also what a pass left that an exception, such as a deadline, cut short."""
        self.active = False
        self._found = [[] for _ in range(self._count)]
        self._later = []

    @property
    def listening(self) -> bool:
        """Whether a layer that is called now should be tapped."""
        return self.active and torch.is_grad_enabled()

    @contextmanager
    def recording(self, size: int) -> Iterator[None]:
        """Listen to the body's forward and backward passes over ``size`` examples."""
        self.size = size
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def tap(
        self, outputs: Sequence[torch.Tensor], saved: Sequence[torch.Tensor], deliver: Deliver
    ) -> tuple[torch.Tensor, ...]:
        """Return ``outputs``, tapped; ``deliver`` gets their gradients (None where unused) and ``saved``."""
        tapped: tuple[torch.Tensor, ...] = _Tap.apply(deliver, self._anchor, len(outputs), *outputs, *saved)  # type: ignore[no-untyped-call]
        return tapped

    def tap_one(
        self, output: torch.Tensor, saved: Sequence[torch.Tensor], deliver: Callable[..., None]
    ) -> torch.Tensor:
        """Return ``output``, tapped; ``deliver(gradient, *saved)`` is called with full precision on."""

        def forward(gradients: Sequence[torch.Tensor | None], kept: Sequence[torch.Tensor]) -> None:
            gradient = gradients[0]
            if gradient is None:
                return
            if gradient.dim() == 0 or gradient.shape[0] != self.size:
                raise ClientError(NO_GRADIENT)
            with exact_products(gradient.device.type):
                deliver(gradient.detach().float(), *[t.detach() for t in kept])

        return self.tap([output], saved, forward)[0]

    def later(self, work: Callable[[], None]) -> None:
        """Do ``work`` once the backward pass is through."""
        self._later.append(work)

    def add(self, index: int, contribution: Contribution) -> None:
        """Note a part of the gradient of the trained tensor number ``index``."""
        self._found[index].append(contribution)

    def finish(self) -> list[Contribution | None]:
        """Return each tensor's gradient, None where there was none; nothing is kept."""
        for work in self._later:
            work()
        found = [gather(parts) if parts else None for parts in self._found]
        self.forget()
        return found


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Compute the body's float32 products in float32: no autocast, no TF32 or bfloat16 inside them.

    A sum whose terms are rounded to 8 or 11 bits would move by more than the clip when an example is removed.
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest" and not torch.is_autocast_enabled(device_type):
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
