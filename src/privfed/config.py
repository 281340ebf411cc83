"""TOML in, TOML out: a run's configuration from a file or a preset, with overrides.

Precedence: defaults < file < ``-s key=value``.
"""

from __future__ import annotations

import importlib.resources
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from privfed.compression import CODECS
from privfed.data import PARTITIONERS
from privfed.errors import ConfigError, UnknownNameError, nearest, unknown_name
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.mechanisms import MECHANISMS
from privfed.registry import Registry
from privfed.rules import RULES
from privfed.run_config import RunConfig
from privfed.schedule import ServerConfig
from privfed.tracking import TRACKERS
from privfed.tuning import TUNINGS

MECHANISM = "privacy.mechanism"
AGGREGATION = "server.aggregation"
# tables for which a name alone is short
SHORT: dict[str, Any] = {MECHANISM: PrivacyConfig, AGGREGATION: ServerConfig}
# what follows the kind of value that was expected, by the start of pydantic's name for the error
_HINTS = {
    "int": ", such as 3",
    "float": ", such as 0.5 with a point",
    "bool": ": true or false",
    "string": ": put it in quotes, as in -s 'key=\"7\"'",
    "list": ', such as ["a", "b"]',
}
TAGGED = ("partition", "tuning", "compression", "downlink", "head_warm_start", "secagg", "tracking", *SHORT)


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a TOML file or a preset, with overrides applied.

    Args:
        source: A path, or the name of a shipped preset. A path that exists wins.
        overrides: ``key=value`` pairs; the value is TOML, or a bare string.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown, or a value cannot hold.
    """
    return parse_config(read_tables(source, overrides), where=source)


def load_budget_config(source: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, bool]:
    """Return a configuration that may give both an epsilon and a noise multiplier, and whether it does.

    A run takes one of the two; a question about the rounds that a budget affords takes both.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    raw = read_tables(source, overrides)
    privacy = raw.get("privacy", {})
    if not isinstance(privacy, dict) or not {"target_epsilon", "noise_multiplier"} <= privacy.keys():
        return parse_config(raw, where=source), False
    target = privacy.pop("target_epsilon")
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < math.inf:
        raise ConfigError(f"{source}: privacy.target_epsilon is {target!r}, expected a finite number above 0.")
    found = parse_config(raw, where=source)
    privacy_table = found.privacy.model_copy(update={"target_epsilon": float(target)})
    return found.model_copy(update={"privacy": privacy_table}), True


def parse_config(raw: Mapping[str, Any], *, where: str) -> RunConfig:
    """Return the configuration of parsed TOML.

    Raises:
        ConfigError: One sentence for each problem found.
    """
    try:
        return RunConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(f"{where}: " + " ".join(_sentences(error, raw))) from error


def presets() -> dict[str, str]:
    """Return the shipped presets: name to TOML text."""
    folder = importlib.resources.files("privfed") / "presets"
    files = [f for f in folder.iterdir() if f.name.endswith(".toml")]
    return {f.name.removesuffix(".toml"): f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def differences(left: RunConfig, right: RunConfig) -> list[str]:
    """Return one line ``key: left -> right`` for each value that differs."""
    a, b = _flat(left.to_dict()), _flat(right.to_dict())
    keys = sorted(a.keys() | b.keys())
    return [f"{k}: {a.get(k, 'unset')!r} -> {b.get(k, 'unset')!r}" for k in keys if a.get(k) != b.get(k)]


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    elif "." in source or "/" in source:
        raise ConfigError(
            f"There is no file {source!r}: pass a TOML file or one of the presets {', '.join(presets())}."
        )
    elif source not in presets():
        raise unknown_name("preset", source, presets())
    else:
        text = presets()[source]
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        toml = path.suffix.lower() == ".toml"
        way = "" if toml else " Rows of data are no configuration: give them as data.path in a TOML file, or with -s."
        raise ConfigError(f"{source} is not valid TOML: {error}.{way}") from error


def read_tables(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the tables of a TOML file or a preset with overrides applied; values are not checked.

    Raises:
        ConfigError: If the file cannot be read, or an override is malformed.
    """
    return with_overrides(_read(source), overrides)


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``raw`` with overrides applied in place; a ``name`` first, since it may reset its table."""
    names = [*(f"{table}.name" for table in TAGGED), *SHORT]
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].strip() not in names):
        apply_override(raw, override)
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set in ``raw`` what ``key=value`` says; the value is TOML, or a bare string.

    Raises:
        ConfigError: If it has no key, or the key runs through a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"-s {override}: expected key=value, such as -s tuning.r=16.")
    *tables, last = key.strip().split(".")
    table = raw
    for depth, name in enumerate(tables, start=1):
        if ".".join(tables[:depth]) in SHORT and isinstance(table.get(name), str):
            table[name] = {"name": table[name]}
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"-s {override}: {name!r} is a value, not a table.")
    value = _value(text.strip())
    if last == "name" and ".".join(tables) in TAGGED and _name(table, ".".join(tables)) != value:
        table.clear()  # another plug-in: its options start from its own defaults
    if tables == ["data"] and last in ("name", "path"):
        table.pop("path" if last == "name" else "name", None)  # one replaces the other
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value


