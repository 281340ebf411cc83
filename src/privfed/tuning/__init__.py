"""Tuning methods, one file each: what is trained, and how the result is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfed.errors import ConfigError
from privfed.registry import Registry
from privfed.table import Table

if TYPE_CHECKING:
    from torch import nn

    from privfed.models.loading import LoadedModel

TEXT = frozenset({"sequence_classification", "causal_lm"})
WITH_HEAD = frozenset({"sequence_classification", "image_classification"})
ALL_TASKS = TEXT | WITH_HEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedModel:
    """A model whose trained parameters are marked by ``requires_grad``.

    Attributes:
        model: Callable with ``input_ids`` and ``attention_mask``, or with ``pixel_values``; returns an object with
            ``logits``: [B, K] for a classifier, [B, S, V] for a causal language model, one row a token of
            ``input_ids`` whatever prompt a tuning puts in front.
        head: Name of the head's module inside ``model``; its parameters may have a learning rate of their own. None
            where the task has no head (``causal_lm``).
        save: Writes the trained parts to a folder that the tuning's ``load`` reads.
    """

    model: nn.Module
    head: str | None
    save: Callable[[Path], None]


def load_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Put a saved peft adapter on a fresh base model, as ``peft.PeftModel.from_pretrained`` does."""
    from privfed.tuning.adapters import load

    return load(model, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A tuning method.

    Attributes:
        config: Its table.
        apply: Marks what is trained, wrapping the model where needed; ``seed`` drives fresh parameters.
        linear: True where, whatever the options, the average of trained factors is the factor of the averaged model.
        scores: Trains the log-odds of a random mask, in tensors of which the names end as ``privfed.types.SCORES``.
        tasks: Values of ``model.task`` that it takes.
        check: Raises a ConfigError for options that cannot hold, without a model; may import peft.
        load: Puts what ``TunedModel.save`` wrote on a fresh base model; plain peft does for most.
        summary: One line for listings; the first line of the file's docstring where empty.
        example: Values of the options that have no default, such as a run could give them.
        unavailable: Why no run can use it, as a sentence; empty where one can.
    """

    config: type[Table]
    apply: Callable[[LoadedModel, Any, int], TunedModel]
    linear: bool
    scores: bool = False
    tasks: frozenset[str] = ALL_TASKS
    check: Callable[[Any], None] | None = None
    load: Callable[[nn.Module, Path], nn.Module] = load_peft
    summary: str = ""
    example: Mapping[str, Any] = field(default_factory=dict)
    unavailable: str = ""


TUNINGS: Registry[Tuning] = Registry("tuning", "privfed.tuning")


def check_declared(name: str, task: str) -> None:
    """Refuse a method that says of itself that it does not take the task, or that no run can use it.

    Raises:
        ConfigError: In a sentence.
    """
    plugin = TUNINGS.get(name)
    if plugin.unavailable:
        raise ConfigError(plugin.unavailable)
    if task not in plugin.tasks:
        taken = ", ".join(sorted(plugin.tasks))
        raise ConfigError(
            f'tuning.name = "{name}" does not work with model.task = "{task}" (it takes {taken}): choose another'
            ' tuning, such as "ffa_lora".'
        )


def check(config: Table, task: str) -> None:
    """Find what is wrong with a ``[tuning]`` table as far as that can be known without data or weights.

    Raises:
        ConfigError: If the method does not take the task, or an option is unknown, of a wrong type or impossible.
    """
    name = str(getattr(config, "name", ""))
    check_declared(name, task)
    plugin = TUNINGS.get(name)
    if plugin.check is not None:
        plugin.check(config)
