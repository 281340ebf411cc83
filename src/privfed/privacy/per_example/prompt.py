"""Prompts: built once, expanded to the batch, and every example's gradient pulled back through the encoder.

peft builds a prompt for one example and repeats it; hooks below the repetition see one gradient for the whole
batch. Methods that give every example its own copy before any layer is called (prefixes) need nothing of this.

Shape suffixes: B examples of a microbatch, P virtual tokens, H features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from privfed.privacy.per_example.sites import Detach, Site

_GIVEN_TO_EACH = ("PREFIX_TUNING", "CARTRIDGE")


def prompt_models(module: nn.Module) -> Iterator[Any]:
    """Yield the peft models within ``module`` that build one prompt for the whole batch."""
    try:
        from peft import PeftModel
    except ImportError:
        return
    for part in module.modules():
        if not isinstance(part, PeftModel) or not hasattr(part, "prompt_encoder"):
            continue
        config = part.active_peft_config
        if config.is_prompt_learning and str(config.peft_type.value) not in _GIVEN_TO_EACH:
            yield part


class PromptSite(Site):
    """A peft model with prompt tuning, P-tuning, multitask prompt tuning or CPT."""

    way = "prompt"

    def attach(self) -> list[Detach]:
        model: Any = self.module
        self._build = model.get_prompt
        model.get_prompt = self._expanded

        def detach() -> None:
            vars(model).pop("get_prompt", None)

        return [detach]

    def _expanded(self, batch_size: int, task_ids: torch.Tensor | None = None, **options: Any) -> Any:
        if not self.recorder.listening:
            return self._build(batch_size, task_ids=task_ids, **options)
        own = [self.module.get_parameter(name) for name in self.indices]
        for parameter in own:
            parameter.requires_grad_(True)
        try:
            # tasks differ from example to example: then so do their prompts
            size = 1 if task_ids is None else batch_size
            built_BPH = self._build(size, task_ids=task_ids, **options)
        finally:
            for parameter in own:
                parameter.requires_grad_(False)

        def deliver(gradient: torch.Tensor) -> None:
            self.recorder.later(lambda: self._pull_back(built_BPH, own, gradient))

        return self.recorder.tap_one(built_BPH.detach().expand(batch_size, -1, -1), [], deliver)

    def _pull_back(self, built_BPH: torch.Tensor, own: Sequence[nn.Parameter], gradient_BPH: torch.Tensor) -> None:
        size = len(gradient_BPH)
        wanted = gradient_BPH[:, None].to(built_BPH.dtype)
        if len(built_BPH) > 1:  # [B, B, P, H]: example i's gradient reaches its own prompt only
            wanted = torch.diag_embed(gradient_BPH.permute(1, 2, 0)).permute(2, 3, 0, 1).to(built_BPH.dtype)
        for parameter in own:
            parameter.requires_grad_(True)
        try:
            found = self._vectorised(built_BPH, own, wanted)
        finally:
            for parameter in own:
                parameter.requires_grad_(False)
        for name, gradients in zip(self.indices, found, strict=True):
            if gradients is not None:
                self.add(name, gradients.reshape(size, *self.module.get_parameter(name).shape))

    @staticmethod
    def _vectorised(
        built: torch.Tensor, own: Sequence[nn.Parameter], wanted: torch.Tensor
    ) -> Sequence[torch.Tensor | None]:
        try:
            return torch.autograd.grad(built, own, wanted, is_grads_batched=True, allow_unused=True, retain_graph=True)
        except (RuntimeError, NotImplementedError):  # such as an LSTM's backward pass
            rows = [torch.autograd.grad(built, own, row, allow_unused=True, retain_graph=True) for row in wanted]
            return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
