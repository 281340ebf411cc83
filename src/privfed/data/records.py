"""What one record is made of, by task: which columns it is read from, and the text that stands for it.

Duplicates, the held-out split and the digest of a ledger speak of that text, whatever the record's form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from privfed.data.config import DataConfig
from privfed.errors import ConfigError
from privfed.types import Task

Form = Literal["text", "text_pair", "prompt_response", "messages", "image"]
"""A text; two texts that are classified together; a prompt and its response; a conversation; an image."""

Conversation = tuple[tuple[str, str], ...]
"""A conversation's turns: (role, content)."""

SEPARATOR = "\u241f"
"""Stands between the parts of a record in its text: a visible sign that is no white space, which duplicates ignore."""

ASSISTANT = "assistant"
ROLES = ("system", "user", "assistant", "tool", "developer")

_KEYS: dict[Task, tuple[str, ...]] = {
    "sequence_classification": ("text_pair", "classes"),
    "causal_lm": ("prompt", "response", "messages"),
    "image_classification": ("classes",),
}


def form_of(config: DataConfig, task: Task) -> Form:
    """Return what a record of this table is under ``task``.

    Raises:
        ConfigError: If a column is given that the task does not read.
    """
    for key in ("text_pair", "prompt", "response", "messages", "classes"):
        if getattr(config, key) is not None and key not in _KEYS[task]:
            fitting = next(name for name, keys in _KEYS.items() if key in keys)
            raise ConfigError(
                f'[data] has {key} = {getattr(config, key)!r}, which model.task = "{task}" does not read: '
                f'remove it, or set model.task = "{fitting}".'
            )
    if task == "image_classification":
        return "image"
    if config.text_pair is not None:
        return "text_pair"
    if config.messages is not None:
        return "messages"
    return "text" if config.prompt is None else "prompt_response"


def has_labels(task: Task) -> bool:
    """Whether the records of ``task`` have classes."""
    return task != "causal_lm"


def columns_of(config: DataConfig, form: Form, *, labelled: bool) -> dict[str, str]:
    """Return the columns that are read: the ``[data]`` key to the column's name."""
    keys: dict[Form, tuple[str, ...]] = {
        "text": ("text",),
        "text_pair": ("text", "text_pair"),
        "prompt_response": ("prompt", "response"),
        "messages": ("messages",),
        "image": (),
    }
    wanted = [*keys[form], *(["label"] if labelled else []), "client"]
    return {key: getattr(config, key) for key in wanted if getattr(config, key) is not None}


def joined(parts: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """Return the text that stands for each record of several parts."""
    if "messages" in parts:
        return tuple(
            f" {SEPARATOR} ".join(f"{role}: {content}" for role, content in turns) for turns in parts["messages"]
        )
    return tuple(f" {SEPARATOR} ".join(record) for record in zip(*parts.values(), strict=True))
