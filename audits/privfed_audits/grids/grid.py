"""The table that describes a grid: which runs, and what they are audited with."""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from privfed.errors import ConfigError, nearest, unknown_name
from privfed.table import Table

Settings = list[str]
AXES = ("tuning", "codec", "privacy", "secagg")
AS_BASE = "as the base"


def place_name(labels: Sequence[str]) -> str:
    """Return labels as a name; an axis on which there is nothing to choose is left out."""
    return ", ".join(label for label in labels if label != AS_BASE) or AS_BASE


def _one() -> dict[str, Settings]:
    return {AS_BASE: []}


class When(Table):
    """Settings for some cells: those that match every axis given here.

    Attributes:
        tuning: Labels of the axis; empty for all. So for the other axes.
        settings: As in ``Grid``.
    """

    tuning: list[str] = Field(default_factory=list)
    codec: list[str] = Field(default_factory=list)
    privacy: list[str] = Field(default_factory=list)
    secagg: list[str] = Field(default_factory=list)
    settings: Settings = Field(min_length=1)


class Grid(Table):
    """A grid of runs: every tuning with every codec, every privacy, every kind of sum and every seed.

    Each axis is a table from a label to settings, ``key=value`` as after ``privfed train -s``. A cell is the base run
    with, in this order: ``settings``, those of its label on each axis, those of each ``when`` that matches, its seed.

    Attributes:
        base: A preset of ``privfed train``, or a TOML file.
        settings: For every cell.
        tuning: What is trained.
        codec: How updates are sent.
        privacy: Unit, placement and budget.
        secagg: Whether sums are masked.
        seeds: A cell is run once with each.
        when: Settings for some cells.
        audit: Whether each run is audited.
        attacks: Names of the attacks; empty for the audit's own choice.
        reference: The tuning that others are compared with at matched utility; empty for the first.
    """

    base: str = "demo"
    settings: Settings = Field(default_factory=list)
    tuning: dict[str, Settings] = Field(default_factory=_one, min_length=1)
    codec: dict[str, Settings] = Field(default_factory=_one, min_length=1)
    privacy: dict[str, Settings] = Field(default_factory=_one, min_length=1)
    secagg: dict[str, Settings] = Field(default_factory=_one, min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[1], min_length=1)
    when: list[When] = Field(default_factory=list)
    audit: bool = True
    attacks: list[str] = Field(default_factory=list)
    reference: str = ""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        for number, each in enumerate(self.when, start=1):
            for axis in AXES:
                for label in getattr(each, axis):
                    known = getattr(self, axis)
                    if label not in known:
                        raise ValueError(
                            f"when number {number} names the {axis} {label!r}, which is not on that axis."
                            f"{nearest(label, known)} Known: {', '.join(known)}"
                        )
        if self.reference and self.reference not in self.tuning:
            raise ValueError(f"reference = {self.reference!r} is no tuning of the grid: {', '.join(self.tuning)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} names a seed twice: each seed is one run of a cell")
        return self

    def labels(self, axis: str) -> list[str]:
        """Return the labels of an axis in order."""
        return list(getattr(self, axis))

    @property
    def compared_with(self) -> str:
        """The tuning that others are compared with."""
        return self.reference or next(iter(self.tuning))

    def to_toml(self) -> str:
        """Return the grid as TOML, every default included."""
        return tomli_w.dumps(self.model_dump(mode="python"))


def grid_presets() -> dict[str, str]:
    """Return the shipped grids: name to TOML text."""
    folder = importlib.resources.files("privfed_audits.grids") / "presets"
    files = [f for f in folder.iterdir() if f.name.endswith(".toml")]
    return {f.name.removesuffix(".toml"): f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def load_grid(source: str | Mapping[str, Any], settings: Sequence[str] = ()) -> Grid:
    """Return the grid of a TOML file, a preset or tables; a path that exists wins.

    Args:
        source: The path, the name, or what a file would hold.
        settings: More settings for every cell, which come after the grid's own.

    Raises:
        ConfigError: If it cannot be read, a key is unknown, or a value cannot hold.
    """
    tables, where = (source, "grid") if isinstance(source, Mapping) else (_read(source), source)
    found = parse_grid(tables, where=where)
    return found.model_copy(update={"settings": [*found.settings, *settings]}) if settings else found


def _read(source: str) -> dict[str, Any]:
    """Return the tables of a file or a preset."""
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    elif "." in source or "/" in source:
        raise ConfigError(f"There is no file {source!r}: pass a TOML file or one of the grids {_names()}.")
    elif source not in grid_presets():
        raise unknown_name("grid", source, grid_presets())
    else:
        text = grid_presets()[source]
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}.") from error


def parse_grid(raw: Mapping[str, Any], *, where: str) -> Grid:
    """Return the grid of parsed TOML.

    Raises:
        ConfigError: One sentence for each problem found.
    """
    try:
        return Grid.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(f"{where}: " + " ".join(_sentence(problem) for problem in error.errors())) from error


def _sentence(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        model: type[Table] = When if problem["loc"][0] == "when" else Grid
        known = list(model.model_fields)
        hint = nearest(str(problem["loc"][-1]), known) or " Known: " + ", ".join(known) + "."
        return f"Unknown key {key!r} of a grid.{hint}"
    if problem["type"] == "value_error":
        return f"{problem['ctx']['error']}."
    return f"{key} = {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}."


def _names() -> str:
    return ", ".join(grid_presets())
