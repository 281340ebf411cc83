"""From privacy events to epsilon: composition of Poisson-sampled Gaussian mechanisms, with dp_accounting.

The noise multiplier of an event is the standard deviation over the *clip norm*, under both neighbouring
relations; replacing one unit moves a clipped sum by up to twice the clip norm, and the accountants here count
it so. Two
accountants: ``"pld"`` composes discretised privacy-loss distributions (Koskela et al. 2020; Doroshenko et al.
2022, "Connect the Dots", a pessimistic discretisation: every value is an upper bound), ``"rdp"`` composes
Renyi bounds (Mironov, Talwar and Zhang 2019) and is never below the former but for discretisation.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from privfed.errors import ConfigError
from privfed.privacy.discrete import LAWS
from privfed.types import PrivacyEvent

Events = Sequence[PrivacyEvent]
Accountant = Literal["pld", "rdp"]

COARSEST_INTERVAL = 1e-3
"""The widest bin of a privacy-loss distribution, unless that would take too many bins."""
BINS_PER_DEVIATION = 10
"""Bins per standard deviation of one step's loss: the relative error in epsilon is about 1 / (24 * 10^2)."""
MOST_BINS = 1_000_000
MOST_BINS_OF_A_STEP = 300_000
FINE = 10
"""How many times narrower the bins are for ``fine=True``."""
MOST_LEVELS = 8
"""A dominating list has at most this many different events per family, to bound the accountant's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianMu:
    """The mu of Gaussian differential privacy (Dong, Roth and Su 2022).

    Attributes:
        mu: The events together are as hard to tell apart as N(0, 1) and N(mu, 1).
        exact: False where ``mu`` is a central-limit *approximation*: no guarantee, never to be enforced.
    """

    mu: float
    exact: bool


def epsilon(events: Events, delta: float, *, accountant: Accountant = "pld", fine: bool = False) -> float:
    """Return the epsilon at ``delta`` of all ``events`` composed.

    Args:
        events: What happened to one unit's data; no events cost 0, an event without noise costs infinity.
        delta: The delta at which to read the privacy profile.
        accountant: ``"pld"`` (tighter) or ``"rdp"`` (quicker).
        fine: Ten times narrower bins for PLD: tighter by about 0.1%, and slower.

    Raises:
        ConfigError: If a value is out of range, units or relations are mixed, or the accountant cannot
            account the events (RDP with replace-one neighbours under Poisson sampling).
    """
    check_delta(delta)
    merged_events = _checked(events)
    if not merged_events:
        return 0.0
    if any(event.noise_multiplier == 0 for event in merged_events):
        return math.inf
    if _integer(merged_events):
        return _integer_epsilon(merged_events, delta)
    return _read_epsilon(_composed(merged_events, accountant, fine), delta)


def delta_for(events: Events, epsilon_value: float, *, accountant: Accountant = "pld", fine: bool = False) -> float:
    """Return the delta at ``epsilon_value`` of all ``events`` composed; see ``epsilon``.

    Raises:
        ConfigError: As ``epsilon``, and for a negative ``epsilon_value``.
    """
    if not epsilon_value >= 0:
        raise ConfigError(f"Expected an epsilon of at least 0, got {epsilon_value}.")
    merged_events = _checked(events)
    if not merged_events:
        return 0.0
    if any(event.noise_multiplier == 0 for event in merged_events):
        return 1.0
    if _integer(merged_events):
        from privfed.privacy.discrete import events as discrete

        return discrete.delta_for(merged_events, epsilon_value)
    return min(1.0, float(_composed(merged_events, accountant, fine).get_delta(epsilon_value)))


def epsilon_curve(
    events: Events, deltas: Sequence[float], *, accountant: Accountant = "pld", fine: bool = False
) -> list[tuple[float, float]]:
    """Return (delta, epsilon) for each of ``deltas``, composing the events once.

    Raises:
        ConfigError: As ``epsilon``.
    """
    for delta in deltas:
        check_delta(delta)
    merged_events = _checked(events)
    if not merged_events or any(event.noise_multiplier == 0 for event in merged_events):
        return [(delta, math.inf if merged_events else 0.0) for delta in deltas]
    if _integer(merged_events):
        return [(delta, _integer_epsilon(merged_events, delta)) for delta in deltas]
    composed = _composed(merged_events, accountant, fine)
    return [(delta, _read_epsilon(composed, delta)) for delta in deltas]


def gaussian_mu(events: Events) -> GaussianMu | None:
    """Return the mu of the ``events`` as Gaussian differential privacy, or None where none is finite.

    Without sampling it is exact: sqrt(sum of steps / sigma^2) (Dong, Roth and Su 2022, Corollary 3.3), twice
    that for replace-one neighbours. With Poisson sampling it is the limit of their central limit theorem
    (Theorem 3.5) in the Poisson form of Bu et al. 2020: q sqrt(steps (exp(1/sigma^2) - 1)); for replace-one
    neighbours, by the same second-moment computation on the pair (1-q) N(0) + q N(-+1): q sqrt(4 steps
    sinh(1/sigma^2)).

    Raises:
        ConfigError: If a value is out of range or units or relations are mixed.
    """
    total, exact = 0.0, True
    checked = _checked(events)
    if _integer(checked):
        return None
    for event in checked:
        if event.noise_multiplier == 0:
            return None
        precision = event.noise_multiplier**-2
        replaced = event.relation == "replace_one"
        if event.sampling_probability == 1:
            total += event.steps * precision * (4 if replaced else 1)
            continue
        if precision > 700:  # exp would overflow; no approximation is of use there
            return None
        moment = 4 * math.sinh(precision) if replaced else math.expm1(precision)
        total += event.steps * event.sampling_probability**2 * moment
        exact = False
    return GaussianMu(mu=math.sqrt(total), exact=exact)


def merged(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """Return the ``events`` with the steps of equal ones added up, in an order that depends on nothing
    else."""
    steps: dict[PrivacyEvent, int] = {}
    for event in events:
        kind = kind_of(event)
        steps[kind] = steps.get(kind, 0) + event.steps
    kinds = sorted(steps, key=lambda kind: (-_strength(kind), _family(kind), kind.noise_multiplier))
    return tuple(replace(kind, steps=steps[kind]) for kind in kinds if steps[kind] > 0)


def kind_of(event: PrivacyEvent) -> PrivacyEvent:
    """Return ``event`` with no steps: what must be equal for the steps of two events to add up."""
    return replace(event, steps=0)


def dominating(events_by_client: Mapping[str, Events]) -> tuple[PrivacyEvent, ...]:
    """Return one list of events that costs at least as much as every client's.

    Each client's steps are put in an order, and the k-th step of the result takes the largest sampling
    probability and the smallest noise multiplier of the clients' k-th steps. That is sound for any order,
    because a Poisson-sampled Gaussian step is dominated by one with (a) a larger q: the pair for q is a
    mixture of the pair for q' > q with a pair of equal distributions, and the hockey-stick divergence is
    jointly convex; (b) a smaller sigma: adding noise is post-processing; (c) more steps: dropping outputs is
    post-processing; and composition keeps domination (Zhu, Dong and Wang 2022, Theorem 10). Two orders are
    tried, by noise multiplier and by strength, and the cheaper result kept. It is exact where one client's
    list is at least as large as the others' in every respect. The result is in plain Gaussian steps, and
    integer noise of which only the sampling probabilities were compared.

    Raises:
        ConfigError: If a value is out of range.
    """
    families: dict[tuple[str, str, str], list[tuple[PrivacyEvent, ...]]] = {}
    for events in events_by_client.values():
        for event in events:
            check_event(event)
        parts: dict[tuple[str, str, str], list[PrivacyEvent]] = {}
        for event in merged(map(plain, events)):
            parts.setdefault(_family(event), []).append(event)
        for family, part in parts.items():
            families.setdefault(family, []).append(tuple(part))
    return merged(event for lists in families.values() for event in _dominate_family(lists))


def check_delta(delta: float) -> None:
    """Raise ``ConfigError`` unless ``delta`` lies in (0, 1)."""
    if not 0 < delta < 1:
        raise ConfigError(f"Expected a delta between 0 and 1 (both excluded), got {delta}.")


def check_event(event: PrivacyEvent) -> None:
    """Raise ``ConfigError`` unless the accountants know the event's mechanism and its values are in range."""
    if event.mechanism in LAWS:
        from privfed.privacy.discrete.events import check

        check(event)
    elif event.mechanism != "gaussian" or event.parameters:
        _check_mechanism(event)
    if event.unit not in ("example", "client"):
        raise ConfigError(f"Expected the unit 'example' or 'client', got {event.unit!r}.")
    if event.relation not in ("add_or_remove_one", "replace_one"):
        raise ConfigError(f"Expected 'add_or_remove_one' or 'replace_one', got the relation {event.relation!r}.")
    if not 0 < event.sampling_probability <= 1:
        raise ConfigError(f"Expected a sampling probability in (0, 1], got {event.sampling_probability}.")
    if not 0 <= event.noise_multiplier < math.inf:
        raise ConfigError(f"Expected a finite noise multiplier of at least 0, got {event.noise_multiplier}.")
    if event.steps < 0:
        raise ConfigError(f"Expected at least 0 steps, got {event.steps}.")


