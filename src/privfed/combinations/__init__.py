"""Which tuning, codec, privacy, aggregation rule and secure aggregation go together.

Nothing is listed here: the values of an axis come from the registries and from the types of the configuration tables,
and each combination is put to the checks that a run is put to (the configuration's own, what a tuning says of itself,
and the making of the codec). So a plug-in that is added is a row more, and a check that changes changes the matrix.

Of the tunings, of which there are many, one of each class is asked: no check tells two tunings apart that the same
rules take, that both can train the task, and that both or neither train the scores of a mask.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from privfed.compression import CODECS, Ring
from privfed.config import RunConfig, parse_config
from privfed.errors import ConfigError, PrivfedError, unknown_name
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.discrete.config import DistributedConfig
from privfed.privacy.mechanisms import MECHANISMS
from privfed.rules import RULES
from privfed.secagg.config import SecAggConfig
from privfed.table import Table
from privfed.tuning import TUNINGS, check_declared

Cell = tuple[str, ...]
"""The label of one value of each axis, in the order of ``AXES``."""
AXES = ("tuning", "codec", "privacy", "rule", "secagg")
TASK = "sequence_classification"
CLIENTS = 5
# what most combinations can live with: control variates need plain steps, integer noise on examples a single step,
# rules that make factors anew plain averaging, Krum a handful of clients
BASE: Mapping[str, Mapping[str, Any]] = {
    "model": {"task": TASK},
    "data": {"name": "pydoc"},
    "partition": {"name": "iid", "clients": CLIENTS},
    "client": {"optimizer": "sgd", "local_steps": 1, "sampling_probability": 0.5},
    "server": {"rounds": 2, "cohort_size": CLIENTS},
}
_WHERE = "combination"
# the first is the last that one would give up
_KEPT_LONGEST = ("privacy", "secagg", "tuning", "rule", "codec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One value of an axis.

    Attributes:
        label: What it is called.
        tables: What it sets in a configuration.
    """

    label: str
    tables: Mapping[str, Mapping[str, Any]]


def choices() -> dict[str, tuple[Choice, ...]]:
    """Return every value of every axis; of each the default comes first."""
    default = RunConfig()
    first = {
        "tuning": str(getattr(default.tuning, "name", "")),
        "codec": str(getattr(default.compression, "name", "")),
        "privacy": "",
        "rule": default.server.rule,
        "secagg": default.secagg.name,
    }
    found = {
        "tuning": [_named("tuning", name, plugin.example) for name, plugin in TUNINGS.items()],
        "codec": [choice for name in CODECS.names() for choice in _codecs(name)],
        "privacy": _privacy(),
        "rule": [Choice(label=name, tables={"server": {"aggregation": name}}) for name in RULES.names()],
        "secagg": [_named("secagg", name) for name in _literals(SecAggConfig, "name")],
    }
    return {axis: tuple(sorted(found[axis], key=lambda each: each.label != first[axis])) for axis in AXES}


