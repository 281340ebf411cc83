"""The truth that an attack is scored against: membership bits, the texts, the labels. Attacks hold it closed.

A harness that plays a known batch seals it and hands the sealed value around beside the observations. What it holds is
in a table of this module, not in the object, so neither attributes nor the object graph lead to it, and it prints,
copies and pickles as nothing. Only the scoring modules import :func:`unseal`; ``tests/attacks`` reads the imports of
all others. This guards against leaks by mistake. Python has nothing that would stop one on purpose.
"""

from __future__ import annotations

from typing import Any, Generic, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

from privfed.errors import PrivfedError

T = TypeVar("T")


class SealedError(PrivfedError):
    """A sealed value was copied, compared or pickled."""


class Sealed(Generic[T]):
    """A value that is there to be scored against, and cannot be read from this object.

    Args:
        value: The truth.
    """

    __slots__ = ("__weakref__",)

    def __init__(self, value: T) -> None:
        _HELD[self] = value

    def __repr__(self) -> str:
        return "Sealed(...)"

    def __reduce__(self) -> NoReturn:
        raise SealedError("A sealed value cannot be copied or pickled: pass the object itself, in one process.")

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


_HELD: WeakKeyDictionary[Sealed[Any], Any] = WeakKeyDictionary()


def unseal(sealed: Sealed[T]) -> T:
    """Return what was sealed. For scorers only: modules named ``scor*`` of this package, and whoever owns the truth."""
    return cast(T, _HELD[sealed])
