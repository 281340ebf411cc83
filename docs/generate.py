"""Write the generated parts of the documentation in place: configuration tables, plug-in lists, command help.

A part stands between ``<!-- generated: WHAT NAME -->`` and ``<!-- end -->`` in a Markdown file of this folder:

- ``table privfed.schedule.ClientConfig``: the keys of a configuration table, from its fields and docstring;
- ``list tunings``: what ``privfed ls tunings`` prints;
- ``help train``: what ``privfed train --help`` prints;
- ``combinations matrix`` and ``combinations refused``: what ``privfed ls combinations`` finds.

``python docs/generate.py`` rewrites the files; with ``--check`` it only says whether they are current.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

import click
from pydantic.fields import FieldInfo

from privfed.catalogue import catalogue
from privfed.cli import main as command_line
from privfed.combinations import Matrix
from privfed.combinations.text import markdown, markdown_refused
from privfed.table import Table
from privfed_audits.listing import attacks

FOLDER = Path(__file__).parent
PART = re.compile(r"(<!-- generated: (?P<what>\w+) (?P<name>[\w. ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS = {"int": "integer", "float": "number", "str": "string", "bool": "true or false", "NoneType": "unset"}
# keys whose docstring says nothing because their name is the usual one
USUAL = {
    "weight_decay": "Weight decay of the optimiser.",
    "momentum": "Momentum of `sgd`.",
    "beta1": "Decay of the first moment of `adam`.",
    "beta2": "Decay of the second moment of `adam`.",
    "epsilon": "Added to the denominator of `adam`; nothing to do with privacy.",
    "learning_rate": "Learning rate of the optimiser.",
    "local_steps": "Optimiser steps a client takes in a round.",
    "optimizer": "`sgd` or `adamw`.",
    "server_learning_rate": "As `server.learning_rate`, for this phase.",
    "clients": "Number of clients.",
    "min_size": "The fewest examples a client may have.",
    "alpha": "Concentration of the Dirichlet distribution: small means uneven.",
    "r": "Rank of the factors.",
    "lora_alpha": "Scale: the update is multiplied by `lora_alpha / r`.",
    "target_modules": "Names of the layers to adapt; unset for peft's choice for the model.",
    "task": "What is learned.",
    "layers_to_transform": "Numbers of the blocks to adapt; unset for all.",
}


def render(what: str, name: str) -> str:
    """Return the text of a generated part.

    Raises:
        ValueError: If there is no such kind of part.
    """
    if what == "table":
        return table(name)
    if what == "list":
        entries = attacks() if name == "attacks" else catalogue(name)[name]
        return "".join(f"- `{entry}`: {plain(text)}\n" for entry, text in entries.items())
    if what == "combinations":
        return combinations(name)
    if what == "help":
        return f"```text\n{help_of(name.split())}\n```\n"
    raise ValueError(f"There is no generated part called {what!r}.")


@functools.cache
def every_combination() -> Matrix:
    """Return the matrix of all combinations."""
    return Matrix()


def combinations(part: str) -> str:
    """Return a part of the matrix of combinations as Markdown."""
    return markdown(every_combination()) if part == "matrix" else markdown_refused(every_combination())


def table(path: str) -> str:
    """Return a Markdown table of the keys of the configuration table at ``path``."""
    module, _, name = path.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    said = {
        k: v for base in reversed(model.__mro__) for k, v in attributes(inspect.cleandoc(base.__doc__ or "")).items()
    }
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        meaning = said.get(key) or USUAL.get(key, "")
        if key == "name" and not meaning and typing.get_origin(field.annotation) is typing.Literal:
            meaning = "Chooses this table."
        cells = (f"`{key}`", kind(field), default(field), plain(meaning))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def attributes(doc: str) -> dict[str, str]:
    """Return what the ``Attributes:`` section of a docstring says about each name."""
    found: dict[str, str] = {}
    section = doc.partition("Attributes:\n")[2]
    section = re.split(r"\n(?=\S)", section)[0]
    for entry in re.split(r"\n(?=    \S)", section):
        name, colon, text = entry.strip().partition(":")
        if colon:
            found[name] = " ".join(text.split())
    return found


def kind(field: FieldInfo) -> str:
    """Return the type of a key in words, with its bounds."""
    bounds = []
    for limit in field.metadata:
        for sign, attribute in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt")):
            if (value := getattr(limit, attribute, None)) is not None:
                bounds.append(f"{sign} {value:g}")
    words = type_words(field.annotation)
    return f"{words}, {', '.join(bounds)}" if bounds else words


def type_words(annotation: Any) -> str:
    """Return a type annotation in words."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" if isinstance(value, str) else f"`{str(value).lower()}`" for value in parts)
    if origin is typing.Annotated:
        return type_words(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_words(part) for part in parts if part is not types.NoneType)
    if origin is list:
        return f"list of {plural(parts[0])}"
    if origin is dict:
        return f"table of {plural(parts[1])}"
    if annotation is Table:
        return "name or table"
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return "table"
    return WORDS.get(getattr(annotation, "__name__", ""), str(annotation))


def plural(annotation: Any) -> str:
    """Return several values of a type in words."""
    words = type_words(annotation)
    return (
        words.replace("list of", "lists of", 1) if words.startswith("list of") else words.replace(" or ", "s or ") + "s"
    )


def default(field: FieldInfo) -> str:
    """Return a key's default as TOML."""
    if field.is_required():
        return "none: give it"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Table):
        return f'the table `"{getattr(value, "name", "")}"`'
    if isinstance(value, str | list | tuple):
        return f"`{json.dumps(value)}`"
    return f"`{value:.6g}`"


def plain(text: str) -> str:
    """Return docstring markup as Markdown."""
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def help_of(words: list[str]) -> str:
    """Return the help text of a command, at a fixed width."""
    context = click.Context(command_line, info_name="privfed", terminal_width=90)
    command: click.Command = command_line
    for word in words if words != ["privfed"] else []:
        command = typing.cast(click.Group, command).commands[word]
        context = click.Context(command, info_name=word, parent=context, terminal_width=90)
    return command.get_help(context)


def main() -> int:
    """Rewrite, or with ``--check`` compare; return the exit code."""
    stale = []
    for path in sorted(FOLDER.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = PART.sub(lambda part: f"{part[1]}\n{render(part['what'], part['name'])}\n{part[4]}", before)
        if after != before:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"Not current: {', '.join(stale)}. Run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
