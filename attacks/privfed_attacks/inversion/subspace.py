"""Embeddings moved towards the observed subspaces: the span attack for updates with noise in them.

Kalikman, Petrov, Dimitrov, Vechev 2026, "TIGER: Inverting Transformer Gradients via Embedding-Subspace Distance
Optimization", arXiv 2606.18312. A test of each token for itself fails once quantisation, sparsification or noise have
moved the span. A sum of distances over all positions and over several layers still has its least value near the truth,
and can be followed by its derivative from a continuous start.

As done here: every singular direction counts by how much of it is signal, s² / (s² + floor²) (a Wiener filter) instead
of all or nothing; each text starts from the tokens whose first-layer inputs are nearest at each position; embeddings
then follow the distance in the first and the second layer together; at the end they become the nearest of the first
few candidates. What noise is in an update is read off it (``privfed_attacks.text.spans.noise_of``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from privfed.table import Table
from privfed_attacks.inversion import ATTACKS, Attack, Reconstruction, Setting

if TYPE_CHECKING:
    from privfed_attacks.observation import Observation
    from privfed_attacks.public_model import PublicModel


class SubspaceConfig(Table):
    """Options.

    Attributes:
        steps: Steps of Adam on the embeddings.
        learning_rate: Of Adam.
        candidates: Tokens kept at each position.
        second: Weight of the second layer's distance.
    """

    name: Literal["subspace"] = "subspace"
    steps: int = Field(default=100, ge=0)
    learning_rate: float = Field(default=0.02, gt=0)
    candidates: int = Field(default=16, ge=1)
    second: float = Field(default=1.0, ge=0)


def run(
    observations: Sequence[Observation], model: PublicModel, setting: Setting, config: SubspaceConfig
) -> Reconstruction:
    """Return the texts whose inputs are nearest to the observed subspaces.

    Raises:
        ConfigError: If the number of examples is not known.
    """
    from privfed_attacks.text.subspace import Pull

    return Pull(observations, model, setting, config).reconstruct()


ATTACKS.register("subspace")(Attack(config=SubspaceConfig, run=run))
