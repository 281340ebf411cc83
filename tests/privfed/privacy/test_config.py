"""The ``[privacy]`` table: what can hold, what cannot, and what it says then."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from privfed.errors import UnknownNameError
from privfed.privacy.config import PrivacyConfig


def refused(**values):
    with pytest.raises(ValidationError) as caught:
        PrivacyConfig(**values)
    (problem,) = caught.value.errors()
    return problem["msg"]


def test_what_holds():
    assert PrivacyConfig(target_epsilon=2.0).on
    assert PrivacyConfig(noise_multiplier=1.0, unit="client", placement="central").on
    assert PrivacyConfig(noise_multiplier=1.0, placement="local").placement == "local"
    assert not PrivacyConfig(unit="none").on
    assert not PrivacyConfig(unit="none", target_epsilon=2.0, noise_multiplier=1.0).on
    assert not PrivacyConfig(target_epsilon=1.0).reproducible_noise


def test_a_mechanism_is_a_name_or_a_table():
    for given in ("gaussian", {"name": "gaussian"}, {}):
        assert PrivacyConfig(target_epsilon=1.0, mechanism=given).mechanism_name == "gaussian"
    assert PrivacyConfig(target_epsilon=1.0).model_dump()["mechanism"] == {"name": "gaussian"}
    assert "expected the name of a mechanism or a table with one, got 3" in refused(target_epsilon=1.0, mechanism=3)
    assert "name must be a string, got 3" in refused(target_epsilon=1.0, mechanism={"name": 3})
    with pytest.raises(UnknownNameError, match="Did you mean 'gaussian'"):
        PrivacyConfig(target_epsilon=1.0, mechanism="gausian")


def test_an_epsilon_and_a_noise_multiplier_exclude_each_other():
    assert "neither target_epsilon nor noise_multiplier is given" in refused()
    both = refused(target_epsilon=3.0, noise_multiplier=1.5)
    assert "target_epsilon = 3 and noise_multiplier = 1.5 are both given" in both and "unset" in both


@pytest.mark.parametrize("epsilon", [0.0, -1.0, -1e-300])
def test_an_epsilon_that_is_not_positive(epsilon):
    sentence = refused(target_epsilon=epsilon)
    assert "expected a number above 0" in sentence and 'unit = "none"' in sentence
    assert "expected a number above 0" in refused(target_epsilon=epsilon, unit="none")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["target_epsilon", "noise_multiplier", "target_delta", "l2_clip_norm"])
def test_numbers_are_finite(key, value):
    assert "finite" in refused(**{"target_epsilon": 1.0, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_delta", 0.0), ("target_delta", 1.0), ("target_delta", -1e-9), ("l2_clip_norm", 0.0),
        ("l2_clip_norm", -1.0), ("unit", "people"), ("accountant", "gdp"), ("placement", "shuffled"),
        ("neighboring_relation", "zero_out"), ("target_epsilon", "8"), ("reproducible_noise", 1),
    ],
)  # fmt: skip
def test_values_out_of_range(key, value):
    assert refused(**{"target_epsilon": 1.0, key: value})


@pytest.mark.parametrize(
    ("unit", "placement", "works"), [("example", "central", "local"), ("client", "local", "central")]
)
def test_a_placement_that_does_not_go_with_the_unit_names_the_nearest_that_does(unit, placement, works):
    sentence = refused(target_epsilon=1.0, unit=unit, placement=placement)
    assert f"unit = {unit!r} with placement = {placement!r} is not available" in sentence
    assert f"nearest that works is placement = {works!r}" in sentence
