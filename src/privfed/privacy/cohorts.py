"""How likely a cohort drawn at random is one that no masked sum can be taken over."""

from __future__ import annotations

import math
from collections.abc import Callable

Masks = Callable[[int], bool]
"""Whether a masked sum can be taken over a cohort of so many clients."""

_DEVIATIONS = 14.0
_AT_LEAST = 200  # so that no tail beyond the searched sizes matters where the expected size is small


def unmaskable(others: int, probability: float, masks: Masks) -> float:
    """Return the probability that whether a round is masked could depend on the protected client, or that it is not.

    The other clients are Poisson-sampled; the event is that a cohort of them, alone or with one more client, cannot be
    masked. It does not depend on the protected client's own draw: outside of it the round goes through either way.

    Args:
        others: Clients that are sampled beside the protected one.
        probability: Probability of each.
        masks: Which sizes can be masked.
    """
    if probability >= 1 or others < 1:
        return float(not (masks(others) and masks(others + 1)))
    from scipy.special import bdtr, bdtrc  # a second of start-up, for runs that need it

    mean = others * probability
    reach = max(_AT_LEAST, math.ceil(_DEVIATIONS * math.sqrt(mean * (1 - probability))))
    first, last = max(0, math.floor(mean) - reach), min(others, math.ceil(mean) + reach)
    beyond = float(bdtr(first - 1, others, probability)) if first else 0.0
    beyond += float(bdtrc(last, others, probability)) if last < others else 0.0
    sound = {size: masks(size) for size in range(first, last + 2)}
    lost = [size for size in range(first, last + 1) if not (sound[size] and sound[size + 1])]
    return min(1.0, beyond + math.fsum(_mass(size, others, probability) for size in lost))


def _mass(size: int, clients: int, probability: float) -> float:
    """Return the binomial probability of ``size``."""
    ways = math.lgamma(clients + 1) - math.lgamma(size + 1) - math.lgamma(clients - size + 1)
    return math.exp(ways + size * math.log(probability) + (clients - size) * math.log1p(-probability))
