"""The ``[privacy]`` table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from privfed.privacy.discrete.config import DistributedConfig
from privfed.privacy.mechanisms import MECHANISMS
from privfed.table import Table


def _mechanism(value: Any) -> Any:
    """Return the table of a mechanism that is given by its name alone, or by a table with a name."""
    if isinstance(value, Table):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"expected the name of a mechanism or a table with one, got {value!r}")
    name = value.get("name", "gaussian")
    if not isinstance(name, str):
        raise ValueError(f"name must be a string, got {name!r}")
    return MECHANISMS.get(name).config.model_validate(dict(value))


class PrivacyConfig(Table):
    """What is protected, how strongly and how it is counted.

    Attributes:
        unit: One ``example``, one ``client`` with all its data, or ``none`` (no guarantee at all).
        placement: Where noise is added: ``local`` (each client, DP-SGD), ``central`` (a trusted server, DP-FedAvg) or
            ``distributed`` (each client a share of the noise of the masked sum, in integers). Left out, it is
            ``local`` for examples and ``central`` for clients.
        distributed: How shares of the noise are made; read with ``placement = "distributed"`` only.
        mechanism: How a client's update is hidden under unit ``client``: ``gaussian``, or another by its name, or a
            table of its name and options (``[privacy.mechanism]``).
        target_epsilon: The budget of the whole run; the noise is solved for it.
        noise_multiplier: Standard deviation of the noise over the sensitivity; epsilon follows from it.
        target_delta: The delta at which epsilon is stated; should be well below 1 / number of units.
        l2_clip_norm: Bound on one example's gradient (unit example) or one client's update (unit client).
        accountant: ``pld`` (tight, default) or ``rdp`` (the one for, and default with, distributed noise).
        neighboring_relation: ``add_or_remove_one`` or ``replace_one``.
        reproducible_noise: Derive the noise from the seed. For tests only: the receipt then says *not private*.
    """

    unit: Literal["example", "client", "none"] = "example"
    placement: Literal["local", "central", "distributed"] | None = None
    distributed: DistributedConfig | None = None
    mechanism: Annotated[SerializeAsAny[Table], BeforeValidator(_mechanism)] = Field(
        default_factory=lambda: MECHANISMS.get("gaussian").config()
    )
    target_epsilon: float | None = None
    noise_multiplier: float | None = Field(default=None, gt=0)
    target_delta: float = Field(default=1e-5, gt=0, lt=1)
    l2_clip_norm: float = Field(default=1.0, gt=0)
    accountant: Literal["pld", "rdp"] = "pld"
    neighboring_relation: Literal["add_or_remove_one", "replace_one"] = "add_or_remove_one"
    reproducible_noise: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_distributed(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or raw.get("placement") != "distributed":
            return raw
        return {"accountant": "rdp", "distributed": {}, **raw}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target_epsilon is not None and self.target_epsilon <= 0:
            raise ValueError(
                f"target_epsilon is {self.target_epsilon}, expected a number above 0; "
                'for a run without privacy set unit = "none"'
            )
        if self.unit == "none":
            return self
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "neither target_epsilon nor noise_multiplier is given, expected exactly one of them; "
                'set target_epsilon = 8.0, or unit = "none" for a run without privacy'
            )
        if self.target_epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(
                f"target_epsilon = {self.target_epsilon:g} and noise_multiplier = {self.noise_multiplier:g} are both "
                "given, expected exactly one of them; unset the other (-s privacy.target_epsilon=unset)"
            )
        wanted = "local" if self.unit == "example" else "central"
        if self.is_distributed:
            self._check_distributed()
        elif self.distributed is not None:
            raise ValueError(
                f"the table distributed is given with placement = {self.placement or wanted!r}, which does not read "
                'it; use placement = "distributed", or remove the table'
            )
        elif self.placement not in (None, wanted):
            raise ValueError(
                f"unit = {self.unit!r} with placement = {self.placement!r} is not available; "
                f"the nearest that works is placement = {wanted!r}"
            )
        if self.unit == "example" and self.mechanism_name != "gaussian":
            raise ValueError(
                f'mechanism = {self.mechanism_name!r} with unit = "example" is not available: it hides whole clients; '
                'use mechanism = "gaussian", or unit = "client"'
            )
        return self

    def _check_distributed(self) -> None:
        if self.accountant != "rdp":
            raise ValueError(
                f'accountant = {self.accountant!r} with placement = "distributed": integer noise is proved by Renyi '
                'divergences only; use accountant = "rdp"'
            )
        if self.mechanism_name != "gaussian":
            raise ValueError(
                f'mechanism = {self.mechanism_name!r} with placement = "distributed" is not available: shares of noise '
                'are independent in each round; remove it, or use placement = "central"'
            )

    @property
    def is_distributed(self) -> bool:
        """True where clients add the noise of their masked sum in shares."""
        return self.on and self.placement == "distributed"

    @property
    def placed(self) -> Literal["local", "central", "distributed"]:
        """Where noise is added, also where it follows from the unit."""
        return self.placement or ("central" if self.unit == "client" else "local")

    @property
    def mechanism_name(self) -> str:
        """The mechanism's name."""
        return str(getattr(self.mechanism, "name", ""))

    @property
    def on(self) -> bool:
        """True where the run has a guarantee to account for."""
        return self.unit != "none"
