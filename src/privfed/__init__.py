"""privfed: private federated fine-tuning of foundation models.

``train`` and ``load_run`` are loaded when they are first asked for: ``import privfed`` loads next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privfed.api import Run, load_run, train

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_run", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'privfed' has no attribute {name!r}")
    from privfed import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
