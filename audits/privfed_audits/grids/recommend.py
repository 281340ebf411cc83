"""Constraints such as ``epsilon<=4, bytes<=1MB``: the best configurations that meet them, and what that gives up."""

from __future__ import annotations

import math
import operator
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privfed.errors import ConfigError, nearest
from privfed.files import write_atomic
from privfed.run_config import RunConfig
from privfed_audits.grids.compare import describe, difference_text, paired
from privfed_audits.grids.measures import Setting

MOST = 3
EXAMPLE = '"epsilon<=4, bytes<=1MB"'
OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
UNITS = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_FORM = re.compile(r"\s*([A-Za-z_]+)\s*(<=|>=|<|>)\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")


def _epsilon(each: Setting) -> float:
    return math.inf if each.epsilon is None else each.epsilon


def _perplexity(each: Setting) -> float:
    return -each.utility.mean


MEASURES: Mapping[str, tuple[str, Callable[[Setting], float]]] = {
    "epsilon": ("accounted, of the released model", _epsilon),
    "empirical": (
        "found by the strongest attack",
        lambda each: math.inf if each.leakage is None else each.leakage.mean,
    ),
    "auc": ("of the strongest attack", lambda each: math.inf if each.auc is None else each.auc.mean),
    "bytes": ("that a client sends in the whole run", lambda each: each.bytes_run),
    "bytes_round": ("that a client sends in a round", lambda each: each.bytes_round),
    "accuracy": ("on the test rows", lambda each: each.utility.mean),
    "perplexity": ("on the test rows", _perplexity),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """One condition, as it was written and as it is meant."""

    text: str
    measure: str
    sign: str
    value: float

    def met(self, each: Setting) -> bool:
        """Return whether a configuration meets it."""
        return OPERATORS[self.sign](MEASURES[self.measure][1](each), self.value)


def parse(text: str) -> tuple[Constraint, ...]:
    """Return the constraints of ``"epsilon<=4, bytes<=1MB"``.

    Raises:
        ConfigError: If a part is not MEASURE SIGN NUMBER with a unit that the measure takes.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"--recommend {text!r} has no constraint: expected something like {EXAMPLE}.")
    return tuple(_constraint(part) for part in parts)


def _constraint(part: str) -> Constraint:
    form = _FORM.fullmatch(part)
    if form is None:
        raise ConfigError(
            f"The constraint {part!r} is malformed: expected a measure, one of <= < >= >, and a number, such as "
            f"{EXAMPLE}. Measures: {', '.join(MEASURES)}."
        )
    measure, sign, number, unit = form.groups()
    if measure not in MEASURES:
        raise ConfigError(
            f"The constraint {part!r} names no measure: {measure!r}.{nearest(measure, MEASURES)} "
            f"Measures: {', '.join(MEASURES)}."
        )
    try:
        value = float(number) * _scale(measure, unit)
    except ValueError:
        raise ConfigError(f"In the constraint {part!r}, {number!r} is not a number.") from None
    except KeyError:
        raise ConfigError(_unit_problem(part, measure, unit)) from None
    return Constraint(text=part, measure=measure, sign=sign, value=value)


def _scale(measure: str, unit: str) -> float:
    if measure.startswith("bytes"):
        return UNITS[unit.lower()]
    if measure == "accuracy":
        return {"": 1.0, "%": 0.01}[unit]
    return {"": 1.0}[unit]


def _unit_problem(part: str, measure: str, unit: str) -> str:
    if measure.startswith("bytes"):
        expected = "B, kB, MB, GB, KiB, MiB or GiB"
    else:
        expected = "% or no unit" if measure == "accuracy" else "no unit"
    return f"In the constraint {part!r}, {unit!r} is no unit of {measure}: expected {expected}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What is recommended.

    Attributes:
        best: The most useful configurations that meet every constraint, best first.
        lines: It all in words.
    """

    best: tuple[Setting, ...]
    lines: tuple[str, ...]


def recommend(found: Sequence[Setting], constraints: Sequence[Constraint], utility: str) -> Advice:
    """Return the best configurations under constraints, with their intervals and what would be given up."""
    meeting = [each for each in found if all(one.met(each) for one in constraints)]
    asked = ", ".join(one.text for one in constraints)
    if not meeting:
        return Advice(best=(), lines=(f"No configuration meets {asked}.", *_nearest(found, constraints)))
    best = sorted(meeting, key=lambda each: (-each.utility.mean, _epsilon(each), each.bytes_run))[:MOST]
    first = best[0]
    lines = [f"{len(meeting)} of {len(found)} configurations meet {asked}. The best:"]
    lines += [f"{rank}. {each.name}: {describe(each, utility)}" for rank, each in enumerate(best, start=1)]
    top = max(found, key=lambda each: each.utility.mean)
    if top is first:
        lines.append("Nothing is given up: it is the most useful of all.")
    else:
        lines.append(
            f"Given up: against the most useful of all, {top.name} ({describe(top, utility)}), number 1 has "
            f"{difference_text(paired(first, top), utility)}."
        )
        lines += _without(found, constraints, first, utility)
    return Advice(best=tuple(best), lines=tuple(lines))


def _without(found: Sequence[Setting], constraints: Sequence[Constraint], first: Setting, utility: str) -> list[str]:
    """Return what each constraint costs: the best configuration that meets all the others."""
    lines = []
    for dropped in constraints if len(constraints) > 1 else ():
        others = [one for one in constraints if one is not dropped]
        pool = [each for each in found if all(one.met(each) for one in others)]
        best = max(pool, key=lambda each: each.utility.mean)
        if best.utility.mean > first.utility.mean:
            gain = difference_text(paired(best, first), utility)
            lines.append(f"Without {dropped.text}: {best.name}, {gain}.")
        else:
            lines.append(f"Without {dropped.text}: nothing better.")
    return lines


def _nearest(found: Sequence[Setting], constraints: Sequence[Constraint]) -> list[str]:
    """Return, of each constraint, how near the grid comes to it."""
    lines = []
    for one in constraints:
        values = [value for each in found if math.isfinite(value := MEASURES[one.measure][1](each))]
        if values:
            nearest_value = min(values) if one.sign.startswith("<") else max(values)
            lines.append(
                f"The grid's {one.measure} ({MEASURES[one.measure][0]}) nearest to {one.text}: {nearest_value:.4g}."
            )
        else:
            lines.append(f"No configuration of the grid has a finite {one.measure}.")
    return lines


def write_runs(best: Sequence[Setting], folder: Path) -> list[Path]:
    """Write each configuration as a run.toml that trains for real, in place of what was written before.

    The noise is secret there, no canaries are planted, and nothing is recorded.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = []
    for rank, each in enumerate(best, start=1):
        config = each.points[0].cell.config
        if config is None:
            raise ConfigError(f"{each.name} has no configuration.")
        path = folder / f"{rank}-{slug(each.name)}.toml"
        write_atomic(path, (f"# {each.name}\n" + for_real(config).to_toml()).encode())
        paths.append(path)
    return paths


def for_real(config: RunConfig) -> RunConfig:
    """Return the run without what made it an experiment."""
    raw: dict[str, Any] = config.to_dict()
    raw["privacy"]["reproducible_noise"] = False
    raw.pop("audit", None)
    return RunConfig.model_validate(raw)


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


__all__ = ["MEASURES", "Advice", "Constraint", "for_real", "parse", "recommend", "slug", "write_runs"]
