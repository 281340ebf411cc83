"""What a ``[tuning]`` table of a peft method may hold: peft's own option names, checked against peft's own classes."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError, model_validator

from privfed.errors import ConfigError, nearest
from privfed.table import Table

# fields of every peft configuration that follow from the model and the run
SET_BY_PRIVFED = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"}
    | {"num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim", "fan_in_fan_out"}
)
_SCHEDULE = "it belongs to a schedule of ranks that reads gradients during training, which does not run here"
_LOSS = "it belongs to a loss of peft's own, and privfed computes the loss of each example itself"
_DATA = "it reads data without noise"
_OTHER_BASE = "the base is a float32 transformers model"
# (method, option) that are not offered, each with the reason; "" for every method
NOT_OFFERED: dict[tuple[str, str], str] = {
    ("adalora", "target_r"): _SCHEDULE,
    ("adalora", "tinit"): _SCHEDULE,
    ("adalora", "tfinal"): _SCHEDULE,
    ("adalora", "deltaT"): _SCHEDULE,
    ("adalora", "beta1"): _SCHEDULE,
    ("adalora", "beta2"): _SCHEDULE,
    ("adalora", "total_step"): _SCHEDULE,
    ("adalora", "orth_reg_weight"): _LOSS,
    ("adalora", "r"): "AdaLoRA's rank is init_r",
    ("adamss", "use_asa"): _SCHEDULE,
    ("cpt", "opt_weighted_loss_type"): _LOSS,
    ("cpt", "opt_loss_decay_factor"): _LOSS,
    ("shadow", "auxiliary_loss_weight"): _LOSS,
    ("", "eva_config"): _DATA,
    ("", "corda_config"): _DATA,
    ("", "lora_ga_config"): _DATA,
    ("", "loftq_config"): _OTHER_BASE,
    ("", "megatron_config"): _OTHER_BASE,
    ("", "megatron_core"): _OTHER_BASE,
    ("", "prompt_tuning_init_state_dict_path"): "such a file is a pickle, which can run code",
    ("", "tokenizer_kwargs"): "they can make a tokenizer run remote code",
}
# what privfed sets where peft has no default, or one that does nothing
VIRTUAL_TOKENS = 16
SUPPLIED: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 1},
    "cartridge": {"num_virtual_tokens": VIRTUAL_TOKENS},
    "frod": {"progressbar": False},
    "multitask_prompt_tuning": {"num_virtual_tokens": VIRTUAL_TOKENS},
    "p_tuning": {"num_virtual_tokens": VIRTUAL_TOKENS},
    "prefix_tuning": {"num_virtual_tokens": VIRTUAL_TOKENS},
    "prompt_tuning": {"num_virtual_tokens": VIRTUAL_TOKENS},
    "shadow": {"shadow_dropout": 0.0},
}
NEEDED = {"trainable_tokens": "token_indices"}


class PeftTable(Table):
    """A table that takes any key beside ``name``; :func:`checker` compares them with peft's own options.

    Loading a configuration does not import peft, so only values are checked here: booleans, finite numbers, strings,
    lists and tables of them.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _plain(self) -> PeftTable:
        for key, value in (self.__pydantic_extra__ or {}).items():
            if not _is_plain(value):
                raise ValueError(f"{key} = {value!r}: expected a boolean, a finite number, a string, a list or a table")
        return self

    def options(self) -> dict[str, Any]:
        """Return what was given, by peft's names."""
        return dict(self.__pydantic_extra__ or {})


def checker(kind: str) -> Callable[[PeftTable], None]:
    """Return the check of a table for the peft type ``kind`` (lower case)."""

    def check(table: PeftTable) -> None:
        check_options(kind, table.options())

    return check


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Compare options with peft's own class.

    Raises:
        ConfigError: If one is unknown, of a wrong type, not offered or missing, or peft refuses them together.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())]
    known = sorted({f.name for f in dataclasses.fields(config_class)} - SET_BY_PRIVFED)
    hints = typing.get_type_hints(config_class)
    for key, value in options.items():
        _check_offered(kind, key, value, known)
        _check_type(key, value, hints[key])
    needed = NEEDED.get(kind)
    if needed is not None and not options.get(needed):
        raise ConfigError(f'tuning.name = "{kind}" needs tuning.{needed}: give it.')
    try:
        config_class(**{**SUPPLIED.get(kind, {}), **_placeholders(kind, options), **options})
    except (ValueError, TypeError) as error:
        raise ConfigError(f'tuning.name = "{kind}" cannot have these options: {_first(error)}.') from error


def _check_offered(kind: str, key: str, value: Any, known: list[str]) -> None:
    if key in SET_BY_PRIVFED:
        raise ConfigError(f"tuning.{key} follows from the model and the run: leave it out.")
    if key not in known:
        hint = nearest(key, known) or f" Known: {', '.join(known)}."
        raise ConfigError(f"Unknown key 'tuning.{key}' for tuning.name = \"{kind}\".{hint}")
    reason = NOT_OFFERED.get((kind, key)) or NOT_OFFERED.get(("", key))
    if reason is not None:
        raise ConfigError(f"tuning.{key} is not offered ({reason}): leave it out.")
    if "dropout" in key and value not in (0, False):
        raise ConfigError(
            f"tuning.{key} = {value!r}, and only 0 is taken: an adapter that draws a new mask in each forward pass has "
            "no gradient of its own for each example; leave it out."
        )


def _check_type(key: str, value: Any, hint: Any) -> None:
    kinds = [k for k in typing.get_args(hint) if isinstance(k, type) and issubclass(k, enum.Enum)]
    words = [str(member.value) for kind in kinds for member in kind]
    if isinstance(value, str) and words and value not in words:  # peft types such options as a string as well
        raise ConfigError(f"tuning.{key} = {value!r}: expected one of {', '.join(words)}.")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
    except PydanticSchemaGenerationError:
        return  # a class of peft's own that is no plain value: peft's constructor judges it
    try:
        adapter.validate_json(json.dumps(value), strict=True)  # JSON, so that a string may name a member of an enum
    except ValidationError as error:
        problem = error.errors()[0]
        text = f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"
        raise ConfigError(f"tuning.{key} = {value!r}: {text}.") from error


def _placeholders(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model adds later: the tokenizer of a prompt that starts from a text, the tokens of CPT."""
    if kind == "cpt":
        ones = [1] * int(options.get("num_virtual_tokens", 1))
        return {"task_type": "CAUSAL_LM", "cpt_token_ids": ones, "cpt_mask": ones, "cpt_tokens_type_mask": ones}
    return {"tokenizer_name_or_path": "-"} if options.get("prompt_tuning_init") == "TEXT" else {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(_is_plain(entry) for entry in value)
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
