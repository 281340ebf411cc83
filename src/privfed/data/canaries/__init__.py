"""Records that are planted in the training data by the toss of a coin, so that an audit can look for them.

A kind of canary is one file: it makes the records. Whether each is in the training data is decided by a coin of its own
(``privfed.federation.canaries``); here nothing knows the coins, and what a kind makes must not depend on them.

Shape suffix: M canaries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from privfed.data.dataset import Dataset
from privfed.errors import ConfigError
from privfed.registry import Registry
from privfed.types import Task, Unit

Rows = NDArray[np.int64]
Loss = Literal["model", "direct"]
Gradient = Literal["value", "random", "optimised"]
D = TypeVar("D", bound=Any)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A data set with canary records in its training split.

    Attributes:
        dataset: The data set; records that are no canaries are as they were.
        rows_M: The canaries' row numbers in the training split. Those below its old length took the place of the
            record that was there, and belong to its client; the others were appended and belong to nobody yet.
    """

    dataset: Any
    rows_M: Rows = field(repr=False)


Make = Callable[[Dataset, Rows, int, np.random.Generator], Planted]
"""From (data set, rows that may be replaced, number of canaries, experiment stream) to the planted data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryKind:
    """A kind of canary and what is true of it.

    Attributes:
        make: Makes the records.
        tasks: The tasks that have such records.
        units: The privacy units whose loss it can show: an ``example`` is a record, a ``client`` one with nothing else.
        loss: ``model``: the record's loss is the model's; ``direct``: its gradient is given
            (``privfed.federation.planted``).
        gradient: What a given gradient is: one trained ``value``, a ``random`` direction over all of them, or one that
            is ``optimised`` to be like no other record's.
    """

    make: Make
    tasks: tuple[Task, ...]
    units: tuple[Unit, ...] = ("example",)
    loss: Loss = "model"
    gradient: Gradient = "value"


CANARIES: Registry[CanaryKind] = Registry("canary", "privfed.data.canaries")
"""The kinds of canaries by ``audit.canary``."""


def check_canaries(name: str, count: int, *, task: Task, unit: str) -> None:
    """Refuse canaries that cannot be, or that would say nothing about the run's unit.

    Raises:
        UnknownNameError: If there is no such kind.
        ConfigError: If the task has no such records, or the unit is another.
    """
    kind = CANARIES.get(name)
    if count < LEAST:
        raise ConfigError(
            f"audit.canaries = {count}: a bound needs at least {LEAST} canaries; give more, or 0 for none."
        )
    if task not in kind.tasks:
        fitting = [other for other, entry in CANARIES.items() if task in entry.tasks]
        raise ConfigError(
            f'audit.canary = "{name}" with model.task = "{task}": there are no such records; use one of '
            f"{', '.join(fitting)}."
        )
    if unit != "none" and unit not in kind.units:
        fitting = [other for other, entry in CANARIES.items() if unit in entry.units and task in entry.tasks]
        raise ConfigError(
            f'audit.canary = "{name}" with privacy.unit = "{unit}": such a canary is one record, and the promise is '
            f"about whole clients; use audit.canary = {' or '.join(map(repr, fitting))}."
        )


LEAST = 16


def changed(value: D, **fields: Any) -> D:
    """Return a copy of a frozen value with other fields."""
    return dataclasses.replace(value, **fields)


def choose_rows(rows: Rows, count: int, rng: np.random.Generator) -> Rows:
    """Return ``count`` of ``rows`` at random, ascending.

    Raises:
        ConfigError: If that is more than half of them: a run on canaries says little about a run on data.
    """
    if 2 * count > len(rows):
        raise ConfigError(
            f"audit.canaries = {count}, but there are {len(rows)} training records and canaries may replace half of "
            f"them at most: set audit.canaries to {len(rows) // 2} or fewer."
        )
    return np.sort(rng.choice(rows, size=count, replace=False))


def appended(split: D, row: int, count: int, **fields: Callable[[Any], Any]) -> D:
    """Return a split with ``count`` more records at its end: copies of record ``row``.

    Args:
        split: Any split of :mod:`privfed.data`.
        row: The record to copy.
        count: How many.
        fields: Nothing is copied of these fields: each is made from the one there was.
    """
    found = {each.name: getattr(split, each.name) for each in dataclasses.fields(split)}
    longer = {
        name: fields[name](value) if name in fields else _longer(value, row, count) for name, value in found.items()
    }
    return changed(split, **longer)


def _longer(value: Any, row: int, count: int) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _longer(column, row, count) for name, column in value.items()}
    if isinstance(value, np.ndarray):
        return np.concatenate([value, np.repeat(value[row : row + 1], count, axis=0)])
    if isinstance(value, Sequence):
        return (*value, *([value[row]] * count))
    return value