def interval(events: Events, *, fine: bool = False) -> float:
    """Return the bin width at which PLD composes ``events``.

    ``COARSEST_INTERVAL``, or narrower where the steps are so mild that such bins would inflate their
    variance, or wider where the whole would take too many bins. This moves the tightness of the bound, never
    its soundness.
    """
    variance, count, widest = 0.0, 0, 0.0
    for event in merged(events):
        if event.noise_multiplier == 0:
            continue
        step, steps, ratio = _strength(event), event.steps, 1 / event.noise_multiplier
        if event.sampling_probability == 1:  # composed in closed form, as one Gaussian
            step, steps, ratio = step * math.sqrt(steps), 1, ratio * math.sqrt(steps)
        variance += steps * step**2
        count += steps
        widest = max(widest, ratio**2 + 20 * ratio)  # the loss over +-10 standard deviations of noise
    narrow = min(COARSEST_INTERVAL, math.sqrt(variance / max(count, 1)) / BINS_PER_DEVIATION)
    fewest = max(20 * math.sqrt(variance) / MOST_BINS, widest / MOST_BINS_OF_A_STEP)
    return max(narrow / FINE if fine else narrow, fewest)


def plain(event: PrivacyEvent) -> PrivacyEvent:
    """Return the Poisson-sampled Gaussian steps that dominate ``event``; integer noise has none, and stays itself."""
    if event.mechanism in LAWS:
        return event
    return replace(event, mechanism="gaussian", parameters=())


