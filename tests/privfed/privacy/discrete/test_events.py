"""Integer noise as privacy events: what is stored, what is checked, and how the accountants take it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from privfed.errors import ConfigError
from privfed.privacy.accountant import check_event, delta_for, dominating, epsilon, epsilon_curve, gaussian_mu, plain
from privfed.privacy.discrete.accounting import epsilon as discrete_epsilon
from privfed.privacy.discrete.events import PARAMETERS, discrete_of, event_of
from privfed.privacy.discrete.params import DiscreteParams
from privfed.privacy.discrete.sensitivity import recommended_scale
from privfed.privacy.ledger_account import Charge, charge_of, content_of_charge
from privfed.privacy.ledger_cost import cost
from privfed.types import PrivacyEvent

DELTA = 1e-5


def _params(**changes):
    values = {
        "length": 1000,
        "l2_clip_norm": 1.0,
        "contribution_norm": 1.0,
        "scale": recommended_scale(1.0, 1000),
        "ring_bits": 24,
        "local_variance": 1e5,
        "n": 10,
        "n_min": 7,
        "corrupt": 0.1,
        "dropped": 0.3,
        "unit": "client",
    }
    return DiscreteParams(**{**values, **changes})


def _event(survivors=7, **changes):
    return event_of(_params(**changes).event(survivors, steps=4))


def _with(event, **parameters):
    return replace(event, parameters=tuple(sorted({**dict(event.parameters), **parameters}.items())))


@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
def test_an_event_says_all_that_its_cost_depends_on(noise):
    original = _params(noise=noise).event(8, steps=4)
    stored = event_of(original)
    assert discrete_of(stored) == original
    assert stored.mechanism == noise and tuple(dict(stored.parameters)) == PARAMETERS
    check_event(stored)
    for accountant in ("pld", "rdp"):
        assert epsilon([stored], DELTA, accountant=accountant) == discrete_epsilon([original], DELTA)
    assert epsilon_curve([stored], [1e-4, DELTA])[1] == (DELTA, discrete_epsilon([original], DELTA))
    assert gaussian_mu([stored]) is None
    charge = Charge(
        run_id="r",
        data_digest="d",
        partition_digest="p",
        client_id="c",
        phase="t",
        round=1,
        input_digest="i",
        event=stored,
    )
    assert charge_of(content_of_charge(charge)) == charge


def test_it_is_never_composed_as_the_gaussian_of_its_noise_multiplier():
    stored = _event(length=4, scale=10.0, local_variance=5.0)  # so few steps that the difference shows
    gaussian = plain(replace(stored, mechanism="gaussian", parameters=()))
    assert plain(stored) == stored
    assert epsilon([stored], DELTA) > 1.02 * epsilon([gaussian], DELTA, accountant="rdp")
    mixed = epsilon([stored, gaussian], DELTA)
    assert mixed > epsilon([replace(stored, steps=6)], DELTA)
    assert mixed < epsilon([replace(stored, steps=8)], DELTA)  # a Gaussian step is the cheaper one
    assert epsilon([gaussian, gaussian], DELTA, accountant="rdp") < mixed


def test_gaussian_steps_beside_integer_noise_cost_what_renyi_says():
    gaussian = PrivacyEvent(unit="client", noise_multiplier=1.3, sampling_probability=0.2, steps=40)
    hardly = _event(local_variance=1e12)  # so much noise that its own cost is next to nothing
    alone = epsilon([gaussian], DELTA, accountant="rdp")
    assert epsilon([gaussian, hardly], DELTA) == pytest.approx(alone, rel=0.02)  # on a coarser grid of orders
    sampled = replace(gaussian, relation="replace_one")
    with pytest.raises(ConfigError, match="cannot be composed for replace_one"):
        epsilon([sampled, replace(hardly, relation="replace_one")], DELTA)


def test_delta_for_is_the_inverse():
    stored = _event()
    value = epsilon([stored], DELTA)
    assert DELTA * 0.98 <= delta_for([stored], value) <= DELTA * 1.02
    assert delta_for([stored], 0.0) > 0.1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda e: replace(e, noise_multiplier=1.01 * e.noise_multiplier), "Expected the noise multiplier"),
        (lambda e: _with(e, variance=1.01 * dict(e.parameters)["variance"]), "Expected the noise multiplier"),
        (lambda e: _with(e, l1=0.9 * dict(e.parameters)["l1"]), "Expected l1 of at least"),
        (lambda e: _with(e, sampler_distance=0.0), "sampler_distance"),
        (lambda e: _with(e, more=1.0), "got 'skellam' with"),
        (lambda e: _with(e, l2=math.inf), "finite parameters"),
        (lambda e: replace(e, parameters=()), "with none"),
        (lambda e: replace(e, mechanism="laplace"), "no accountant knows it"),
    ],
)
def test_an_event_that_claims_too_much_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        epsilon([changed(_event())], DELTA)


def test_more_survivors_cost_less_and_forgetting_the_corrupt_ones_is_seen():
    costs = [epsilon([_event(k)], DELTA) for k in (7, 8, 9, 10)]
    assert costs == sorted(costs, reverse=True) and costs[0] > 1.1 * costs[-1]
    assert epsilon([_event(7, corrupt=0.0)], DELTA) < 0.95 * costs[0]
    told = dict(_event(7).parameters)
    assert (told["shares"], told["variance"]) == (6.0, 6e5)


def test_a_ledger_adds_up_clients_runs_and_relations():
    stored = _event()
    alone = epsilon([stored], DELTA)
    partitions = {"p": {"a": (stored,), "b": (replace(stored, steps=2),), "*": (replace(stored, steps=0),)}}
    assert cost(partitions, unit="client", delta=DELTA) == alone
    # per example: its client's vector is replaced, not removed
    replaced = epsilon([replace(stored, relation="replace_one")], DELTA)
    assert cost(partitions, unit="example", delta=DELTA) == pytest.approx(replaced)
    assert replaced > 1.5 * alone


def test_domination_compares_integer_noise_with_its_own_kind_only():
    small = event_of(_params(unit="example").event(7, steps=3, sampling_probability=0.1))
    large = replace(small, sampling_probability=0.3)
    other = event_of(_params(unit="example", local_variance=2e5).event(7, steps=5, sampling_probability=0.2))
    assert dominating({"a": (small,), "b": (large,)}) == (large,)
    both = dominating({"a": (small, other), "b": (large,)})
    assert set(both) == {large, other}
    assert epsilon(both, DELTA) >= max(epsilon([small, other], DELTA), epsilon([large], DELTA))
