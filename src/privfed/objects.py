"""Objects that Python code hands over where a configuration has a path or a name.

The configuration then says ``object:<SHA-256 of the content>``, and whoever reads that name finds the object here as
long as someone holds its :class:`Handed`. Nothing is written into the run folder: another process has to be handed the
same object again, and the digest tells whether it is.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

PREFIX = "object:"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Handed:
    """Keeps an object findable by the name of its content.

    Attributes:
        name: ``object:`` and the SHA-256 of the content.
        value: What stands for the object where it is read.
    """

    name: str
    value: Any = field(repr=False)


_HANDED: weakref.WeakValueDictionary[str, Handed] = weakref.WeakValueDictionary()


def hand_over(digest: str, value: Any) -> Handed:
    """Make ``value`` findable under the digest of its content until the result is dropped."""
    name = PREFIX + digest
    handed = _HANDED.get(name)
    if handed is None:
        handed = _HANDED[name] = Handed(name=name, value=value)
    return handed


def is_object(name: str | None) -> bool:
    """Whether a name in a configuration stands for an object."""
    return name is not None and name.startswith(PREFIX)


def find(name: str) -> Any:
    """Return what was handed over under this name, or None if nobody holds it any more."""
    handed = _HANDED.get(name)
    return None if handed is None else handed.value


def short(name: str) -> str:
    """Return an object's name as messages show it."""
    return name[: len(PREFIX) + 12]
