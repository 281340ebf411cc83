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

from privfed.registry import Registry
from privfed.table import Table

if TYPE_CHECKING:
    from privfed_attacks.observation import Observation
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
        shape: (channels, height, width) of an image.
        seed: Of the attack's own random choices.
    """

    sequences: int | None = None
    max_tokens: int = 32
    lengths: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    auxiliary: tuple[str, ...] = ()
    shape: tuple[int, int, int] | None = None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A plug-in.

    Attributes:
        config: Its options.
        run: Maps (observations, model, setting, options) to a reconstruction.
        reads: What it reconstructs.
        server: What its server does: ``curious`` follows the protocol, ``malicious`` sends what it likes.
    """

    config: type[Table]
    run: Run
    reads: Literal["texts", "labels", "images"] = "texts"
    server: Literal["curious", "malicious"] = "curious"


ATTACKS: Registry[Attack] = Registry("attack", "privfed_attacks.inversion")