def _check_mechanism(event: PrivacyEvent) -> None:
    from privfed.privacy.mechanisms import MECHANISMS  # they import this module

    if event.mechanism not in MECHANISMS.names():
        known = " or ".join(map(repr, MECHANISMS.names()))
        raise ConfigError(f"Expected the mechanism {known}, got {event.mechanism!r}: no accountant knows it.")
    MECHANISMS.get(event.mechanism).check(event)


def _checked(events: Events) -> tuple[PrivacyEvent, ...]:
    """Return ``events`` as checked, plain and merged Gaussian steps."""
    for event in events:
        check_event(event)
    merged_events = merged(map(plain, events))
    for what in ("unit", "relation"):
        found = sorted({str(getattr(event, what)) for event in merged_events})
        if len(found) > 1:
            raise ConfigError(f"Expected events of one {what}, got {' and '.join(found)}: restate them for one.")
    return merged_events


def _composed(events: Events, accountant: Accountant, fine: bool) -> Any:
    """Return dp_accounting's accountant after ``events``, which are checked, merged and noisy."""
    import dp_accounting

    logging.getLogger("absl").addFilter(_is_news)
    relation = dp_accounting.NeighboringRelation[events[0].relation.upper()]
    if accountant == "pld":
        result = dp_accounting.pld.PLDAccountant(relation, interval(events, fine=fine))
    elif accountant == "rdp":
        result = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    else:
        raise ConfigError(f"Expected the accountant 'pld' or 'rdp', got {accountant!r}.")
    for event in events:
        result.compose(_dp_event(dp_accounting, event, accountant), event.steps)
    return result


