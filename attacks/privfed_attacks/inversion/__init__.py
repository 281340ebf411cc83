"""Gradient inversion: from updates back to the data. One file an attack, registered in ``ATTACKS``.

An attack is a function of observations, the adversary's own copy of the model and a setting; it returns a
:class:`Reconstruction`. Whether that is any good is for ``privfed_attacks.scoring`` to say, which alone has the truth,
and only beside what the attack ``prior`` guesses without any update.

Plug-in modules keep torch out of their top level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.registry import Registry
from privfed.table import Table

if TYPE_CHECKING:
    from privfed_attacks.observation import Observation, ThreatModel
    from privfed_attacks.public_model import PublicModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What an adversary knows about the batch, as the literature lets it.

    Attributes:
        sequences: How many examples are in what was observed (all rounds show the same); None if not known.
        max_tokens: The most tokens that an example has, with special ones.
        lengths: How many tokens each example has, with special ones; None if not known.
        labels: The examples' labels; None if not known.
        auxiliary: Texts from elsewhere, for a prior.
        images: Pictures from elsewhere as the model reads them [N, C, H, W], for a prior; None without.
        seed: Of the attack's own random choices.
    """

    sequences: int | None = None
    max_tokens: int = 32
    lengths: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    auxiliary: tuple[str, ...] = ()
    images: NDArray[np.float32] | None = field(default=None, repr=False)
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """What an attack says the data were.

    Attributes:
        tokens: Tokens that it says are there, without special ones.
        sequences: Texts as token ids, with special ones; empty if the attack finds tokens only.
        labels: Examples by class; empty if the attack does not look for them.
        images: Pictures [N, C, H, W] as the model reads them; None for texts.
        facts: What it found on the way, for the report.
    """

    tokens: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = ()
    labels: Mapping[int, int] = field(default_factory=dict)
    images: NDArray[np.float32] | None = field(default=None, repr=False)
    facts: Mapping[str, float | int | str] = field(default_factory=dict)


Run = Callable[[Sequence["Observation"], "PublicModel", Setting, Any], Reconstruction]
Craft = Callable[["PublicModel", Setting, Any], Mapping[str, NDArray[np.float32]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A plug-in.

    Attributes:
        config: Its options.
        run: Maps (observations, model, setting, options) to a reconstruction.
        reads: What it reconstructs.
        craft: What a malicious server puts in place of trained tensors before it broadcasts them, by name; None for an
            attack whose server follows the protocol and only looks.
    """

    config: type[Table]
    run: Run
    reads: Literal["texts", "labels", "images"] = "texts"
    craft: Craft | None = None

    @property
    def server(self) -> Literal["curious", "malicious"]:
        """Whether the server sends what the protocol says."""
        return "curious" if self.craft is None else "malicious"

    def broadcast(
        self, threat: ThreatModel, model: PublicModel, setting: Setting, options: Any
    ) -> Mapping[str, NDArray[np.float32]]:
        """Return the tensors that this adversary broadcasts in place of the right ones; none if it only looks.

        Raises:
            ConfigError: If the attack has to change the broadcast and the threat model does not let it.
        """
        if self.craft is None:
            return {}
        if "broadcast" not in threat.can_modify:
            raise ConfigError(
                f"The attack {getattr(options, 'name', '')!r} is a malicious server's, which changes what it "
                'broadcasts: declare ThreatModel(can_modify=frozenset({"broadcast"})), or take one that only looks.'
            )
        return self.craft(model, setting, options)


ATTACKS: Registry[Attack] = Registry("attack", "privfed_attacks.inversion")
