"""Any part of the model by name patterns, trained in place; and the head where the task has one.

``select = ["layer.*.value"]`` takes every parameter whose name, or the name of a module that it belongs to, ends in
a match. Saved as a peft LoRA adapter without factors whose ``modules_to_save`` are the modules that own the
parameters, so plain peft loads it (a module of which only a part is trained is saved whole).
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from privfed.errors import ModelError, nearest
from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    from torch import nn

    from privfed.models.loading import LoadedModel


class SelectConfig(Table):
    """What to train.

    Attributes:
        select: Patterns of the ends of parameter or module names, with ``*``, ``?`` and ``[...]`` as in file names; a
            ``*`` runs over dots.
    """

    name: Literal["select"] = "select"
    select: str | list[str] = Field(min_length=1)

    @field_validator("select")
    @classmethod
    def _patterns(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not all(value):
            raise ValueError("an empty pattern was given, expected patterns such as 'layer.*.value'")
        return value


def apply(loaded: LoadedModel, config: SelectConfig, seed: int) -> TunedModel:
    """Train what the patterns select.

    Raises:
        ModelError: If a pattern matches nothing, or selects a weight that is tied to another.
    """
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from privfed.tuning.adapters import head_of, lora_wrapped

    patterns = [config.select] if isinstance(config.select, str) else config.select
    names = _selected(loaded.model, patterns)
    head = head_of(loaded)
    beside_head = [n for n in names if head is None or not n.startswith(f"{head}.")]
    owners = _owners(loaded.model, beside_head)

    def freeze_rest(model: Any) -> None:
        for name, parameter in model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            in_head = head is not None and plain.startswith(f"{head}.")
            if parameter.requires_grad and not in_head and plain not in beside_head:
                parameter.requires_grad_(False)

    return lora_wrapped(
        loaded,
        seed,
        name="select",
        prepare=freeze_rest,
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=owners,
    )


def _selected(model: nn.Module, patterns: list[str]) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if _matches(name, pattern)}
        if not hits:
            modules = {name.rpartition(".")[0] for name in names}
            ends = modules | {module.rpartition(".")[2] for module in modules}
            raise ModelError(
                f"tuning.select = {pattern!r} matches no parameter of {type(model).__name__}"
                f".{nearest(pattern, ends) or f' It has {min(modules)!r}, for one.'}"
            )
        found |= hits
    return [name for name in names if name in found]


def _matches(name: str, pattern: str) -> bool:
    """Return whether the end of a parameter's name, or of a module's that it belongs to, matches."""
    parts = name.split(".")
    whole = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(end, pattern) or fnmatchcase(end, f"*.{pattern}") for end in whole)


def _owners(model: nn.Module, names: list[str]) -> list[str]:
    """Return the outermost modules that hold the named parameters directly."""
    tied = _tied(model)
    for name in names:
        if name in tied:
            raise ModelError(
                f"tuning.select takes {name}, whose weight is also {tied[name]}'s, and an adapter would part the two: "
                'use tuning.name = "full", or patterns without it.'
            )
    owners = {name.rpartition(".")[0] for name in names}
    if "" in owners:
        raise ModelError(
            "tuning.select takes a parameter of the model itself, which no adapter can hold: leave it out."
        )
    return sorted(o for o in owners if not any(o.startswith(f"{other}.") for other in owners))


def _tied(model: nn.Module) -> dict[str, str]:
    """Return {parameter: another name of the same one} for parameters with two names."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[first[id(parameter)]] = name
        first.setdefault(id(parameter), name)
    return tied


TUNINGS.register("select")(Tuning(config=SelectConfig, apply=apply, linear=True, example={"select": "bias"}))