def tables_of(chosen: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """Return the configuration, as parsed TOML, of one value of each axis."""
    raw = {name: dict(table) for name, table in BASE.items()}
    for choice in chosen:
        for name, table in choice.tables.items():
            raw[name] = {**raw.get(name, {}), **table}
    return raw


def refusal(raw: Mapping[str, Any]) -> str | None:
    """Return the sentence with which a run of these tables is refused before data or a model is read, or None."""
    try:
        config = parse_config(raw, where=_WHERE)
        check_declared(str(getattr(config.tuning, "name", "")), config.model.task)
        ring = Ring(bits=config.ring_bits(CLIENTS), clients=CLIENTS) if config.secagg.name == "masked" else None
        CODECS.get(str(getattr(config.compression, "name", ""))).build(config.compression, ring)
    except PrivfedError as error:
        return str(error).removeprefix(f"{_WHERE}: ")
    return None


class Matrix:
    """All combinations, or those of some values.

    Args:
        only: Values to keep by axis: a label, or a word of it such as ``client`` or ``top_k``; any of several.

    Raises:
        UnknownNameError: If there is no such axis or value.
    """

    def __init__(self, only: Mapping[str, Sequence[str]] | None = None) -> None:
        self.axes = choices()
        self._by_label = {axis: {choice.label: choice for choice in self.axes[axis]} for axis in AXES}
        self.classes = _tuning_classes(self.axes["tuning"])
        self._known: dict[Cell, str | None] = {}
        self.labels = {axis: [choice.label for choice in self.axes[axis]] for axis in AXES}
        for axis, words in (only or {}).items():
            self.labels[axis] = self._matching(axis, words)

    @property
    def total(self) -> int:
        """The number of combinations."""
        product = 1
        for labels in self.labels.values():
            product *= len(labels)
        return product

    @cached_property
    def refused(self) -> dict[Cell, str]:
        """The refused combinations of one tuning of each class, each with its sentence."""
        return {cell: reason for cell in self.cells() if (reason := self._reason(cell)) is not None}

    @cached_property
    def allowed_total(self) -> int:
        """The number of combinations that run."""
        return self.total - sum(self.weight(cell) for cell in self.refused)

    def cells(self) -> Iterator[Cell]:
        """Yield every combination of one tuning of each class."""
        yield from itertools.product(self.tunings, *(self.labels[axis] for axis in AXES[1:]))

    @cached_property
    def tunings(self) -> dict[str, list[str]]:
        """The tunings of each class, by the first of them."""
        found: dict[str, list[str]] = {}
        for label in self.labels["tuning"]:
            found.setdefault(self.classes[label], []).append(label)
        return {members[0]: members for members in found.values()}

    def weight(self, cell: Cell) -> int:
        """Return how many combinations the cell of a class's first tuning stands for."""
        return len(self.tunings[cell[0]])

    def tables(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """Return the configuration of a combination."""
        return tables_of([self._by_label[axis][label] for axis, label in zip(AXES, cell, strict=True)])

    def nearest(self, cell: Cell) -> Cell | None:
        """Return an allowed combination that differs in as few axes as any.

        Of several, the one that keeps the privacy, then the secure aggregation, the tuning, the rule; and of the values
        of an axis, the default.
        """
        order = tuple(reversed(_KEPT_LONGEST))
        for count in range(1, len(AXES) + 1):
            for changed in itertools.combinations(order, count):
                for found in self._with_others(cell, frozenset(changed)):
                    if self._reason(found) is None:
                        return found
        return None

    def _with_others(self, cell: Cell, changed: frozenset[str]) -> Iterator[Cell]:
        """Yield the cells with another value on each of the ``changed`` axes, of all there are."""
        values = []
        for axis, label in zip(AXES, cell, strict=True):
            every = set(self.classes.values()) if axis == "tuning" else None
            others = [c.label for c in self.axes[axis] if c.label != label and (every is None or c.label in every)]
            values.append(others if axis in changed else [label])
        yield from itertools.product(*values)

    def _reason(self, cell: Cell) -> str | None:
        if cell not in self._known:
            self._known[cell] = refusal(self.tables(cell))
        return self._known[cell]

    def _matching(self, axis: str, words: Sequence[str]) -> list[str]:
        if axis not in self.labels:
            raise unknown_name("axis", axis, AXES)
        labels = self.labels[axis]
        for word in words:
            if not any(_fits(label, word) for label in labels):
                raise unknown_name(f"value of the axis {axis}", word, labels)
        return [label for label in labels if any(_fits(label, word) for word in words)]


def _fits(label: str, word: str) -> bool:
    return word == label or word in label.split(", ")


def _tuning_classes(tunings: Sequence[Choice]) -> dict[str, str]:
    """Return the first tuning of the class of each: of those of which the same can be used and by the same rules."""
    taking = {name: rule.takes for name, rule in RULES.items() if rule.takes is not None}
    first: dict[Any, str] = {}
    found = {}
    for choice in tunings:
        plugin = TUNINGS.get(choice.label)
        taken_by = frozenset(name for name, takes in taking.items() if choice.label in takes)
        key = (bool(plugin.unavailable), TASK in plugin.tasks, plugin.scores, taken_by)
        found[choice.label] = first.setdefault(key, choice.label)
    return found


def _named(table: str, name: str, options: Mapping[str, Any] | None = None) -> Choice:
    return Choice(label=name, tables={table: {"name": name, **(options or {})}})


def _codecs(name: str) -> Iterator[Choice]:
    """Yield a codec with its defaults, and with each setting of its switches that makes other things true of it."""
    plugin, seen = CODECS.get(name), set()
    for options in _switches(plugin.config):
        try:
            table = plugin.config.model_validate({"name": name, **options})
            declared = (plugin.declare(table, False), plugin.declare(table, True))
        except (ConfigError, ValidationError):  # its own options contradict each other: no combination of it
            continue
        if declared not in seen:
            seen.add(declared)
            words = [f"{key} = {str(value).lower()}" for key, value in options.items()]
            yield Choice(label=", ".join([name, *words]), tables={"compression": {"name": name, **options}})


def _switches(table: type[Table]) -> list[dict[str, Any]]:
    """Return the settings of a table's booleans and words that differ from its defaults; those with fewest first."""
    settings: list[dict[str, Any]] = [{}]
    for key, field in table.model_fields.items():
        if key == "name":
            continue
        values = (False, True) if field.annotation is bool else _literals(table, key)
        others = [value for value in values if value != field.default]
        settings += [{**setting, key: value} for setting in settings for value in others]
    return sorted(settings, key=len)


def _privacy() -> list[Choice]:
    """Return every unit, placement and mechanism that ``[privacy]`` takes together."""
    names: dict[str, Callable[[str], dict[str, Any]]] = {
        **dict.fromkeys(MECHANISMS.names(), _mechanism),
        **dict.fromkeys(_literals(DistributedConfig, "noise"), _noise),
    }
    found = [Choice(label="none", tables={"privacy": {"unit": "none"}})]
    units = [unit for unit in _literals(PrivacyConfig, "unit") if unit != "none"]
    for unit, placement, name in itertools.product(units, _literals(PrivacyConfig, "placement"), names):
        table = {"unit": unit, "placement": placement, "noise_multiplier": 1.0, **names[name](name)}
        if (placement == "distributed") != (names[name] is _noise):
            continue
        try:
            PrivacyConfig.model_validate(table)
        except (ConfigError, ValidationError):  # refused by the table itself: no value of this axis
            continue
        found.append(Choice(label=f"{unit}, {placement}, {name}", tables={"privacy": table}))
    return found


def _mechanism(name: str) -> dict[str, Any]:
    return {"mechanism": name}


def _noise(name: str) -> dict[str, Any]:
    return {"distributed": {"noise": name}}


def _literals(table: type[Table], key: str) -> tuple[Any, ...]:
    """Return the words that a key takes, where it takes words only; None left out."""
    annotation = table.model_fields[key].annotation
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return tuple(parts)
    if len(parts) == 1 and typing.get_origin(parts[0]) is typing.Literal:
        return tuple(typing.get_args(parts[0]))
    return ()
