"""Events of every mechanism in the ledger: what is stored, what an old file says, what falls on everyone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.errors import ConfigError, LedgerError
from privfed.privacy import ledger_cost
from privfed.privacy.accountant import dominating, epsilon, gaussian_mu, plain
from privfed.privacy.ledger import Charge, Ledger
from privfed.privacy.ledger_account import charge_of, content_of_charge, mechanism_text
from privfed.types import EVERYONE, PrivacyEvent

DELTA = 1e-5
OLD = Path(__file__).parents[2] / "vectors" / "ledger_v1.sqlite"
OLD_HEAD = "bd1b17e276d43fcca7f54a9607d2f665f25f6fa9f91bea39121907de65541f34"


def event(steps=10, **more):
    return PrivacyEvent(**{"unit": "client", "noise_multiplier": 1.0, "sampling_probability": 0.1, **more}, steps=steps)


def charge(what, *, client=EVERYONE, number=1, run="r"):
    return Charge(
        run_id=run,
        data_digest="d",
        partition_digest="p",
        client_id=client,
        phase="train",
        round=number,
        input_digest=f"input-{number}",
        event=what,
    )


@pytest.fixture
def old(tmp_path):
    """A ledger that privfed 0.1 wrote, before events had parameters."""
    path = tmp_path / "old.sqlite"
    shutil.copy(OLD, path)
    with Ledger.open(path, create=False) as ledger:
        yield ledger


def test_a_ledger_from_before_mechanisms_still_verifies_and_costs_the_same(old):
    assert old.verify() == []
    assert old.head() == OLD_HEAD
    assert old.spent(data_digest="d" * 64, unit="client", delta=DELTA) == pytest.approx(0.81592, abs=1e-4)
    first = old.entries()[0].charge.event
    assert first == PrivacyEvent(unit="client", noise_multiplier=1.25, sampling_probability=0.058, steps=1)
    assert {entry.charge.event.relation for entry in old.entries(run_id="older")} == {"replace_one"}


def test_an_old_ledger_goes_on_with_a_new_charge(old):
    assert old.charge(replace(charge(event()), data_digest="d" * 64, partition_digest="p" * 64))
    assert old.verify() == []
    assert len(old.entries()) == 6


def test_an_event_without_parameters_is_stored_as_its_name():
    assert mechanism_text(event()) == "gaussian"
    told = event(mechanism="m", parameters=(("a", 0.1), ("b", (1.0, 0.5))))
    assert mechanism_text(told) == 'm{"a":0.1,"b":[1.0,0.5]}'


numbers = st.floats(allow_nan=False, allow_infinity=False)
parameters = st.dictionaries(
    st.text("abcxyz_", min_size=1), st.one_of(numbers, st.lists(numbers, max_size=4).map(tuple)), max_size=4
).map(lambda found: tuple(sorted(found.items())))


@settings(max_examples=60, deadline=None)
@given(found=parameters, name=st.text("abc_", min_size=1))
def test_every_event_comes_back_from_its_row(found, name):
    told = charge(event(mechanism=name, parameters=found))
    assert charge_of(content_of_charge(told)) == told


@pytest.mark.parametrize("text", ["m{", 'm{"a":null}', 'm{"a":"x"}', "m{1}"])
def test_a_mechanism_that_cannot_be_read_is_refused(text):
    row = {**content_of_charge(charge(event())), "mechanism": text}
    with pytest.raises(LedgerError, match="cannot be read"):
        charge_of(row)


def test_no_accountant_takes_a_mechanism_it_does_not_know_or_parameters_that_mean_nothing():
    with pytest.raises(ConfigError, match=r"'gaussian'.*got 'laplace': no accountant knows it"):
        epsilon([event(mechanism="laplace")], DELTA)
    with pytest.raises(ConfigError, match="Expected no parameters of the mechanism 'gaussian'"):
        epsilon([event(parameters=(("a", 1.0),))], DELTA)


def test_what_falls_on_everyone_adds_to_what_falls_on_one():
    """A client-level run and an example-level run on one partition: the second run's clients were in the first."""
    named = event(unit="example", sampling_probability=0.2, steps=50)
    both = {"p": {EVERYONE: (event(steps=100),), "a": (named,)}}
    cost = ledger_cost.cost(both, unit="example", delta=DELTA)
    alone = [
        ledger_cost.cost({"p": {client: events}}, unit="example", delta=DELTA) for client, events in both["p"].items()
    ]
    assert cost > max(alone) * 1.05
    as_one = {"p": {"a": (event(steps=100), named)}}
    assert cost == pytest.approx(ledger_cost.cost(as_one, unit="example", delta=DELTA), rel=1e-6)


def test_the_ledger_remembers_the_first_input_of_a_round(tmp_path):
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        assert ledger.first_input("r", EVERYONE, "train", 1) is None
        ledger.charge(charge(event()))
        ledger.charge(replace(charge(event()), input_digest="later"))
        assert ledger.first_input("r", EVERYONE, "train", 1) == "input-1"
        for other in (("q", EVERYONE, "train", 1), ("r", "a", "train", 1), ("r", EVERYONE, "t", 1)):
            assert ledger.first_input(*other) is None


def test_an_event_costs_what_the_gaussian_steps_that_dominate_it_cost():
    assert plain(event(mechanism="m", parameters=(("a", 1.0),))) == event()
    assert dominating({"a": [event()]}) == (event(),)
    assert gaussian_mu([event(sampling_probability=1.0, steps=4)]).mu == pytest.approx(2.0)
