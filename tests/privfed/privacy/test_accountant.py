"""Composition against golden values, dp_accounting itself, and what must hold of any bound."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dp_accounting
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from privfed.errors import ConfigError
from privfed.privacy.accountant import (
    MOST_LEVELS,
    delta_for,
    dominating,
    epsilon,
    epsilon_curve,
    gaussian_mu,
    interval,
    merged,
)
from privfed.types import PrivacyEvent

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text())
DELTA = VECTORS["delta"]


def event(q=0.01, sigma=1.0, steps=1000, unit="example", relation="add_or_remove_one"):
    return PrivacyEvent(unit=unit, noise_multiplier=sigma, sampling_probability=q, steps=steps, relation=relation)


@pytest.mark.parametrize("case", VECTORS["epsilon"], ids=str)
def test_golden_epsilons(case):
    numbers = {key: case[key] for key in ("q", "sigma", "steps", "unit", "relation") if key in case}
    assert epsilon([event(**numbers)], DELTA) == pytest.approx(case["pld"], rel=2e-3)
    if "rdp" in case:
        assert epsilon([event(**numbers)], DELTA, accountant="rdp") == pytest.approx(case["rdp"], rel=1e-4)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "relation"),
    [
        (0.01, 4.0, 10000, "add_or_remove_one"),
        (0.01, 1.0, 1000, "replace_one"),
        (1.0, 5.0, 30, "add_or_remove_one"),
        (1.0, 5.0, 30, "replace_one"),
        (0.2, 0.7, 10, "add_or_remove_one"),
    ],
)
def test_equals_dp_accounting_called_directly(q, sigma, steps, relation):
    ours = [event(q, sigma, steps, relation=relation)]
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    theirs = gaussian if q == 1 else dp_accounting.PoissonSampledDpEvent(q, gaussian)
    neighbours = dp_accounting.NeighboringRelation[relation.upper()]
    pld = dp_accounting.pld.PLDAccountant(neighbours, interval(ours))
    pld.compose(dp_accounting.SelfComposedDpEvent(theirs, steps))
    assert epsilon(ours, DELTA) == pld.get_epsilon(DELTA)
    if relation == "add_or_remove_one":
        rdp = dp_accounting.rdp.RdpAccountant()
        rdp.compose(dp_accounting.SelfComposedDpEvent(theirs, steps))
        assert epsilon(ours, DELTA, accountant="rdp") == rdp.get_epsilon(DELTA)


def test_the_standard_interval_is_used_where_it_is_fine_enough():
    assert interval([event()]) == 1e-3
    assert interval([event()], fine=True) == pytest.approx(1e-4)
    assert interval([event(sigma=4.0, steps=10000)]) < 1e-3


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_full_participation_agrees_with_the_exact_gaussian(relation):
    distance = 2 if relation == "replace_one" else 1
    exact = dp_accounting.get_epsilon_gaussian(6.0 / math.sqrt(30) / distance, DELTA)
    events = [event(1.0, 6.0, 30, relation=relation)]
    assert epsilon(events, DELTA) == pytest.approx(exact, rel=1e-4)
    assert epsilon(events, DELTA, accountant="rdp") >= exact
    assert gaussian_mu(events).mu == pytest.approx(distance * math.sqrt(30) / 6)
    assert gaussian_mu(events).exact


def test_extremes():
    assert epsilon([], DELTA) == 0 and delta_for([], 0.0) == 0
    assert epsilon([event(steps=0)], DELTA) == 0
    assert epsilon([event(), event(sigma=0.0, steps=1)], DELTA) == math.inf
    assert delta_for([event(sigma=0.0)], 5.0) == 1
    assert gaussian_mu([event(sigma=0.0)]) is None
    assert gaussian_mu([]).mu == 0
    assert 1000 < epsilon([event(1.0, 0.3, 10000)], DELTA) < math.inf
    assert epsilon_curve([], [1e-5]) == [(1e-5, 0.0)]


def test_order_and_splitting_do_not_matter():
    parts = [event(steps=400), event(0.1, 2.0, 50), event(steps=600)]
    assert epsilon(parts, DELTA) == epsilon(parts[::-1], DELTA)
    assert sorted(each.steps for each in merged(parts)) == [50, 1000]


def test_curve_and_delta_agree_with_epsilon():
    events = [event()]
    curve = epsilon_curve(events, [1e-6, 1e-5, 1e-3])
    assert curve[1] == (1e-5, epsilon(events, 1e-5))
    assert [value for _, value in curve] == sorted((value for _, value in curve), reverse=True)
    assert delta_for(events, curve[1][1]) == pytest.approx(1e-5, rel=1e-3)


def test_mu_by_the_central_limit_is_marked_as_an_approximation():
    mu = gaussian_mu([event(0.01, 4.0, 10000)])
    assert not mu.exact
    assert mu.mu == pytest.approx(0.01 * math.sqrt(10000 * math.expm1(1 / 16)))
    doubled = gaussian_mu([event(0.001, 50.0, 10000, relation="replace_one")])
    assert doubled.mu == pytest.approx(2 * gaussian_mu([event(0.001, 50.0, 10000)]).mu, rel=1e-3)


@given(st.floats(0.001, 0.2), st.floats(0.8, 8.0), st.integers(1, 1000), st.floats(1.1, 2.0), st.integers(1, 500))
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
def test_monotone_and_rdp_above_pld(q, sigma, steps, factor, more):
    base = epsilon([event(q, sigma, steps)], DELTA)
    slack = 2e-3 * base + 1e-6  # the two sides may have different bins
    assert epsilon([event(q, sigma, steps)], DELTA, accountant="rdp") >= base - slack
    assert epsilon([event(min(1.0, q * factor), sigma, steps)], DELTA) >= base - slack
    assert epsilon([event(q, sigma * factor, steps)], DELTA) <= base + slack
    assert epsilon([event(q, sigma, steps + more)], DELTA) >= base - slack
    assert epsilon([event(q, sigma, steps, relation="replace_one")], DELTA) >= base - slack


EVENTS = st.builds(event, st.sampled_from([0.01, 0.05, 0.2]), st.sampled_from([1.0, 2.5]), st.integers(1, 200))


@given(st.lists(st.lists(EVENTS, max_size=3), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
def test_dominating_dominates_every_client(lists):
    bound = epsilon(dominating(dict(enumerate(lists))), DELTA)
    for events in lists:
        assert epsilon(events, DELTA) <= bound * (1 + 2e-3) + 1e-6


def test_dominating_is_exact_for_alike_clients_and_small_for_many():
    warm, main = event(0.5, 2.5, 15), event(0.05, 1.0, 100)
    assert dominating({"a": [warm, main], "b": [main, warm]}) == merged([warm, main])
    larger = event(0.06, 1.0, 120)
    assert dominating({"a": [main], "b": [larger]}) == (larger,)
    assert dominating({}) == ()
    many = {str(i): [event(0.01 + i / 1000, 1.0, 300 - i)] for i in range(100)}
    assert len(dominating(many)) <= MOST_LEVELS
    assert sum(each.steps for each in dominating(many)) == 300
    units = dominating({"a": [main], "b": [event(unit="client")]})
    assert {each.unit for each in units} == {"example", "client"}


@pytest.mark.parametrize(
    "bad",
    [
        {"q": 0.0}, {"q": 1.1}, {"q": math.nan}, {"sigma": -1.0}, {"sigma": math.nan}, {"sigma": math.inf},
        {"steps": -1}, {"unit": "user"}, {"relation": "swap"},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=r"^Expected .*\.$"):
        epsilon([event(**bad)], DELTA)
    with pytest.raises(ConfigError):
        dominating({"a": [event(**bad)]})


def test_other_refusals():
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="delta"):
            epsilon([event()], delta)
    with pytest.raises(ConfigError, match="one unit"):
        epsilon([event(), event(unit="client")], DELTA)
    with pytest.raises(ConfigError, match="one relation"):
        epsilon([event(), event(relation="replace_one")], DELTA)
    with pytest.raises(ConfigError, match="take 'pld'"):
        epsilon([event(relation="replace_one")], DELTA, accountant="rdp")
    with pytest.raises(ConfigError, match="accountant"):
        epsilon([event()], DELTA, accountant="moments")
    with pytest.raises(ConfigError, match="mechanism"):
        epsilon([replace(event(), mechanism="laplace")], DELTA)
    with pytest.raises(ConfigError, match="at least 0"):
        delta_for([event()], -1.0)


def test_import_is_light():
    code = (
        "import sys, privfed.privacy.accountant, privfed.privacy.calibrate, privfed.privacy.ledger;"
        "heavy = {'dp_accounting', 'torch', 'opacus', 'peft', 'transformers'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
