"""``privfed ls``: what can be chosen, from the registries and presets; no list is kept by hand."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from privfed.compression import CODECS
from privfed.config import presets
from privfed.data import PARTITIONERS, SOURCES
from privfed.data.canaries import CANARIES
from privfed.errors import unknown_name
from privfed.models import MODELS
from privfed.models.recipes import RECIPES
from privfed.privacy.mechanisms import MECHANISMS
from privfed.registry import Registry
from privfed.rules import RULES
from privfed.tracking import TRACKERS
from privfed.tuning import TUNINGS


def catalogue(kind: str | None) -> dict[str, dict[str, str]]:
    """Return {kind: {name: one line}} for one kind, or all.

    Raises:
        UnknownNameError: If there is no such kind.
    """
    if kind is None:
        return {name: listing() for name, listing in KINDS.items()}
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    return {kind: KINDS[kind]()}


def lines(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the listing as text."""
    out = []
    for kind, entries in found.items():
        out.append(f"{kind}:")
        out.extend(f"  {name:24}{text}" for name, text in entries.items())
    return out


def _plugins(registry: Registry[Any]) -> dict[str, str]:
    return {name: getattr(entry, "summary", "") or _first_line(_module_doc(entry)) for name, entry in registry.items()}


def _module_doc(entry: Any) -> str:
    """Return the docstring of the file that registered ``entry``: a plug-in is one file."""
    named = (getattr(entry, name, None) for name in ("apply", "build", "split", "train", "make"))
    function = next((found for found in named if found), entry)
    return importlib.import_module(inspect.unwrap(function).__module__).__doc__ or ""


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _presets() -> dict[str, str]:
    return {name: _first_line(text).lstrip("# ") for name, text in presets().items()}


def _mechanisms() -> dict[str, str]:
    return {
        "dp_sgd": 'privacy.unit = "example": clipped per-example gradients and Gaussian noise on each client',
        **{name: f'privacy.unit = "client": {line}' for name, line in _plugins(MECHANISMS).items()},
        "none": 'privacy.unit = "none": no guarantee',
    }


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "tunings": lambda: _plugins(TUNINGS),
    "codecs": lambda: _plugins(CODECS),
    "rules": lambda: _plugins(RULES),
    "mechanisms": _mechanisms,
    "accountants": lambda: {
        "pld": "privacy loss distributions (dp-accounting): tight; the default",
        "rdp": "Renyi differential privacy (dp-accounting): faster, 8 to 17 % larger epsilons",
    },
    "recipes": lambda: _plugins(RECIPES),
    "models": lambda: _plugins(MODELS),
    "data": lambda: _plugins(SOURCES),
    "partitioners": lambda: _plugins(PARTITIONERS),
    "canaries": lambda: _plugins(CANARIES),
    "trackers": lambda: _plugins(TRACKERS),
    "presets": _presets,
}
