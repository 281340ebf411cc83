"""FedMIA: the cosine of a query's gradient with its client's update, beside that with all other clients' updates.

Zhu et al. 2025, "FedMIA: An Effective Membership Inference Attack Exploiting the 'All for One' Principle in Federated
Learning", arXiv 2402.06289: in every round the other clients, which do not have the query, are the sample of "out".
The paper adds up probabilities; here rounds are combined by the sum of their normal deviates over sqrt(R) (Stouffer),
which orders queries also where probabilities round to 1.
"""

from __future__ import annotations

import math

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Floats, attack
from privfed_attacks.membership.gradient_dot import check_rounds, unit

LEAST_OTHERS = 3


@attack("fed_cosine")
def fed_cosine(client_updates_RCD: Floats, gradients_RQD: Floats, target_client: int) -> Floats:
    """Return how far the target client's cosine lies above those of the others, over all rounds.

    The adversary is a server without secure aggregation: it sees every client's update, and can compute the query's
    gradient at the parameters that were broadcast. It supposes that the query is in no other client's data.

    Args:
        client_updates_RCD: New minus old parameters.
        gradients_RQD: Gradients of the queries' losses.
        target_client: Whose data the query may be in.

    Raises:
        ConfigError: With fewer than three other clients, or where shapes do not fit.
    """
    others = np.arange(client_updates_RCD.shape[1]) != target_client
    if others.sum() < LEAST_OTHERS:
        raise ConfigError(
            f"FedMIA takes the other clients as its sample of non-members: expected at least {LEAST_OTHERS}, got "
            f"{int(others.sum())}; use the attack 'update_cosine'."
        )
    check_rounds(client_updates_RCD[:, 0], gradients_RQD)
    cosines_RCQ = -np.einsum("rcd,rqd->rcq", unit(client_updates_RCD), unit(gradients_RQD))
    mean_RQ = cosines_RCQ[:, others].mean(axis=1)
    spread_RQ = cosines_RCQ[:, others].std(axis=1, ddof=1)
    z_RQ = (cosines_RCQ[:, target_client] - mean_RQ) / np.maximum(spread_RQ, 1e-12)
    return np.asarray(z_RQ.sum(axis=0) / math.sqrt(len(z_RQ)), dtype=np.float64)


@attack("update_cosine")
def update_cosine(updates_RD: Floats, gradients_RQD: Floats) -> Floats:
    """Return the mean over rounds of minus the cosine between update and gradient.

    The same adversary where it sees one update a round only: of a single client, a sum, or a change of the model
    (Li, Li and Ribeiro 2023, "Effective passive membership inference attacks in federated learning against
    overparameterized models"; the measure that FedMIA builds on).
    """
    check_rounds(updates_RD, gradients_RQD)
    cosines_RQ = -np.einsum("rd,rqd->rq", unit(updates_RD), unit(gradients_RQD))
    return np.asarray(cosines_RQ.mean(axis=0), dtype=np.float64)