def _dp_event(dp_accounting: Any, event: PrivacyEvent, accountant: Accountant) -> Any:
    sigma = event.noise_multiplier
    if accountant == "rdp" and event.relation == "replace_one":
        if event.sampling_probability < 1:
            raise ConfigError(
                "The accountant 'rdp' cannot account Poisson sampling for replace_one neighbours: take 'pld'."
            )
        # dp_accounting's RDP reads the noise relative to the sensitivity, which is twice the clip norm here
        sigma /= 2
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    if event.sampling_probability == 1:
        return gaussian
    return dp_accounting.PoissonSampledDpEvent(event.sampling_probability, gaussian)


def _read_epsilon(composed: Any, delta: float) -> float:
    import numpy as np

    # where epsilon is in the hundreds a quotient may overflow; PLD then answers infinity: the safe side
    with np.errstate(over="ignore"):
        return float(composed.get_epsilon(delta))


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a warning matters: that RDP leaves out orders of slow series only loosens its bound."""
    return "_compute_log_a_frac failed to converge" not in str(record.msg)


def _integer(events: Events) -> bool:
    """Return whether any event has integer noise, which is composed by Renyi divergences whichever accountant asks."""
    return any(event.mechanism in LAWS for event in events)


def _integer_epsilon(events: Events, delta: float) -> float:
    from privfed.privacy.discrete import events as discrete

    return discrete.epsilon(events, delta)


def _family(event: PrivacyEvent) -> tuple[str, str, str]:
    """Return what must be equal for one event to dominate another; integer noise only ever its own kind."""
    kind = f"{event.mechanism}{event.parameters}" if event.mechanism in LAWS else event.mechanism
    return (kind, event.unit, event.relation)


def _strength(event: PrivacyEvent) -> float:
    """Return about the standard deviation of one step's privacy loss; only ever used to order and to size."""
    if event.noise_multiplier == 0:
        return math.inf
    plain = 1 / event.noise_multiplier
    sampled = event.sampling_probability * math.sqrt(math.expm1(min(plain**2, 700.0)))
    return min(plain, sampled) * (2 if event.relation == "replace_one" else 1)


def _dominate_family(lists: Sequence[Events]) -> tuple[PrivacyEvent, ...]:
    by_strength = _staircase(lists)
    by_sigma: list[PrivacyEvent] = []
    for sigma in sorted({event.noise_multiplier for events in lists for event in events}):
        parts = [[event for event in events if event.noise_multiplier == sigma] for events in lists]
        by_sigma += _staircase(parts)
    return min((tuple(by_sigma), by_strength), key=_weight)


def _weight(events: Events) -> float:
    return sum(event.steps * _strength(event) ** 2 for event in events)


def _staircase(lists: Sequence[Events]) -> tuple[PrivacyEvent, ...]:
    """Return the step-wise maximum of ``lists``, each already ordered, as at most ``MOST_LEVELS`` events."""
    ends: set[int] = set()
    spans: list[tuple[int, int, PrivacyEvent]] = []
    for events in lists:
        end = 0
        for event in events:
            spans.append((end, end + event.steps, event))
            end += event.steps
            ends.add(end)
    levels: list[PrivacyEvent] = []
    begin = 0
    for end in sorted(ends):
        level = _envelope([event for first, last, event in spans if first <= begin and end <= last], end - begin)
        if levels and kind_of(levels[-1]) == kind_of(level):
            level = replace(level, steps=level.steps + levels.pop().steps)
        levels.append(level)
        begin = end
    while len(levels) > MOST_LEVELS:
        joined = [_envelope(pair, pair[0].steps + pair[1].steps) for pair in _pairs(levels)]
        added = [_weight([new]) - _weight(pair) for new, pair in zip(joined, _pairs(levels), strict=True)]
        cheapest = added.index(min(added))
        levels[cheapest : cheapest + 2] = [joined[cheapest]]
    return tuple(levels)


def _pairs(levels: Sequence[PrivacyEvent]) -> list[tuple[PrivacyEvent, PrivacyEvent]]:
    return list(itertools.pairwise(levels))


def _envelope(events: Sequence[PrivacyEvent], steps: int) -> PrivacyEvent:
    """Return an event of ``steps`` steps, each of which dominates a step of each of ``events`` (of one
    family)."""
    return replace(
        events[0],
        sampling_probability=max(event.sampling_probability for event in events),
        noise_multiplier=min(event.noise_multiplier for event in events),
        steps=steps,
    )
