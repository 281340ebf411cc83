"""Membership inference: was this example (or this client) in the training data?

One file an attack. Each is a pure function from arrays to one score a query, higher for "member", registered under
its name; what it takes by position is exactly what its adversary has to have, and is a field of :class:`Evidence`.
Settings are keyword-only and have defaults. Nothing here sees a membership bit: only the scorer does.

Shape suffixes: Q queries, Z population examples (known not to be members), K reference (shadow) models, R rounds,
C clients, D trained values, T tokens, H hidden width, F features, M rows of an update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.registry import Registry

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]
Score = TypeVar("Score", bound=Callable[..., Floats])


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What an adversary has in hand, as arrays; None for what it has not.

    Attributes:
        losses_Q: Cross-entropy of each query on the attacked model [nats].
        labels_Q: Class of each query.
        features_QF: What describes a query without the attacked model, such as the frozen base's features.
        population_losses_Z: Losses on the attacked model of examples that are known not to be members.
        population_labels_Z: Their classes.
        population_features_ZF: Their features.
        reference_losses_KQ: Losses of the queries on models that the adversary trained itself.
        reference_members_KQ: Which query each of those was trained on.
        reference_population_losses_KZ: Losses of the population on them; none of them was trained on it.
        token_logprobs_QT: Log-probability of each token of a text, NaN after its end.
        token_means_QT: Mean over the vocabulary of the log-probability there, under the model's own distribution.
        token_deviations_QT: Standard deviation of the same.
        updates_RD: What was seen of each round: new minus old parameters, of one client, a sum or the global model.
        gradients_RQD: Gradient of each query's loss at the parameters that the round started from.
        known_RD: The part of ``updates_RD`` that the adversary knows to come from elsewhere.
        client_updates_RCD: Every client's update.
        target_client: Which of the C clients is attacked.
        subspace_MH: Rows of updates of a first layer's matrix, of one or more rounds stacked.
        inputs_QTH: What the layer's input would be for each query's tokens; rows of zeros after the text's end.
        canaries_QD: Directions that were, or were not, sent as a client's update.
    """

    losses_Q: Floats | None = field(default=None, repr=False)
    labels_Q: NDArray[np.int64] | None = field(default=None, repr=False)
    features_QF: Floats | None = field(default=None, repr=False)
    population_losses_Z: Floats | None = field(default=None, repr=False)
    population_labels_Z: NDArray[np.int64] | None = field(default=None, repr=False)
    population_features_ZF: Floats | None = field(default=None, repr=False)
    reference_losses_KQ: Floats | None = field(default=None, repr=False)
    reference_members_KQ: Bits | None = field(default=None, repr=False)
    reference_population_losses_KZ: Floats | None = field(default=None, repr=False)
    token_logprobs_QT: Floats | None = field(default=None, repr=False)
    token_means_QT: Floats | None = field(default=None, repr=False)
    token_deviations_QT: Floats | None = field(default=None, repr=False)
    updates_RD: Floats | None = field(default=None, repr=False)
    gradients_RQD: Floats | None = field(default=None, repr=False)
    known_RD: Floats | None = field(default=None, repr=False)
    client_updates_RCD: Floats | None = field(default=None, repr=False)
    target_client: int | None = None
    subspace_MH: Floats | None = field(default=None, repr=False)
    inputs_QTH: Floats | None = field(default=None, repr=False)
    canaries_QD: Floats | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class MembershipAttack:
    """A score function and what its signature says about the adversary.

    Attributes:
        function: Takes fields of :class:`Evidence` by position and returns one score a query [Q].
    """

    function: Callable[..., Floats]

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of :class:`Evidence` that the adversary must have."""
        return tuple(p.name for p in self._positional() if p.default is p.empty)

    @property
    def uses(self) -> tuple[str, ...]:
        """Fields that it also makes use of where it has them."""
        return tuple(p.name for p in self._positional() if p.default is not p.empty)

    def missing(self, evidence: Evidence) -> tuple[str, ...]:
        """Return the needed fields that ``evidence`` lacks."""
        return tuple(name for name in self.needs if getattr(evidence, name) is None)

    def score(self, evidence: Evidence, **settings: Any) -> Floats:
        """Return one score a query [Q], higher for "member".

        Args:
            evidence: What the adversary has.
            settings: The function's keyword-only arguments.

        Raises:
            ConfigError: If the evidence lacks what the attack needs, or a score is not a number.
        """
        missing = self.missing(evidence)
        if missing:
            name = self.function.__name__
            raise ConfigError(
                f"The attack {name!r} needs {', '.join(missing)}, which this adversary does not have: choose another "
                "attack, or a view that shows it."
            )
        given = [getattr(evidence, name) for name in (*self.needs, *self.uses)]
        scores_Q = np.asarray(self.function(*given, **settings), dtype=np.float64)
        if np.isnan(scores_Q).any():
            raise ConfigError(f"The attack {self.function.__name__!r} gave scores that are not numbers: its input did.")
        return scores_Q

    def _positional(self) -> list[inspect.Parameter]:
        found = inspect.signature(self.function).parameters.values()
        return [p for p in found if p.kind is not p.KEYWORD_ONLY]


MEMBERSHIP: Final[Registry[MembershipAttack]] = Registry("membership attack", __name__)


def attack(name: str) -> Callable[[Score], Score]:
    """Return a decorator that registers a score function as the attack ``name``.

    Raises:
        ValueError: If one of its positional parameters is no field of :class:`Evidence` (a programming error).
    """

    def decorate(function: Score) -> Score:
        entry = MembershipAttack(function)
        unknown = [n for n in (*entry.needs, *entry.uses) if n not in Evidence.__dataclass_fields__]
        if unknown:
            raise ValueError(f"The attack {name!r} takes {unknown[0]!r}, which is no field of Evidence.")
        MEMBERSHIP.register(name)(entry)
        return function

    return decorate
