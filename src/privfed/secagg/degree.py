"""How many neighbours and how many shares a session needs: exact tails instead of rules of thumb.

The clients stand on a ring in random order, each linked to its k / 2 nearest on both sides (a Harary graph), so
the corrupt ones among the k neighbours of a client are a hypergeometric draw. For n clients of which at most C are
corrupt and at most D drop, a pair (k, t) is taken if all of these hold:

1. *Secrets stay secret*: more than t - 1 of an honest client's neighbours are corrupt, for any client, with a
   probability of at most 2^-(sigma + 1).
2. *The masks hold together*: the honest survivors fall apart into two parts without a link, each of which could be
   summed by itself, with a probability of at most 2^-(sigma + 1). A Harary graph falls apart only where k / 2
   neighbours in a row are missing in two places, and there are at most n (n - k - 1) / 2 pairs of places.
3. *The sum is had*: fewer than t holders of some client's shares answer, with a probability of at most 2^-eta.

What is random differs. Against a ``curious`` server the D that drop are random, as are the C. A ``malicious``
server picks who counts as dropped after it saw the graph, so only the corrupt are random in 2. An
``equivocating`` server is a curious one that may tell clients different lists of survivors; 1 then becomes
2 t > k + 1 + (corrupt neighbours), with which no two lists give both secrets of a client, even unsigned.

All of it presumes that the order of the ring does not depend on who is corrupt: whoever may try 2^g round ids
until the order suits takes g bits from sigma.

Source: Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020, sections 3 and
5; the search and the union bound over gaps mirror graph_parameter_finder of google-parfait/federated-compute. It
differs from that in drawing neighbours from the n - 1 others, in the client's own share, and in the malicious
server's choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from privfed.errors import ConfigError

COMPLETE_UP_TO = 50
"""Cohorts of at most so many clients use the complete graph: a sparser one saves nothing honest there."""
Server = Literal["curious", "equivocating", "malicious"]
_SLACK = 1e-9  # a share of the cohort such as 0.3 * 10 is one float below or above the integer it means


@dataclass(frozen=True, slots=True, kw_only=True)
class Degree:
    """k neighbours for each client, and t shares to recover a secret."""

    degree: int
    threshold: int


def at_most(fraction: float, n: int) -> int:
    """Return the largest whole number of ``n`` clients that is not above this fraction of them."""
    return math.floor(fraction * n + _SLACK)


def at_least(fraction: float, n: int) -> int:
    """Return the smallest whole number of ``n`` clients that is not below this fraction of them."""
    return math.ceil(fraction * n - _SLACK)


@lru_cache(maxsize=256)
def find_degree(
    n: int,
    *,
    corrupt: int,
    dropped: int,
    chosen: int | None = None,
    sigma: float = 40.0,
    eta: float = 20.0,
    server: Server = "malicious",
) -> Degree:
    """Return the smallest even degree, with its threshold, that meets the three conditions of the module.

    Args:
        n: Clients in the cohort, at least 4.
        corrupt: Most clients that work with the server.
        dropped: Most clients that drop, at any stage.
        chosen: Most clients that a malicious server can name as dropped: n - n_min. As many as drop, by default.
        sigma: Bits of statistical security.
        eta: Bits of correctness: the sum is lost with a probability of at most 2^-eta.
        server: What the server may do; see the module.

    Raises:
        ConfigError: If no graph sparser than the complete one will do.
    """
    picked = dropped if chosen is None else chosen
    for degree in range(2, n - 1, 2):
        gap = _log2_gap(n, degree, corrupt, picked if server == "malicious" else dropped, server)
        if gap > -(sigma + 1):
            continue
        threshold = _threshold(n, degree, corrupt, dropped, sigma, eta, server)
        if threshold is not None:
            return Degree(degree=degree, threshold=threshold)
    raise ConfigError(
        f"No graph on {n} clients stands {corrupt} corrupt and {dropped} dropped ones at sigma = {sigma:g}:"
        " lower secagg.corrupt or secagg.dropped, or use a cohort of at most"
        f" {COMPLETE_UP_TO} clients, whose graph is complete."
    )


def log2_tail(population: int, marked: int, drawn: int, least: int) -> float:
    """Return log2 P[X >= least] for the number X of marked ones among ``drawn`` of ``population``.

    -inf where it cannot be. The terms are added from the exact distribution in logarithms, to about 10 digits.
    """
    most = min(marked, drawn)
    low = max(least, drawn + marked - population, 0)
    if low > most:
        return -math.inf
    if least <= max(drawn + marked - population, 0):
        return 0.0
    log_first = _log_choose(marked, low) + _log_choose(population - marked, drawn - low)
    log_first -= _log_choose(population, drawn)
    total = math.fsum(_ratios(population, marked, drawn, low, most))
    return min(0.0, (log_first + math.log(total)) / math.log(2))


def corrupt_neighbours(n: int, degree: int, corrupt: int, sigma: float) -> int:
    """Return c: no honest client has more than c corrupt neighbours, but with probability 2^-(sigma + 1)."""
    return _quantile(n - 1, corrupt, degree, -(sigma + 1) - math.log2(n))


def answering_holders(n: int, degree: int, dropped: int, eta: float) -> int:
    """Return a: every client has at least a holders that answer, but with probability 2^-eta.

    A dropped client's holders are its neighbours; a survivor holds a share of its own seed as well.
    """
    bound = -eta - math.log2(n)
    survivor = degree - _quantile(n - 1, dropped, degree, bound) + 1
    if dropped == 0:
        return survivor
    return min(survivor, degree - _quantile(n - 1, dropped - 1, degree, bound))


def _quantile(population: int, marked: int, drawn: int, bound: float) -> int:
    """Return the smallest q with log2 P[X > q] at most ``bound``."""
    low, high = 0, min(marked, drawn)
    while low < high:
        middle = (low + high) // 2
        if log2_tail(population, marked, drawn, middle + 1) <= bound:
            high = middle
        else:
            low = middle + 1
    return low


def _threshold(n: int, degree: int, corrupt: int, dropped: int, sigma: float, eta: float, server: Server) -> int | None:
    """Return t, or None where secrecy and correctness leave no room."""
    bad = corrupt_neighbours(n, degree, corrupt, sigma)
    both = (degree + 1 + bad) // 2 + 1  # the least t with 2 t > k + 1 + c
    least = max(2, both if server == "equivocating" else bad + 1)
    most = min(answering_holders(n, degree, dropped, eta), degree)
    if least > most:
        return None
    # a signed agreement makes 2 t > k + 1 + c unnecessary against a malicious server; where it costs nothing, have it
    return min(both, most) if server == "malicious" and both >= least else least


def _log2_gap(n: int, degree: int, corrupt: int, dropped: int, server: Server) -> float:
    """Return log2 of the bound on the probability that the honest survivors fall apart."""
    pairs = math.log2(n) + math.log2(max(n - degree - 1, 1)) - 1
    if server == "malicious":
        return pairs + log2_tail(n, corrupt, degree, degree - dropped)
    return pairs + log2_tail(n, min(n, corrupt + dropped), degree, degree)


def _ratios(population: int, marked: int, drawn: int, low: int, most: int) -> Iterator[float]:
    """Yield P[X = x] / P[X = low] for x from ``low`` on, until the rest no longer counts."""
    term = 1.0
    yield term
    for x in range(low, most):
        ratio = (marked - x) * (drawn - x) / ((x + 1) * (population - marked - drawn + x + 1))
        term *= ratio
        yield term
        if ratio < 1 and term < 1e-20:  # the ratios fall from here on
            return


def _log_choose(n: int, k: int) -> float:
    """Return the natural logarithm of n over k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
