"""Min-K% Prob: the mean log-probability of a text's least likely tokens.

Shi, Ajith, Xia, Huang, Liu, Blevins, Chen, Zettlemoyer 2024, "Detecting Pretraining Data from Large Language Models",
ICLR, arXiv 2310.16789, equation 1. The attack ``min_k`` sets each token beside the rest of the vocabulary; this one
needs no more than the probabilities of the text's own tokens, which interfaces to closed models give.
"""

from __future__ import annotations

from privfed_attacks.membership import Floats, attack
from privfed_attacks.membership.signals import mean_of_lowest


@attack("min_k_prob")
def min_k_prob(token_logprobs_QT: Floats, *, share: float = 0.2) -> Floats:
    """Return the mean of the lowest ``share`` of each text's token log-probabilities.

    The adversary is told the probability of each token of a text that it gives, and sees no other.

    Args:
        token_logprobs_QT: NaN after a text's end.
        share: Of the tokens; at least one is taken.

    Raises:
        ConfigError: If a text has no token, or ``share`` is not in (0, 1].
    """
    return mean_of_lowest(token_logprobs_QT, share)
