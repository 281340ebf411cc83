"""Tuning methods, one file each: what is trained, and how the result is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfed.registry import Registry
from privfed.table import Table

if TYPE_CHECKING:
    from torch import nn

    from privfed.models.loading import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedModel:
    """A model whose trained parameters are marked by ``requires_grad``.

    Attributes:
        model: Callable with ``input_ids`` and ``attention_mask``; returns an object with ``logits``.
        head: Name of the head's module inside ``model``; its parameters may have a learning rate of their own.
            None for a language model, whose head is the base's own.
        save: Writes the trained parts to a folder that plain peft (or transformers, for ``full``) loads.
    """

    model: nn.Module
    head: str | None
    save: Callable[[Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A tuning method.

    Attributes:
        config: Its table.
        apply: Marks what is trained, wrapping the model where needed; ``seed`` drives fresh parameters.
        linear: True where the average of trained factors is the factor of the averaged model.
    """

    config: type[Table]
    apply: Callable[[LoadedModel, Any, int], TunedModel]
    linear: bool


TUNINGS: Registry[Tuning] = Registry("tuning", "privfed.tuning")
