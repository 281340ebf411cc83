"""From integer noise to epsilon: Renyi composition, Poisson sampling, what the samplers and the rounding add to delta.

Sampling. For integer orders and add-or-remove neighbours the divergence of a Poisson-sampled mechanism is bounded
by the binomial expansion of E_Q[(1 - q + q P/Q)^alpha], P and Q being the noise with and without the unit's shift.
That covers D(mixture || Q). The other direction, D(Q || mixture), is never larger here (Mironov, Talwar and Zhang
2019, arXiv 1908.10530, Theorem 5): a reflection swaps P and Q, since the noise is symmetric. Proof for one pair of
points with likelihood ratios t >= 1 and 1/t: with u = 1 - q + q t and v = 1 - q + q/t, the difference of the two
moments is g(u) + t g(v) with g(z) = z^alpha - z^(1 - alpha) = 2 sqrt(z) sinh(c ln z), c = alpha - 1/2. It is 0 at
alpha = 1; since u v >= 1, sinh(c ln u) / sinh(c ln(1/v)) does not fall as c grows, so it is never below 0 for alpha
above 1. So neither the factor 3 of Zhu and Wang 2019 (Theorem 5) nor the conditions of their Theorem 6 are needed.

Neighbours. A unit's data is there or not; *its client's share of the noise is there in both cases*. For a
client-level unit this means: the client takes part with an update of zeros. Whether it takes part at all is not
hidden by the noise.

Sampling is an assumption of whoever sets ``sampling_probability`` below 1: that the adversary does not know who or
what was sampled, and that the noise does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gammaln

from privfed.errors import ConfigError
from privfed.privacy.discrete.discrete_gaussian import discrete_gaussian_rdp
from privfed.privacy.discrete.laws import LawName
from privfed.privacy.discrete.skellam import skellam_rdp
from privfed.types import Relation, Unit

Curve = Callable[[NDArray[np.int64]], NDArray[np.float64]]

ORDERS = np.array([*range(2, 257), *range(272, 1025, 16)], dtype=np.int64)
MORE_ORDERS = np.array([1536, 2048, 4096, 8192, 16384, 65536], dtype=np.int64)
"""Used too where nothing is sampled, which costs nothing."""
ROUND_OFF = 1e-11
"""Added to the logarithm of each sampled moment, ten times its error in double precision: sums of tiny steps stay
bounds."""


class Accountable(Protocol):
    """What can be composed here: steps of symmetric noise, known by their Renyi divergences; see ``DiscreteEvent``."""

    @property
    def unit(self) -> Unit: ...

    @property
    def relation(self) -> Relation: ...

    @property
    def sampling_probability(self) -> float: ...

    @property
    def steps(self) -> int: ...

    @property
    def rounding_delta(self) -> float: ...

    @property
    def sampler_distance(self) -> float: ...

    def curve(self, orders: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the Renyi divergences of one step without sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscreteEvent:
    """What happened to one unit's data: ``steps`` sums of integers with integer noise.

    Attributes:
        mechanism: Law of each share of the noise.
        variance: Of the *honest* noise of the sum, in steps squared: what the adversary cannot subtract.
        shares: Honest shares of equal variance in it.
        length: M, the coordinates.
        l1: Bound on the L1 norm of what one unit adds, in steps.
        l2: Bound on its L2 norm.
        unit: What one neighbouring data set adds or removes.
        sampling_probability: Probability with which each unit takes part in a step, by Poisson sampling.
        steps: How often the mechanism ran.
        relation: ``replace_one`` doubles both norms, and excludes sampling.
        rounding_delta: Probability, a step, that rounding passed ``l2``.
        sampler_distance: Bound on the total-variation distance, a step, of all the noise to its exact law.
    """

    mechanism: LawName
    variance: float
    shares: int
    length: int
    l1: float
    l2: float
    unit: Unit
    sampling_probability: float = 1.0
    steps: int = 1
    relation: Relation = "add_or_remove_one"
    rounding_delta: float = 0.0
    sampler_distance: float = 0.0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for values out of range."""
        if not 0 < self.sampling_probability <= 1:
            raise ConfigError(f"Expected a sampling probability in (0, 1], got {self.sampling_probability}.")
        if self.steps < 0:
            raise ConfigError(f"Expected at least 0 steps, got {self.steps}.")
        if self.relation not in ("add_or_remove_one", "replace_one"):
            raise ConfigError(f"Expected 'add_or_remove_one' or 'replace_one', got the relation {self.relation!r}.")
        if self.relation == "replace_one" and self.sampling_probability < 1:
            raise ConfigError(
                "Integer noise under Poisson sampling is not accounted for replace_one neighbours: take "
                "add_or_remove_one, or no sampling."
            )

    def curve(self, orders: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the Renyi divergences of one step without sampling."""
        factor = 2 if self.relation == "replace_one" else 1
        l1, l2 = factor * self.l1, factor * self.l2
        if self.mechanism == "skellam":
            return skellam_rdp(orders, self.variance, l1, l2)
        share = self.variance / self.shares if self.shares else 0.0
        return discrete_gaussian_rdp(orders, share, self.shares, self.length, l1, l2)


def sampled_rdp(orders: NDArray[np.int64], sampling_probability: float, curve: Curve) -> NDArray[np.float64]:
    """Return the Renyi divergences of a mechanism with symmetric noise under Poisson sampling; see the module.

    Args:
        orders: Integers above 1.
        sampling_probability: q; 1 gives the curve itself.
        curve: The mechanism's own divergences (or bounds of them) at an array of integer orders.
    """
    plain = curve(orders)
    q = sampling_probability
    if q == 1 or not np.isfinite(plain).all():
        return plain
    k = np.arange(int(orders.max()) + 1, dtype=np.float64)
    log_factorial = gammaln(k + 1)
    log_moments = -log_factorial + k * (math.log(q) - math.log1p(-q))
    log_moments[2:] += (k[2:] - 1) * curve(np.arange(2, k.size))
    result = np.empty(orders.size)
    for i, order in enumerate(orders.tolist()):
        terms = log_moments[: order + 1] - log_factorial[order::-1]
        peak = float(terms.max())
        log_sum = peak + math.log(float(np.exp(terms - peak).sum()))
        result[i] = max(0.0, log_sum + float(log_factorial[order]) + order * math.log1p(-q) + ROUND_OFF) / (order - 1)
    return np.minimum(result, plain)


def epsilon(events: Sequence[Accountable], delta: float) -> float:
    """Return the epsilon at ``delta`` of all ``events`` composed; infinity where it is not bounded.

    ``delta`` pays first for rounding that passed its bound (a union bound over the steps), then (1 + exp(epsilon))
    times for the distance of the samplers to their laws, and the rest goes to the conversion from Renyi divergences
    (Canonne, Kamath and Steinke 2020, Proposition 12, in dp_accounting).

    Raises:
        ConfigError: If ``delta`` is not in (0, 1), or units or relations are mixed.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"Expected a delta between 0 and 1 (both excluded), got {delta}.")
    events = [event for event in events if event.steps]
    if not events:
        return 0.0
    for what in ("unit", "relation"):
        found = sorted({str(getattr(event, what)) for event in events})
        if len(found) > 1:
            raise ConfigError(f"Expected events of one {what}, got {' and '.join(found)}: restate them for one.")
    orders, rdp = _composed(events)
    left = delta - sum(event.steps * event.rounding_delta for event in events)
    distance = sum(event.steps * event.sampler_distance for event in events)
    if left <= 0 or not np.isfinite(rdp).any():
        return math.inf
    ceiling = _convert(orders, rdp, left / 2)
    charge = (1 + math.exp(min(ceiling, 700.0))) * distance
    return _convert(orders, rdp, left - charge) if charge <= left / 2 else math.inf


