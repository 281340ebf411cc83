"""The fast samplers: exact laws, wrong scales rejected, the rare paths, streams."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
from privfed_noise_checks import SIGNIFICANCE, Scripted, fit, probabilities, same_law, stream
from scipy import stats

from privfed.errors import ConfigError
from privfed.privacy.discrete import sampler as module
from privfed.privacy.discrete.exact import exact_discrete_gaussian, exact_poisson, exact_skellam
from privfed.privacy.discrete.laws import Law
from privfed.privacy.discrete.sampler import make_sampler
from privfed.rng import PrivateStream

LAWS = ["skellam", "discrete_gaussian"]
COUNT = 400_000
VECTORS = Path(__file__).parents[3] / "vectors" / "discrete_noise.json"


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("deviation", [0.7, 2.0, 10.0, 250.0, 300.0, 5000.0])
def test_the_law_is_exact_and_a_scale_off_by_two_percent_is_rejected(name, deviation):
    draws = make_sampler(name, deviation**2).draw(stream("law", name, deviation), COUNT)
    assert fit(draws, name, deviation) > SIGNIFICANCE
    for wrong in (0.98, 1.02):
        assert fit(draws, name, deviation * wrong) < SIGNIFICANCE
    assert abs(draws.mean()) < 5 * deviation / COUNT**0.5


@pytest.mark.parametrize("name", LAWS)
def test_the_two_laws_are_told_apart(name):
    other = LAWS[1 - LAWS.index(name)]
    draws = make_sampler(name, 1.0).draw(stream("told apart", name), COUNT)
    assert fit(draws, other, 1.0) < SIGNIFICANCE


def place(values):
    """Return how far a value lies from the innermost of its block of four."""
    return np.where(values < 0, 3 - values % 4, values % 4)


@pytest.mark.parametrize("name", LAWS)
def test_places_in_a_block_have_their_own_probabilities(name):
    """They differ by less than a hundredth; a sampler that skips the rejection is caught."""
    sampler, count = make_sampler(name, 260.0**2), 6_000_000
    assert sampler.width == 4
    values = np.arange(-sampler.law.cut, sampler.law.cut + 1)
    law = np.bincount(place(values), weights=probabilities(name, 260.0, values))
    careless = replace(sampler, surely_kept=np.full_like(sampler.surely_kept, 2**16))
    for one, right in ((sampler, True), (careless, False)):
        found = np.bincount(place(one.draw(stream("places", name), count)))
        assert (stats.chisquare(found, law / law.sum() * count).pvalue > SIGNIFICANCE) == right


@pytest.mark.parametrize("name", LAWS)
def test_exact_decisions_give_the_same_law(name, monkeypatch):
    """With a margin that sends every open decision to the decimals."""
    monkeypatch.setattr(module, "_MARGIN", 2.0)
    sampler = module._block_sampler(Law(name, 300.0**2))
    assert not sampler.surely_kept.any()
    assert fit(sampler.draw(stream("decimals", name), 3000), name, 300.0, bins=30) > SIGNIFICANCE


@pytest.mark.parametrize("name", LAWS)
def test_the_exact_comparison_turns_where_the_ratio_lies(name):
    sampler = make_sampler(name, 300.0**2)
    value, inner = 403, 400
    with mpmath.workdps(60):
        v = mpmath.mpf(300) ** 2
        if name == "skellam":
            ratio = mpmath.besseli(value, v) / mpmath.besseli(inner, v)
        else:
            ratio = mpmath.exp((inner**2 - value**2) / (2 * v))
        turn = int(mpmath.floor(ratio * 2**140)) << 36  # to the digits that both sides vouch for
    assert sampler._exactly_below(turn - (1 << 36), value, inner)
    assert not sampler._exactly_below(turn + (2 << 36), value, inner)


def test_undecided_levels_go_by_the_exact_ratio():
    sampler = make_sampler("discrete_gaussian", 300.0**2)
    block = 100  # values 400 to 403
    ratio = np.exp((400**2 - 403**2) / (2 * 300.0**2))
    word = int(ratio * 2**48)
    for shift, digits, kept in [(0, 0, True), (0, 2**128 - 1, False), (-2, 2**128 - 1, True), (2, 0, False)]:
        level, rest = (word + shift) >> 32, (word + shift) & (2**32 - 1)
        script = Scripted(rest.to_bytes(4, "little"), digits.to_bytes(16, "big"))
        found = sampler._decide(script, np.array([403]), np.array([block]), np.array([level], dtype=np.uint16))
        assert found.tolist() == [kept] and script.left == 0


@pytest.mark.parametrize(
    ("name", "variance"),
    [(n, v) for n in LAWS for v in (Fraction(1, 3), Fraction(9, 4), Fraction(30))],
)
def test_table_samplers_agree_with_the_oracle(name, variance):
    oracle = exact_skellam if name == "skellam" else exact_discrete_gaussian
    truth = oracle(stream("oracle", name, variance), 200_000, variance)
    table = make_sampler(name, float(variance))
    assert same_law(truth, table.draw(stream("table", name, variance), 1_000_000)) > SIGNIFICANCE
    assert fit(truth, name, float(variance) ** 0.5) > SIGNIFICANCE
    for wrong in (0.95, 1.05):
        other = make_sampler(name, float(variance) * wrong**2)
        assert same_law(truth, other.draw(stream("wrong", name, variance), 1_000_000)) < SIGNIFICANCE


@pytest.mark.parametrize("name", LAWS)
def test_against_the_oracle_a_scale_off_by_two_percent_is_rejected(name):
    variance = Fraction(16)
    oracle = exact_skellam if name == "skellam" else exact_discrete_gaussian
    truth = oracle(stream("oracle 2%", name), 500_000, variance)
    right = make_sampler(name, 16.0).draw(stream("2%", name, "right"), 2_000_000)
    assert same_law(truth, right) > SIGNIFICANCE
    for wrong in (0.98, 1.02):
        draws = make_sampler(name, 16.0 * wrong**2).draw(stream("2%", name, wrong), 2_000_000)
        assert same_law(truth, draws) < SIGNIFICANCE


def test_poisson_oracle():
    mean = Fraction(7, 3)
    draws = exact_poisson(stream("poisson"), COUNT, mean)
    assert abs(draws.mean() - float(mean)) < 5 * (float(mean) / COUNT) ** 0.5
    assert abs(draws.var() - float(mean)) < 0.05 and draws.min() == 0


def test_sums_of_skellam_are_skellam():
    parts = [make_sampler("skellam", 2.5).draw(stream("sum", i), COUNT) for i in range(4)]
    assert fit(sum(parts), "skellam", 10.0**0.5) > SIGNIFICANCE


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("variance", [4.0, 1e6])
def test_draws_are_independent_and_repeatable(name, variance):
    sampler = make_sampler(name, variance)
    draws = sampler.draw(stream("repeat", 1), COUNT)
    assert draws.dtype == np.int32
    assert np.array_equal(draws, sampler.draw(stream("repeat", 1), COUNT))
    other = sampler.draw(stream("repeat", 2), COUNT)
    for first, second in ((draws, other), (draws[:-1], draws[1:]), (np.abs(draws), np.sign(draws))):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / COUNT**0.5


def test_known_answers():
    """The first draws under a known key: another implementation, or another version, can be checked with them."""
    for case in json.loads(VECTORS.read_text()):
        source = PrivateStream(bytes.fromhex(case["key"]), *case["names"])
        draws = make_sampler(case["law"], case["variance"]).draw(source, case["count"])
        assert draws[: len(case["first"])].tolist() == case["first"]
        assert int(draws.astype(np.int64).sum()) == case["sum"]


def test_bad_input():
    with pytest.raises(ConfigError, match="at least 0 values, got -1"):
        make_sampler("skellam", 1.0).draw(stream(), -1)
    assert make_sampler("skellam", 1.0).draw(stream(), 0).size == 0
    with pytest.raises(ConfigError, match="positive fraction"):
        exact_skellam(stream(), 1, Fraction(-1))
    with pytest.raises(ConfigError, match=r"below 2\^31"):
        exact_poisson(stream(), 1, Fraction(1, 2**40))
    with pytest.raises(ConfigError, match="small numerator"):
        exact_discrete_gaussian(stream(), 1, Fraction(2**30, 2**30 - 1))
