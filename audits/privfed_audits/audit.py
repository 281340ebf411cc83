"""The audit of a run: for each view, what the best attack proves about epsilon, beside what the receipt claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.types import View

SCHEMA = 1


def audit(
    folder: Path,
    *,
    attacks: Sequence[str] | None = None,
    view: View | None = None,
    clients: int = 1,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Attack a finished run and write ``audit/audit.json`` into its folder."""
    raise NotImplementedError


def accounted_tradeoff(folder: Path, view: View) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (fpr, tpr): the largest true positive rate that the receipt's events allow at each false positive rate."""
    raise NotImplementedError