def calibrate_variance(
    event_at: Callable[[float], Sequence[Accountable]], target_epsilon: float, delta: float, *, least: float = 1e-3
) -> float:
    """Return the least variance at which the events that ``event_at`` gives for it cost at most ``target_epsilon``.

    Args:
        event_at: From a variance (in steps squared) to events; more variance must not cost more.
        target_epsilon: Above 0.
        delta: As ``epsilon``.
        least: Where to start; no smaller variance is returned.

    Raises:
        ConfigError: If the target is not positive or no variance reaches it.
    """
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(f"Expected a positive, finite target epsilon, got {target_epsilon}.")

    def excess(log_variance: float) -> float:
        return min(epsilon(event_at(math.exp(log_variance)), delta), 1e6) - target_epsilon

    low, high = math.log(least), math.log(2.0**60)
    if excess(high) > 0:
        raise ConfigError(
            f"No noise reaches epsilon {target_epsilon:g} at delta {delta:g}: take a larger delta, fewer rounds, or a "
            "smaller beta."
        )
    if excess(low) <= 0:
        return least
    found = math.exp(brentq(excess, low, high, xtol=1e-9))
    while epsilon(event_at(found), delta) > target_epsilon:
        found *= 1 + 1e-9
    return found


def _composed(events: Sequence[Accountable]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    sampled = any(event.sampling_probability < 1 for event in events)
    orders = ORDERS if sampled else np.concatenate([ORDERS, MORE_ORDERS])
    total = np.zeros(orders.size)
    for event in events:
        total += event.steps * sampled_rdp(orders, event.sampling_probability, event.curve)
    return orders, total


def _convert(orders: NDArray[np.int64], rdp: NDArray[np.float64], delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    finite = np.isfinite(rdp)
    value, _ = compute_epsilon(orders[finite].tolist(), rdp[finite].tolist(), delta)
    return float(value)
