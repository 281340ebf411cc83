"""The plug-in registry: one file a plug-in, no second list to keep.

A plug-in module registers itself with a decorator; the registry imports every module of its folder on the
first look-up. Plug-in modules keep torch, transformers and peft out of their top level, so that configuration
and budget questions are answered without loading them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from privfed.errors import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names mapped to plug-ins of one kind, filled from one package on first use.

    Args:
        kind: What a plug-in is called in messages, e.g. ``"codec"``.
        package: The package whose modules register themselves, e.g. ``"privfed.compression"``.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under ``name``.

        Raises:
            ValueError: If the name is taken (a programming error, found on import).
        """

        def decorate(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Return the plug-in called ``name``.

        Raises:
            UnknownNameError: If there is none; the message names the nearest.
        """
        self._load()
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def items(self) -> list[tuple[str, T]]:
        """Return all (name, plug-in) pairs, sorted by name."""
        return [(name, self._entries[name]) for name in self.names()]

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, prefix=f"{self.package}."):
            importlib.import_module(module.name)
        self._loaded = True
