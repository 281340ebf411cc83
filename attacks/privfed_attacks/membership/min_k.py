"""Min-K%++: of a text's tokens, how unlikely are the least likely ones?

Zhang et al. 2024, "Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models", arXiv
2404.02936, equations 3 and 4.
"""

from __future__ import annotations

import numpy as np

from privfed_attacks.membership import Floats, attack
from privfed_attacks.membership.signals import mean_of_lowest


@attack("min_k")
def min_k(
    token_logprobs_QT: Floats, token_means_QT: Floats, token_deviations_QT: Floats, *, share: float = 0.2
) -> Floats:
    """Return the mean of the lowest ``share`` of each text's standardised token log-probabilities.

    Each token's log-probability is standardised by mean and deviation over the vocabulary at its place. The adversary
    can run the released language model on the text and reads all logits.

    Args:
        token_logprobs_QT: NaN after a text's end.
        token_means_QT: Mean log-probability over the vocabulary.
        token_deviations_QT: Its standard deviation.
        share: Of the tokens; at least one is taken.

    Raises:
        ConfigError: If a text has no token, or ``share`` is not in (0, 1].
    """
    return mean_of_lowest((token_logprobs_QT - token_means_QT) / np.maximum(token_deviations_QT, 1e-12), share)
