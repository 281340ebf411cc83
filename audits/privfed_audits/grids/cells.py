"""The cells of a grid: each a whole run's configuration, or the sentence with which the configuration refuses it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privfed.config import load_config
from privfed.errors import ConfigError, PrivfedError
from privfed.run_config import RunConfig
from privfed_audits.grids.grid import AXES, Grid, place_name

KEY_LENGTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a grid.

    Attributes:
        tuning: Its label on that axis; likewise ``codec``, ``privacy`` and ``secagg``.
        seed: The run's seed.
        config: The run; None where the configuration refuses it.
        refusal: Why it is refused; empty where it is not.
        key: The start of the configuration's digest: cells with one key are one run.
    """

    tuning: str
    codec: str
    privacy: str
    secagg: str
    seed: int
    config: RunConfig | None
    refusal: str = ""
    key: str = ""

    @property
    def labels(self) -> tuple[str, str, str, str]:
        """Where it lies, without its seed."""
        return self.tuning, self.codec, self.privacy, self.secagg

    @property
    def name(self) -> str:
        """How it is called in progress lines."""
        return f"{place_name(self.labels)}, seed {self.seed}"


def cells(grid: Grid) -> tuple[Cell, ...]:
    """Return the cells, seed by seed, so that an early look has one seed of everything first.

    Raises:
        ConfigError: If there is no such base, or every cell is refused: the settings of all cells are wrong then.
    """
    if not Path(grid.base).is_file():
        load_config(grid.base)  # a preset is sound, so this fails only where there is none of that name
    found = tuple(_cells(grid))
    if all(cell.config is None for cell in found):
        raise ConfigError(f"Every cell of the grid is refused, the first one so: {found[0].refusal}")
    return found


def _cells(grid: Grid) -> Iterator[Cell]:
    places = itertools.product(*(grid.labels(axis) for axis in AXES))
    for seed, labels in itertools.product(grid.seeds, list(places)):
        place = dict(zip(AXES, labels, strict=True))
        try:
            config = load_config(grid.base, settings_of(grid, place, seed))
            check_ledger(config)
        except PrivfedError as error:
            yield Cell(**place, seed=seed, config=None, refusal=str(error))
        else:
            yield Cell(**place, seed=seed, config=config, key=config.digest()[:KEY_LENGTH])


def settings_of(grid: Grid, place: Mapping[str, str], seed: int) -> list[str]:
    """Return a cell's settings over the base, in the order in which they apply."""
    found = list(grid.settings)
    for axis in AXES:
        found += getattr(grid, axis)[place[axis]]
    for each in grid.when:
        if all(not getattr(each, axis) or place[axis] in getattr(each, axis) for axis in AXES):
            found += each.settings
    return [*found, f"seed={seed}"]


def check_ledger(config: RunConfig) -> None:
    """Refuse a grid over data whose holder keeps a ledger: the grid's runs would spend without being counted there.

    Raises:
        ConfigError: If a ledger lies beside the data file and the configuration names none.
    """
    if config.data.path is None or config.ledger.path is not None:
        return
    data = Path(config.data.path)
    ledger = data.with_name(f"{data.name}.privfed-ledger.sqlite")
    if ledger.exists():
        raise ConfigError(
            f"The data {data} have a ledger ({ledger.name}), and each of a grid's many runs would spend on them: "
            f'take public data, or charge them all there with settings = ["ledger.path={ledger}"].'
        )


def distinct(found: Sequence[Cell]) -> dict[str, Cell]:
    """Return the runs that are to be made: the first cell of each configuration, in order."""
    runs: dict[str, Cell] = {}
    for cell in found:
        if cell.config is not None:
            runs.setdefault(cell.key, cell)
    return runs


def place_of(cell: Cell) -> dict[str, Any]:
    """Return the columns that say where a cell lies."""
    return {axis: getattr(cell, axis) for axis in AXES} | {"seed": cell.seed}


__all__ = ["Cell", "cells", "check_ledger", "distinct", "place_of", "settings_of"]
