"""What several attacks compute from logits and losses.

Shape suffixes: Q queries, K reference models, C classes, T tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from privfed.errors import ConfigError
from privfed_attacks.membership import Bits, Floats

_SMALLEST = 1e-300
_UNTOLD = 2.0**-25
_LARGEST = 700.0


def losses(logits_QC: Floats, labels_Q: np.ndarray) -> Floats:
    """Return the cross-entropy of each query [Q] in nats, in float64 and exact for confident models.

    ``log(1 + sum over the other classes of exp(logit - logit of the label))``: no 1 - p is formed, so a loss of 1e-30
    stays 1e-30 and does not become 0.

    Args:
        logits_QC: At least two classes.
        labels_Q: The classes.
    """
    logits = np.array(logits_QC, dtype=np.float64)
    rows = np.arange(len(logits))
    margins = logits - logits[rows, labels_Q][:, None]
    margins[rows, labels_Q] = -np.inf
    return np.asarray(np.logaddexp(0.0, logsumexp(margins, axis=1)), dtype=np.float64)


def logit_confidence(losses_any: Floats) -> Floats:
    """Return phi = log(p / (1 - p)) for p = exp(-loss): -log(exp(loss) - 1) (Carlini et al. 2022, equation 4).

    Its distribution over models is near a Gaussian, that of the loss is not. A loss of exactly 0 comes from a float32
    model that was too sure to say more: it is taken as half of what float32 can tell from 0, since one infinite phi
    would drown all variances.
    """
    found = np.clip(np.where(losses_any == 0, _UNTOLD, losses_any), _SMALLEST, _LARGEST)
    return np.asarray(-np.log(np.expm1(found)), dtype=np.float64)


def in_and_out(members_KQ: Bits, *, needed: str) -> tuple[Floats, Floats]:
    """Return how many models had each query in and out of their training data [Q].

    Args:
        members_KQ: The in/out matrix.
        needed: ``"both"``: at least one of each; ``"out"``: at least one without it.

    Raises:
        ConfigError: If some query has too few.
    """
    inside = members_KQ.sum(axis=0).astype(np.float64)
    outside = len(members_KQ) - inside
    least = outside if needed == "out" else np.minimum(inside, outside)
    if (least < 1).any():
        which = "without it" if needed == "out" else "with it and one without"
        raise ConfigError(
            f"Query {int(np.argmin(least))} has no reference model {which}: train references by an in/out matrix that "
            "puts each query in half of them (privfed_attacks.shadows.in_out_matrix)."
        )
    return inside, outside


def masked_mean(values_KQ: Floats, mask_KQ: Bits) -> Floats:
    """Return the mean over the models that ``mask_KQ`` picks [Q]; 0 where it picks none."""
    counts = mask_KQ.sum(axis=0)
    return np.asarray(np.where(mask_KQ, values_KQ, 0.0).sum(axis=0) / np.maximum(counts, 1), dtype=np.float64)


def token_statistics(logits_TV: Floats, tokens_T: np.ndarray) -> tuple[Floats, Floats, Floats]:
    """Return each token's log-probability, and mean and deviation over the vocabulary there [T].

    Args:
        logits_TV: The logits that predict each token.
        tokens_T: The tokens.
    """
    logits = np.asarray(logits_TV, dtype=np.float64)
    logprobs = logits - logsumexp(logits, axis=1, keepdims=True)
    weights = np.exp(logprobs)
    means = (weights * logprobs).sum(axis=1)
    variances = (weights * np.square(logprobs - means[:, None])).sum(axis=1)
    return logprobs[np.arange(len(tokens_T)), tokens_T], means, np.sqrt(variances)


def mean_of_lowest(scores_QT: Floats, share: float) -> Floats:
    """Return the mean of the lowest ``share`` of each text's token scores [Q].

    Args:
        scores_QT: NaN after a text's end.
        share: Of the tokens; at least one is taken.

    Raises:
        ConfigError: If a text has no token, or ``share`` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"Expected a share of tokens in (0, 1], got {share}.")
    counts_Q = (~np.isnan(scores_QT)).sum(axis=1)
    if (counts_Q == 0).any():
        raise ConfigError(f"Text {int(np.argmin(counts_Q))} has no token to score.")
    taken_Q = np.maximum(1, np.floor(share * counts_Q)).astype(np.int64)
    sums_QT = np.nancumsum(np.sort(scores_QT, axis=1), axis=1)  # NaN sorts to the end
    return np.asarray(sums_QT[np.arange(len(taken_Q)), taken_Q - 1] / taken_Q, dtype=np.float64)
