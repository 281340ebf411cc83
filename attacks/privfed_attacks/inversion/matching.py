"""Gradient matching: dummy embeddings whose simulated update is the observed one.

* ``l2``: Zhu, Liu, Han 2019, "Deep Leakage from Gradients", NeurIPS, arXiv 1906.08935 (DLG).
* ``tag``: Deng et al. 2021, "TAG: Gradient Attack on Transformer-based Language Models", EMNLP Findings,
  arXiv 2103.06819: L2 plus a share of L1.
* ``cosine``: Geiping et al. 2020, "Inverting Gradients", NeurIPS, arXiv 2003.14053: one minus the cosine.

To each can be added what Balunović et al. 2022, "LAMP: Extracting Text from Gradients with Language Model Priors",
NeurIPS, arXiv 2202.08827, adds: a penalty that keeps embeddings as long as those of words are (``norm_weight``), and
moves of whole tokens between steps of the continuous search (``moves``), which are scored by the gradient loss. LAMP
scores them by a language model's perplexity too; here a bigram model of the auxiliary texts takes its place.

Local training is simulated step by step (FedAvg), every observed round counts, and at the end each position is tried
with the nearest few words, by the gradient loss itself (``polish``).

Nothing here needs an outer-product gradient: this is the attack for BitFit and prompts.
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


class MatchingConfig(Table):
    """Options.

    Attributes:
        objective: What is made small.
        steps: Steps of Adam on the embeddings.
        learning_rate: Of Adam, decaying to a tenth.
        l1: Weight of L1 in ``tag``.
        norm_weight: Weight of the penalty on the embeddings' length; 0 for none.
        starts: Random starts, of which the one with the least loss goes on.
        moves: Discrete moves tried each time; 0 for none.
        move_every: Steps between them.
        prior_weight: Weight of the bigram model in scoring moves.
        polish: Nearest words that are tried at each position at the end; 0 for none.
        rounds: At most so many observed rounds are matched, the last ones.
    """

    name: Literal["matching"] = "matching"
    objective: Literal["l2", "tag", "cosine"] = "cosine"
    steps: int = Field(default=300, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)
    l1: float = Field(default=0.01, ge=0)
    norm_weight: float = Field(default=0.1, ge=0)
    starts: int = Field(default=4, ge=1)
    moves: int = Field(default=0, ge=0)
    move_every: int = Field(default=75, ge=1)
    prior_weight: float = Field(default=0.02, ge=0)
    polish: int = Field(default=8, ge=0)
    rounds: int = Field(default=3, ge=1)


def run(
    observations: Sequence[Observation], model: PublicModel, setting: Setting, config: MatchingConfig
) -> Reconstruction:
    """Return the texts whose simulated updates are nearest to the observed ones.

    Labels are recovered from the gradient of the classifier's bias where they are not given.

    Raises:
        ConfigError: If the number of examples or the local training is not known, or the model has no classifier.
    """
    from privfed_attacks.text.matching import Matcher

    return Matcher(observations, model, setting, config).reconstruct()


ATTACKS.register("matching")(Attack(config=MatchingConfig, run=run))
