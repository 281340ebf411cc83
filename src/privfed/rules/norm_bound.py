"""Norm bound: cuts long updates down to a limit, or leaves them out, and averages.

Sun et al. 2019, "Can You Really Backdoor Federated Learning?", arXiv 1911.07963, section 4: an update x counts as
x / max(1, |x| / limit) (``clip``), or not at all beyond the limit (``filter``). Without a limit of its own, a round
takes a multiple of the median of its norms, which fewer than half of the updates cannot move beyond honest norms.

Shape suffixes: K updates of a round, M values of an update.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from privfed.errors import RoundError
from privfed.rules import RULES
from privfed.rules.robust import Float64, Robust
from privfed.table import Table


class NormBoundConfig(Table):
    """Options.

    Attributes:
        action: ``clip`` scales a longer update down to the limit, ``filter`` leaves it out.
        max_norm: The limit; unset: ``factor`` times the median of the round's norms.
        factor: Read where ``max_norm`` is unset. To clip, 1 lets a wrong update count least; to filter, 1 would leave
            out half of the honest ones.
    """

    name: Literal["norm_bound"] = "norm_bound"
    action: Literal["clip", "filter"] = "clip"
    max_norm: float | None = Field(default=None, gt=0)
    factor: float = Field(default=1.5, ge=1)


@RULES.register("norm_bound")
class NormBound(Robust):
    """Averages what is within a norm."""

    config = NormBoundConfig

    def __init__(self, options: NormBoundConfig | None = None) -> None:
        super().__init__(options or NormBoundConfig())

    def combined(self, updates_KM: Float64) -> Float64:
        """Return the average.

        Raises:
            RoundError: If every update is beyond the limit and left out.
        """
        norms_K = np.linalg.norm(updates_KM, axis=1)
        limit = self.options.max_norm or self.options.factor * float(np.median(norms_K))
        if self.options.action == "clip":
            # where the limit is 0 so are all norms that count: 1 keeps 0 / 0 out
            scales_K = np.minimum(1.0, limit / np.where(norms_K > 0, norms_K, 1.0))
            return np.asarray((scales_K[:, None] * updates_KM).mean(axis=0))
        within_K = norms_K <= limit
        if not within_K.any():
            raise RoundError(
                f"all {len(norms_K)} updates are longer than server.aggregation.max_norm = {limit:g}; raise it"
            )
        return np.asarray(updates_KM[within_K].mean(axis=0))