def _value(text: str) -> Any:
    """Return the TOML value of ``text``; a bare word is a string (so ``none`` is a name), ``unset`` removes the key."""
    if text == "unset":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentences(error: ValidationError, raw: Mapping[str, Any]) -> list[str]:
    found = []
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        key = ".".join(place)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(place[:-1], raw)
            hint = nearest(place[-1], known) or " Known: " + ", ".join(known) + "."
            found.append(f"Unknown key {key!r}.{hint}")
        elif problem["type"] == "value_error":
            found.append(f"{key}: {problem['ctx']['error']}." if key else f"{problem['ctx']['error']}.")
        elif problem["type"] == "model_type":
            found.append(
                f"{key} = {problem['input']!r}, expected a table of keys: write [{key}] and its keys, "
                f"or -s {key}.KEY=VALUE."
            )
        else:
            found.append(f"{key} = {problem['input']!r}, {_expected(problem)}{_default_of(place, raw)}.")
    return found


def _expected(problem: Mapping[str, Any]) -> str:
    """Return what a value of a wrong type or size should have been."""
    said, kind = str(problem["msg"]), str(problem["type"])
    if not said.startswith("Input should be "):
        return f"{said[:1].lower()}{said[1:]}"
    wanted = said.removeprefix("Input should be ")
    if kind.startswith(("greater_than", "less_than")):
        return f"expected a value {wanted}"
    return f"expected {wanted}{next((hint for start, hint in _HINTS.items() if kind.startswith(start)), '')}"


def _default_of(place: Sequence[str], raw: Mapping[str, Any]) -> str:
    """Return the default of a key as a remark, where it has one that can be shown."""
    field = getattr(_model_of(place[:-1], raw), "model_fields", {}).get(place[-1])
    if field is None or field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "; unset is the default"
    return f"; the default is {value!r}" if isinstance(value, (bool, int, float, str)) else ""


def _known_keys(place: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    return list(getattr(_model_of(place, raw), "model_fields", ()))


def _model_of(place: Sequence[str], raw: Mapping[str, Any]) -> Any:
    """Return the configuration table at ``place``, or None where there is none."""
    model: Any = RunConfig
    registries: dict[str, Registry[Any]] = {
        "partition": PARTITIONERS,
        "tuning": TUNINGS,
        "compression": CODECS,
        "downlink": CODECS,
        "mechanism": MECHANISMS,
        "aggregation": RULES,
        "tracking": TRACKERS,
    }
    for depth, name in enumerate(place):
        section = raw.get(name, {}) if isinstance(raw, Mapping) else {}
        raw = section
        if name in registries and isinstance(section, Mapping):
            model = registries[name].get(_name(section, ".".join(place[: depth + 1]))).config
        else:
            field = model.model_fields.get(name)
            model = field.annotation if field else None
        if not hasattr(model, "model_fields"):
            return None
    return model


def _name(table: Mapping[str, Any], place: str) -> str:
    """Return the ``name`` that a table picks, by default where it does not say."""
    model: Any = SHORT.get(place, RunConfig)
    default = model.model_fields[place.rpartition(".")[2]].get_default(call_default_factory=True)
    return str(table.get("name", getattr(default, "name", "")))


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


__all__ = ["RunConfig", "UnknownNameError", "differences", "load_config", "parse_config", "presets"]
