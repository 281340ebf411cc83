"""Min-K% Prob: the mean log-probability of a text's least likely tokens.

Shi, Ajith, Xia, Huang, Liu, Blevins, Chen, Zettlemoyer 2024, "Detecting Pretraining Data from Large Language Models",
ICLR, arXiv 2310.16789, equation 1. The attack ``min_k`` sets each token beside the rest of the vocabulary; this one
needs no more than the probabilities of the text's own tokens, which interfaces to closed models give.
"""

from __future__ import annotations

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Floats, attack


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
    if not 0 < share <= 1:
        raise ConfigError(f"Expected a share of tokens in (0, 1], got {share}.")
    counts_Q = (~np.isnan(token_logprobs_QT)).sum(axis=1)
    if (counts_Q == 0).any():
        raise ConfigError(f"Text {int(np.argmin(counts_Q))} has no token to score.")
    taken_Q = np.maximum(1, np.floor(share * counts_Q)).astype(np.int64)
    sums_QT = np.nancumsum(np.sort(token_logprobs_QT, axis=1), axis=1)  # NaN sorts to the end
    return np.asarray(sums_QT[np.arange(len(taken_Q)), taken_Q - 1] / taken_Q, dtype=np.float64)
