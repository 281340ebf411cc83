"""Attack-R: is the query's loss low beside its losses on models that were not trained on it?

Ye et al. 2022, arXiv 2111.09679, Attack R.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from privfed_attacks.membership import Bits, Floats, attack
from privfed_attacks.membership.signals import in_and_out, masked_mean


@attack("reference")
def reference(losses_Q: Floats, reference_losses_KQ: Floats, reference_members_KQ: Bits) -> Floats:
    """Return the share of models without the query on which its loss is larger.

    The adversary can run the released model and has trained models of the same kind on data of the same
    distribution, at least one without each query. Ties, of which there are many with few models, are ordered by the
    mean difference of the losses.

    Raises:
        ConfigError: If a query is in all reference models.
    """
    outside = ~reference_members_KQ
    _, counts_Q = in_and_out(reference_members_KQ, needed="out")
    larger_Q = ((reference_losses_KQ > losses_Q) & outside).sum(axis=0)
    gap_Q = masked_mean(reference_losses_KQ, outside) - losses_Q
    found: Floats = (larger_Q + expit(gap_Q)) / (counts_Q + 1)
    return np.asarray(found, dtype=np.float64)
