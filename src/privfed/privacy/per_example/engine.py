"""Per-example gradients of a module's trained tensors, and their clipped sum, by one backward pass.

Shape suffixes: B examples of a microbatch, D trained values.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from privfed.errors import ClientError, ModelError
from privfed.privacy.per_example import planning
from privfed.privacy.per_example.clipping import Clipped, clip
from privfed.privacy.per_example.contributions import Contribution, Dense
from privfed.privacy.per_example.coupling import comparable
from privfed.privacy.per_example.sites import Detach, Site
from privfed.privacy.per_example.tap import NO_GRADIENT, Recorder, exact_products
from privfed.privacy.per_example.units import FOLLOW_ERRORS
from privfed.privacy.per_example.whole import Loss, loop_gradients, vmap_gradients

Rows = NDArray[np.int64]

# what ``prove`` found out about a module: the level of each of its trained tensors, by name
_PROVED: weakref.WeakKeyDictionary[nn.Module, dict[str, int]] = weakref.WeakKeyDictionary()


class PerExampleModel:
    """A module whose trained tensors' gradients can be had example by example.

    Every trained tensor gets a way of its own (see ``plan``): a closed form from a layer's input and its output's
    gradient, the gradient of a small part of the model (a tuner layer) under vmap, a prompt's gradient pulled back
    through its encoder, and for the rest the whole model under vmap or in a loop. ``prove`` compares with
    one-at-a-time autograd and moves a tensor that differs to the next way; later instances for the same module
    start from what was proved.

    Args:
        module: The model.

    Raises:
        ModelError: If the module has a layer that mixes the examples of a batch by design.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = tuple(name for name, _ in named)
        self.parameters: list[nn.Parameter] = [p for _, p in named]
        for name, part in module.named_modules():
            if isinstance(part, _BatchNorm):
                raise ModelError(
                    f"Per-example gradients are not available for this model and tuning: {name or 'it'} is a batch "
                    "normalisation, which mixes the examples of a batch; use a model with layer or group norms."
                )
        # of fewer trained tensors than were proved (a rule lets some rest), each keeps its way
        proved = _PROVED.get(module, {})
        known = proved.keys() >= set(self.names)
        self._levels = [proved[name] if known else planning.NEAREST for name in self.names]
        self._recorder = Recorder(len(self.names))
        self._sites: list[Site] | None = None
        self._detach: list[Detach] = []

    def close(self) -> None:
        """Take everything off the module; it is then as it came."""
        for detach in self._detach:
            detach()
        self._detach = []
        self._sites = None
        self._thaw()

    def gradients(self, loss: Loss, batch: Any, size: int) -> list[torch.Tensor]:
        """Return each trained tensor's per-example gradient [B, ...].

        Args:
            loss: Maps (module, batch) to the B per-example losses.
            batch: The microbatch.
            size: B.

        Raises:
            ClientError: If a tensor got no gradient, or one of a wrong batch size.
        """
        found = self._pass(loss, batch, size)
        with exact_products(self._device):
            return [part.rows(0, size) for part in found]

    def clipped_sum(
        self, loss: Loss, batch: Any, size: int, l2_clip_norm: float, into_D: torch.Tensor | None = None
    ) -> Clipped:
        """Return the sum of the examples' gradients, each clipped to ``l2_clip_norm`` over all tensors jointly.

        One backward pass, in which no weight gradient is computed, then a weighted sum. Adding or removing one
        example moves the sum by at most ``l2_clip_norm``.

        Args:
            loss: Maps (module, batch) to the B per-example losses.
            batch: The microbatch.
            size: B.
            l2_clip_norm: The bound, > 0.
            into_D: Add to this float64 vector, rather than to a new one.

        Raises:
            ClientError: If a tensor got no gradient for each example, or one that is not finite.
        """
        found = self._pass(loss, batch, size)
        with torch.no_grad(), exact_products(self._device):
            return clip(found, [p.shape for p in self.parameters], l2_clip_norm, into_D)

    def plan(self) -> dict[str, str]:
        """Return the way of each trained tensor's gradient, by name; empty before the first pass."""
        if self._whole is not None:
            return dict.fromkeys(self.names, self._whole)
        ways: dict[str, set[str]] = {}
        for site in self._sites or ():
            for index in site.indices.values():
                ways.setdefault(self.names[index], set()).add(site.way)
        return {name: " + ".join(sorted(ways[name])) for name in self.names if name in ways}

    def describe(self) -> str:
        """Return the plan in a line, such as ``48 closed form linear, 12 unit-vmap``."""
        counts = Counter(self.plan().values())
        return ", ".join(f"{count} {way}" for way, count in counts.most_common())

    def prove(
        self, loss: Loss, batch: Any, size: int, reference: Sequence[torch.Tensor], tolerance: float = 1e-4
    ) -> None:
        """Choose, for each tensor, the first way whose gradients equal ``reference`` on a probe batch.

        Args:
            loss: Maps (module, batch) to the B per-example losses.
            batch: The probe.
            size: B.
            reference: Each tensor's gradients [B, ...], by autograd on each example alone.
            tolerance: The largest relative error.
        """
        total = float(torch.stack([g.norm() for g in reference]).norm())
        self.close()
        self._levels = [planning.NEAREST] * len(self.names)
        while True:
            failing = self._failing(loss, batch, size, reference, tolerance, total)
            if not failing or min(self._levels) == planning.WHOLE_LOOP:
                break
            self._escalate(failing)
        _PROVED[self.module] = dict(zip(self.names, self._levels, strict=True))

    def _failing(
        self, loss: Loss, batch: Any, size: int, reference: Sequence[torch.Tensor], tolerance: float, total: float
    ) -> list[int]:
        try:
            found = self.gradients(loss, batch, size)
        except (ClientError, ModelError, *FOLLOW_ERRORS):
            return list(range(len(self.names)))
        return [
            index
            for index, (got, wanted) in enumerate(zip(found, reference, strict=True))
            if not float((got - wanted).norm()) <= tolerance * comparable(float(wanted.norm()), total)
        ]

    def _escalate(self, failing: Sequence[int]) -> None:
        self.close()
        level = max(self._levels[index] for index in failing) + 1
        if level <= planning.TUNER_LAYER:
            for index in failing:
                self._levels[index] = level
        else:
            self._levels = [level] * len(self.names)

    @property
    def _whole(self) -> str | None:
        top = max(self._levels, default=planning.NEAREST)
        return {planning.WHOLE_VMAP: "whole-model vmap", planning.WHOLE_LOOP: "loop"}.get(top)

    @property
    def _device(self) -> str:
        return self.parameters[0].device.type if self.parameters else "cpu"

    def _pass(self, loss: Loss, batch: Any, size: int) -> list[Contribution]:
        self._forget()
        if getattr(batch, "direct", False):  # these losses read parameters themselves, past every layer's hooks
            return [Dense(g) for g in loop_gradients(self.module, self.parameters, loss, batch, size)]
        if self._whole is not None:
            return [Dense(g) for g in self._one_at_a_time(loss, batch, size)]
        if self._sites is None:
            self._listen(loss, batch)
        with self._frozen():
            with self._recorder.recording(size):
                losses_B = loss(self.module, batch)
                if losses_B.shape != (size,) or not losses_B.requires_grad:
                    raise ClientError(NO_GRADIENT)
                losses_B.sum().backward()  # type: ignore[no-untyped-call]
            with torch.no_grad(), exact_products(self._device):
                found = self._recorder.finish()
        parts = [part for part in found if part is not None and part.size == size]
        if len(parts) < len(found):
            raise ClientError(NO_GRADIENT)
        return parts

    def _one_at_a_time(self, loss: Loss, batch: Any, size: int) -> list[torch.Tensor]:
        if self._whole == "loop":
            return loop_gradients(self.module, self.parameters, loss, batch, size)
        return vmap_gradients(self.module, dict(zip(self.names, self.parameters, strict=True)), loss, batch, size)

    def _listen(self, loss: Loss, batch: Any) -> None:
        called = planning.called_modules(self.module, lambda: loss(self.module, batch))
        sites = planning.choose(self.module, self.parameters, self._levels, called, self._recorder)
        for site in sites:
            self._detach += site.attach()
        self._sites = sites

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Keep autograd from computing any trained tensor's own gradient while the body runs."""
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            try:
                self._thaw()
            except BaseException:  # a deadline's alarm right here
                self._thaw()
                raise

    def _thaw(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _forget(self) -> None:
        """Drop what a pass that an exception (such as a deadline) cut short left behind."""
        self._recorder.forget()
        self._thaw()
        for parameter in self.parameters:
            parameter.grad = None


def flat_gradients(
    module: nn.Module, loss: Loss, batches: Iterable[tuple[Rows, Any]], names: Sequence[str] | None = None
) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Yield each microbatch's rows and its examples' gradients, flat [B, D]; the module is in evaluation mode.

    Args:
        module: The model.
        loss: Maps (module, batch) to the B per-example losses.
        batches: Rows and microbatch of each.
        names: The tensors and their order; all that are trained by default.

    Raises:
        ClientError: As :meth:`PerExampleModel.gradients`.
        ModelError: If the module mixes the examples of a batch by design.
    """
    module.eval()
    model = PerExampleModel(module)
    try:
        places = [model.names.index(name) for name in (model.names if names is None else names)]
        for rows, batch in batches:
            parts = model.gradients(loss, batch, len(rows))
            yield rows, torch.cat([parts[place].flatten(1) for place in places], dim=1)
    finally:
        model.close()
