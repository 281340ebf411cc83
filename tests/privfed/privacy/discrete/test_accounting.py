"""The accounting of integer noise: never below the truth, equal to published values, wrong when it should be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_two_probability_mass_functions
from dp_accounting.rdp import compute_epsilon
from privfed_noise_checks import divergence, log_probabilities

from privfed.errors import ConfigError
from privfed.privacy.discrete.accounting import ORDERS, DiscreteEvent, calibrate_variance, epsilon, sampled_rdp
from privfed.privacy.discrete.discrete_gaussian import discrete_gaussian_rdp, tau
from privfed.privacy.discrete.skellam import skellam_rdp

PUBLISHED = json.loads((Path(__file__).parents[3] / "vectors" / "discrete_accounting.json").read_text())
DELTA = 1e-5
SOME = np.array([2, 3, 4, 8, 16, 32])


def event(**changes):
    fields = {
        "mechanism": "skellam", "variance": 1e4, "shares": 10, "length": 100, "l1": 300.0, "l2": 50.0, "unit": "client",
    }  # fmt: skip
    return DiscreteEvent(**{**fields, **changes})


# published and exact values


@pytest.mark.parametrize("row", PUBLISHED["skellam"])
def test_equal_to_the_published_utility_for_skellam(row):
    variance = (row["stddev"] * row["scale"]) ** 2
    orders = [int(order) for order in row["rdp"]]
    found = skellam_rdp(orders, variance, row["l1"], row["l2"])
    assert found == pytest.approx(list(row["rdp"].values()), rel=1e-12)
    mine = event(variance=variance, l1=row["l1"], l2=row["l2"], sampling_probability=row["q"], steps=row["steps"])
    assert epsilon([mine], row["delta"]) == pytest.approx(row.get("epsilon_theorem6", row["epsilon"]), rel=1e-8)
    assert epsilon([mine], row["delta"]) <= row["epsilon"] * (1 + 1e-12)


@pytest.mark.parametrize("row", PUBLISHED["ddgauss"])
def test_equal_to_the_published_utility_for_sums_of_discrete_gaussians(row):
    mine = event(
        mechanism="discrete_gaussian",
        variance=(row["local_stddev"] / row["gamma"]) ** 2 * row["shares"],
        shares=row["shares"],
        length=row["length"],
        l1=row["l1"],
        l2=row["l2"],
        sampling_probability=row["q"],
        steps=row["steps"],
    )
    if row["q"] == 1:
        assert epsilon([mine], row["delta"]) == pytest.approx(row["epsilon"], rel=1e-9)
    else:  # published with a factor 3 that symmetric noise does not need
        assert 0.7 * row["epsilon"] < epsilon([mine], row["delta"]) < row["epsilon"]


@pytest.mark.parametrize("variance", [1.0, 4.0, 30.0, 1000.0, 1e5])
@pytest.mark.parametrize("shift", [1, 2, 7, 40])
def test_the_skellam_bound_is_above_the_exact_divergence(variance, shift):
    reach = int(40 * variance**0.5) + 100 * shift + 100
    values = np.arange(-reach, reach + 1)
    p, q = (log_probabilities("skellam", variance, values - by) for by in (shift, 0))
    for order in (2, 3, 5, 10, 20):
        (bound,) = skellam_rdp([order], variance, shift, shift)
        exact = divergence(p, q, order)
        assert exact == pytest.approx(divergence(q, p, order), rel=1e-6)  # symmetric noise
        assert exact <= bound * (1 + 1e-9)
        if order * (shift + 1) < variance:
            assert bound < 1.5 * exact  # tight, and for the variance, not twice or half of it
            assert skellam_rdp([order], 2 * variance, shift, shift)[0] < exact
            assert skellam_rdp([order], variance / 2, shift, shift)[0] > 1.5 * exact


@pytest.mark.parametrize("variance", [3.0, 20.0, 400.0])
@pytest.mark.parametrize("squared", [4, 9, 25])
def test_the_skellam_bound_holds_for_every_integer_shift_in_many_dimensions(variance, squared):
    """Divergences of independent coordinates add up, so the worst vector maximises a sum over its values."""
    values = np.arange(-int(80 * variance**0.5) - 80, int(80 * variance**0.5) + 81)
    q = log_probabilities("skellam", variance, values)
    for order in (2, 4, 8):
        one = {
            k: divergence(log_probabilities("skellam", variance, values - k), q, order)
            for k in range(1, math.isqrt(squared) + 1)
        }
        for parts in partitions(squared):
            exact = sum(one[k] for k in parts)
            (bound,) = skellam_rdp([order], variance, sum(parts), math.sqrt(sum(k * k for k in parts)))
            assert exact <= bound * (1 + 1e-9), parts


def partitions(squared, largest=None):
    """Yield the ways to write a sum of squares of at most ``squared``."""
    largest = math.isqrt(squared) if largest is None else largest
    for k in range(largest, 0, -1):
        if k * k <= squared:
            yield (k,)
            for rest in partitions(squared - k * k, k):
                yield (k, *rest)


@pytest.mark.parametrize(("variance", "shares"), [(0.5, 2), (0.5, 3), (0.6, 8), (1.0, 4), (4.0, 3)])
def test_the_bound_for_sums_of_discrete_gaussians_is_above_the_exact_divergence(variance, shares):
    reach = int(40 * variance**0.5) + 20
    one = np.exp(log_probabilities("discrete_gaussian", variance, np.arange(-reach, reach + 1)))
    total = np.array([1.0])
    for _ in range(shares):
        total = np.convolve(total, one)
    keep = total > 1e-250  # sums of positive terms: relative precision holds down there
    pad = np.full(total.size, -np.inf)
    pad[keep] = np.log(total[keep])
    gaps = []
    for shift in (1, 2):
        p, q = pad[:-shift], pad[shift:]
        both = np.isfinite(p) & np.isfinite(q)
        for order in (2, 3, 5):
            exact = divergence(p[both], q[both], order)
            (bound,) = discrete_gaussian_rdp([order], variance, shares, 1, shift, shift)
            assert exact <= bound * (1 + 1e-9)
            gaps.append(exact - order * shift**2 / (2 * shares * variance))
    assert (max(gaps) > 1e-9) == (variance <= 1)  # where shares are narrow, a Gaussian's divergence is too little


@pytest.mark.parametrize(
    ("variance", "shift", "length", "steps", "q"),
    [
        (25.0, 1, 1, 10, 1.0),
        (100.0, 1, 20, 5, 1.0),
        (400.0, 6, 3, 4, 1.0),
        (16.0, 1, 1, 200, 0.05),
        (60.0, 8, 1, 50, 0.1),
    ],
)
def test_epsilon_is_above_the_exact_one(variance, shift, length, steps, q):
    """Against privacy-loss distributions of the probabilities, rounded *down*, of ``length`` equal shifts."""
    values = np.arange(-int(30 * variance**0.5) - 30, int(30 * variance**0.5) + 31)
    without = log_probabilities("skellam", variance, values)
    shifted = log_probabilities("skellam", variance, values - shift)
    if q < 1:
        assert length == 1
        shifted = np.logaddexp(math.log1p(-q) + without, math.log(q) + shifted)
    pmfs = [dict(zip(values.tolist(), one.tolist(), strict=True)) for one in (without, shifted)]
    losses = from_two_probability_mass_functions(
        *pmfs, pessimistic_estimate=False, value_discretization_interval=1e-4
    ).self_compose(length * steps)
    exact = losses.get_epsilon_for_delta(DELTA)
    mine = epsilon(
        [
            event(
                variance=variance, l1=shift * length, l2=shift * length**0.5, sampling_probability=q, steps=steps,
            )
        ],
        DELTA,
    )  # fmt: skip
    assert exact <= mine < 1.25 * exact


# sampling


@pytest.mark.parametrize("name", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize("q", [0.01, 0.2, 0.7])
def test_sampled_divergences_are_the_exact_ones_and_cover_both_directions(name, q):
    variance, shift = 9.0, 2
    values = np.arange(-150, 151)
    p, base = (log_probabilities(name, variance, values - by) for by in (shift, 0))
    mixture = np.logaddexp(math.log1p(-q) + base, math.log(q) + p)

    def exact_curve(orders):
        return np.array([divergence(p, base, int(order)) for order in orders])

    found = sampled_rdp(SOME, q, exact_curve)
    forward = np.array([divergence(mixture, base, int(order)) for order in SOME])
    backward = np.array([divergence(base, mixture, int(order)) for order in SOME])
    assert found == pytest.approx(forward, rel=1e-6)
    assert (backward <= forward * (1 + 1e-9)).all()


def test_the_other_direction_can_be_larger_without_symmetry():
    """So the test above can fail: the pair of a coin and a biased coin."""
    p, base, q = np.log([0.001, 0.999]), np.log([0.5, 0.5]), 0.7
    mixture = np.logaddexp(math.log1p(-q) + base, math.log(q) + p)
    assert divergence(base, mixture, 8) > divergence(mixture, base, 8)


def test_sampling_with_probability_one_or_less():
    def curve(orders):
        return skellam_rdp(orders, 1e4, 300, 50)

    assert np.array_equal(sampled_rdp(ORDERS, 1.0, curve), curve(ORDERS))
    nearly = sampled_rdp(SOME, 1 - 1e-9, curve)
    assert nearly == pytest.approx(curve(SOME), rel=1e-6)
    spent = [epsilon([event(sampling_probability=q, steps=50)], DELTA) for q in (0.001, 0.01, 0.1, 0.5, 1.0)]
    assert spent == sorted(spent) and spent[0] < 0.1 * spent[-1]


# against the Gaussian


@pytest.mark.parametrize("length", [1000, 10**5, 10**7])
@pytest.mark.parametrize(("multiplier", "steps", "q"), [(1.0, 1, 1.0), (4.0, 100, 1.0), (0.8, 300, 0.02)])
def test_equal_to_the_gaussian_at_the_recommended_scale(length, multiplier, steps, q):
    """At five square roots of the length, to three decimals; at a hundredth of that scale it is worse."""

    def pair(l2):
        l1 = min(length**0.5 * l2, l2**2)
        mine = event(variance=(multiplier * l2) ** 2, l1=l1, l2=l2, steps=steps, sampling_probability=q)
        gaussian = sampled_rdp(ORDERS, q, lambda orders: orders / (2 * multiplier**2))
        return epsilon([mine], DELTA), compute_epsilon(ORDERS.tolist(), (steps * gaussian).tolist(), DELTA)[0]

    skellam, gaussian = pair(5 * length**0.5)
    assert skellam >= gaussian
    assert skellam == pytest.approx(gaussian, abs=5e-4 if length > 1000 else 5e-3)
    if length == 1000:
        skellam, gaussian = pair(0.05 * length**0.5)
        assert skellam > 1.02 * gaussian


# composition, delta, calibration


def test_composition():
    one = event(steps=3)
    assert epsilon([one, one], DELTA) == pytest.approx(epsilon([event(steps=6)], DELTA))
    assert epsilon([one], DELTA) < epsilon([one, one], DELTA)
    assert epsilon([], DELTA) == 0 == epsilon([event(steps=0)], DELTA)
    assert epsilon([event(variance=0.0)], DELTA) == math.inf
    mixed = [event(steps=2), event(steps=2, sampling_probability=0.1, variance=5e3)]
    assert epsilon(mixed, DELTA) > epsilon(mixed[:1], DELTA)


def test_replacing_a_unit_costs_as_much_as_twice_the_norms():
    replaced = event(relation="replace_one")
    assert epsilon([replaced], DELTA) == epsilon([event(l1=600.0, l2=100.0)], DELTA)


def test_delta_pays_for_rounding_and_for_the_samplers():
    plain = epsilon([event(steps=10)], DELTA)
    rounding = event(steps=10, rounding_delta=5e-7)
    assert epsilon([rounding], DELTA) == pytest.approx(epsilon([event(steps=10)], 5e-6))
    assert epsilon([event(steps=10, rounding_delta=1.1e-6)], DELTA) == math.inf
    distance = 1e-11
    sampled = epsilon([event(steps=10, sampler_distance=distance)], DELTA)
    assert sampled > plain
    # what is left of delta covers the loss at the epsilon that is claimed
    assert sampled >= epsilon([event(steps=10)], DELTA - (1 + math.exp(sampled)) * 10 * distance) * (1 - 1e-12)
    assert epsilon([event(steps=10, sampler_distance=1e-6)], DELTA) == math.inf


@pytest.mark.parametrize("target", [0.5, 3.0, 10.0])
def test_calibration_meets_the_target_and_wastes_nothing(target):
    def events_at(variance):
        return [event(variance=variance, steps=20, sampling_probability=0.3)]

    variance = calibrate_variance(events_at, target, DELTA)
    assert epsilon(events_at(variance), DELTA) <= target < epsilon(events_at(0.999 * variance), DELTA)


def test_bad_input():
    with pytest.raises(ConfigError, match="delta between 0 and 1"):
        epsilon([event()], 0.0)
    with pytest.raises(ConfigError, match="one unit, got client and example"):
        epsilon([event(), event(unit="example")], DELTA)
    with pytest.raises(ConfigError, match="integers above 1"):
        skellam_rdp([1.5], 1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="at least 0"):
        skellam_rdp([2], -1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"sampling probability in \(0, 1\]"):
        event(sampling_probability=0.0)
    with pytest.raises(ConfigError, match="not accounted for replace_one"):
        event(sampling_probability=0.5, relation="replace_one")
    with pytest.raises(ConfigError, match="at least 0 steps"):
        event(steps=-1)
    with pytest.raises(ConfigError, match=r'expected at least 0.5 .* noise = "skellam"'):
        tau(0.4, 2)
    with pytest.raises(ConfigError, match="at least one share"):
        tau(1.0, 0)
    with pytest.raises(ConfigError, match="positive, finite target"):
        calibrate_variance(lambda v: [event(variance=v)], 0.0, DELTA)
    with pytest.raises(ConfigError, match="No noise reaches epsilon"):
        calibrate_variance(lambda v: [event(variance=v, rounding_delta=1e-5)], 1.0, DELTA)
