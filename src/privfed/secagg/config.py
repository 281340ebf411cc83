"""The ``[secagg]`` table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from privfed.errors import ConfigError
from privfed.secagg.session import Requirements
from privfed.table import Table


class SecAggConfig(Table):
    """Secure aggregation.

    Attributes:
        name: ``masked``: the server sees only the sum; ``none``: it sees each client's update.
        dropped: Largest share of the cohort that may drop, at any stages, without losing the round.
        corrupt: Largest share of the cohort that may tell the server all they know.
        n_min: Fewest survivors that a client takes part in a sum of; unset: those that ``dropped`` leaves. With
            fewer the round is lost and nothing revealed.
        sigma: Bits of statistical security of the graph; matters for cohorts above 50, whose graph is not complete.
        server: ``malicious``: it may name anyone as dropped; ``curious``: who drops is random, so that large cohorts
            get a sparser graph. The protocol's checks are the same.
        ring_bits: Bits of a value on the wire: 16, 20, 24 or 32, or ``auto`` for what the codec needs.
    """

    name: Literal["masked", "none"] = "masked"
    dropped: float = Field(default=0.3, ge=0, lt=0.5)
    corrupt: float = Field(default=0.1, ge=0, lt=1)
    n_min: int | None = Field(default=None, ge=2)
    sigma: float = Field(default=40.0, ge=20, le=128)
    server: Literal["malicious", "curious"] = "malicious"
    ring_bits: Literal["auto", 16, 20, 24, 32] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _check_replaced(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "threshold" in raw:
            raise ValueError(
                f"secagg.threshold = {raw['threshold']!r} was replaced by secagg.dropped, the share that may drop: "
                "write dropped = 1 - threshold"
            )
        return raw

    @model_validator(mode="after")
    def _check_requirements(self) -> Self:
        try:
            self.requirements()
        except ConfigError as error:
            raise ValueError(str(error).removesuffix(".")) from error
        return self

    def masks(self) -> Callable[[int], bool] | None:
        """Return which sizes of a cohort a masked sum can be taken over; None where nothing is masked."""
        return self.requirements().met_by if self.name == "masked" else None

    def requirements(self) -> Requirements:
        """Return what a session has to stand."""
        return Requirements(
            dropped=self.dropped,
            corrupt=self.corrupt,
            n_min=self.n_min,
            sigma=self.sigma,
            server=self.server,
        )
