"""The referee: sets what attacks got against what the ledger claims.

``audit`` and ``curves`` are what ``privfed audit`` and ``privfed curves`` run; they are loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privfed_audits.api import audit, curves

__all__ = ["audit", "curves"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'privfed_audits' has no attribute {name!r}")
    from privfed_audits import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
