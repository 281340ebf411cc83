"""``privfed budget``: the epsilon, the noise or the rounds, per view, and a warning where delta is meaningless."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from privfed.budget import answer, lines
from privfed.config import load_budget_config, load_config
from privfed.errors import ConfigError
from privfed.federation.canaries import plant
from privfed.federation.material import gather, plan_privacy
from privfed.privacy.mechanisms import MECHANISMS

PLAIN = [
    "head_warm_start.name=none", "partition.clients=20", "server.cohort_size=5", "server.rounds=40",
    "client.local_steps=10", "client.sampling_probability=0.05", "privacy.target_delta=1e-5",
]  # fmt: skip


def config(*overrides):
    return load_budget_config("tiny", [*PLAIN, *overrides])


def ask(*overrides, **sizes):
    found, both = config(*overrides)
    return answer(found, both=both, **sizes)


def direct(probability, noise, steps, delta=1e-5):
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    event = dp_event.GaussianDpEvent(noise)
    accountant.compose(dp_event.PoissonSampledDpEvent(probability, event), steps)
    return accountant.get_epsilon(delta)


def test_the_noise_gives_the_epsilon():
    found = ask("privacy.noise_multiplier=0.9", "privacy.target_epsilon=unset")
    assert found["epsilon"] == pytest.approx(direct(0.05, 0.9, 100), rel=2e-3)  # 10 participations of 10 steps
    assert (found["noise_multiplier"], found["rounds"], found["delta"]) == (0.9, 40, 1e-5)


def test_the_epsilon_gives_the_noise():
    found = ask("privacy.target_epsilon=3")
    assert found["epsilon"] <= 3
    assert direct(0.05, found["noise_multiplier"], 100) == pytest.approx(3, rel=5e-3)


def test_both_give_the_rounds():
    found = ask("privacy.target_epsilon=3", "privacy.noise_multiplier=0.9")
    participations = -(-found["rounds"] * 5 // 20)
    assert found["epsilon"] <= 3 and direct(0.05, 0.9, 10 * participations) <= 3 * 1.002
    assert direct(0.05, 0.9, 10 * (-(-(found["rounds"] + 1) * 5 // 20))) > 3
    with pytest.raises(ConfigError, match=r"epsilon 0.01 affords no round at noise multiplier 0.9: raise either"):
        ask("privacy.target_epsilon=0.01", "privacy.noise_multiplier=0.9")


@pytest.mark.parametrize(
    ("unit", "views"), [("example", {"individual", "aggregate", "release"}), ("client", {"release"})]
)
def test_a_view_without_a_guarantee_has_no_epsilon(unit, views):
    noise = ("privacy.noise_multiplier=1", "privacy.target_epsilon=unset")
    found = ask(f"privacy.unit={unit}", *noise, "secagg.name=none")
    assert set(found["views"]) == {"individual", "aggregate", "release"}
    assert {name for name, view in found["views"].items() if view["epsilon"] is not None} == views
    for view in found["views"].values():
        assert {"epsilon", "delta", "noise_multiplier", "rounds", "accountant"} <= view.keys()
    text = "\n".join(lines(found))
    assert text.count("no guarantee") == 3 - len(views)
    assert f"{found['epsilon']:.4f}" in text and f"per {unit}" in text


CLIENT = ("privacy.unit=client", "secagg.name=none", "partition.clients=200", "server.cohort_size=20")


@pytest.mark.parametrize("name", MECHANISMS.names())
def test_every_client_level_mechanism_answers_all_three_questions(name):
    mechanism = f"privacy.mechanism={name}"
    asked = ask(*CLIENT, mechanism, "privacy.target_epsilon=6")
    noise = asked["noise_multiplier"]
    assert asked["epsilon"] == pytest.approx(6, rel=5e-3) and asked["epsilon"] <= 6
    given = ask(*CLIENT, mechanism, f"privacy.noise_multiplier={noise}", "privacy.target_epsilon=unset")
    assert given["epsilon"] == pytest.approx(asked["epsilon"], rel=1e-6)
    rounds = ask(*CLIENT, mechanism, f"privacy.noise_multiplier={noise}", "privacy.target_epsilon=6")
    assert rounds["rounds"] >= 40 and rounds["epsilon"] <= 6
    assert asked["views"]["release"]["epsilon"] == asked["epsilon"] and asked["views"]["aggregate"]["epsilon"] is None
    (phase,) = asked["phases"]
    assert phase["mechanism"] == name
    text = "\n".join(lines(asked))
    assert f"({name}; the noise in the model's sum of averages is {phase['noise_in_model']:.4f} clips)" in text


def test_random_cohorts_that_cannot_be_masked_are_set_aside_or_refused():
    """Three clients at least where one may be corrupt; with n_min given, a window that few cohorts fall into."""
    fixed = ("privacy.noise_multiplier=1", "privacy.target_epsilon=unset", "secagg.name=masked")
    given = (*CLIENT, *fixed, "partition.clients=400", "server.cohort_size=26")
    trusted, careful = ask(*given, "secagg.corrupt=0.0"), ask(*given)
    assert trusted["epsilon"] < careful["epsilon"]
    for n_min in (3, 20):
        with pytest.raises(ConfigError, match=r"more than a tenth of target_delta.*leave secagg.n_min unset"):
            ask(*given, f"secagg.n_min={n_min}")


@pytest.mark.parametrize(("codec", "times"), [("sign", 1.0), ("random_k", 1.0), ("powersgd", 2**0.5)])
def test_with_a_codec_the_noise_is_told_by_what_the_codec_sums(codec, times):
    """In clips it would be wrong: the bound on a client's part of the sum is the codec's, and decoding follows."""
    fixed = (*CLIENT, "privacy.noise_multiplier=1", "privacy.target_epsilon=unset")
    plain, found = ask(*fixed), ask(*fixed, f"compression.name={codec}")
    (phase,) = found["phases"]
    assert "noise_in_model" not in phase
    assert phase["noise_in_sums"] == pytest.approx(times * plain["phases"][0]["noise_in_model"])
    assert f"the noise in the averages of {codec}" in "\n".join(lines(found))
    assert found["epsilon"] == plain["epsilon"]


def test_the_noise_in_the_model_is_that_of_independent_sums():
    found = ask(*CLIENT, "privacy.noise_multiplier=1", "privacy.target_epsilon=unset")
    assert found["phases"][0]["noise_in_model"] == pytest.approx((41 / 2) ** 0.5 / 20)
    banded = ask(*CLIENT, "privacy.mechanism=banded", "privacy.noise_multiplier=1", "privacy.target_epsilon=unset")
    assert banded["phases"][0]["noise_in_model"] < 0.7 * found["phases"][0]["noise_in_model"]


def test_sizes_that_are_given_need_no_data():
    given = ("data.path=nowhere.csv", "client.sampling_probability=unset", "client.batch_size=16")
    found = ask(*given, "privacy.noise_multiplier=1", "privacy.target_epsilon=unset", clients=20, shard_size=320)
    assert found["epsilon"] == pytest.approx(direct(0.05, 1.0, 100), rel=2e-3)


def test_data_is_read_where_the_answer_depends_on_it(tiny_config):
    found = tiny_config(
        client={"sampling_probability": None, "batch_size": 10},
        privacy={"target_epsilon": None, "noise_multiplier": 1.0},
    )
    smallest = min(len(shard) for shard in gather(found).shards)
    participations, steps = 2, found.client.local_steps  # 2 rounds of 3 of 4 clients
    expected = direct(10 / smallest, 1.0, participations * steps, delta=found.privacy.target_delta)
    assert answer(found, both=False)["epsilon"] == pytest.approx(expected, rel=2e-3)


def test_canaries_that_take_the_place_of_records_are_counted_out(tiny_config):
    """Whatever the coins say, the run's sampling probability is not above the one that the answer is for."""
    settings = {"client": {"sampling_probability": None, "batch_size": 10}, "audit": {"canaries": 40}}
    found = tiny_config(privacy={"target_epsilon": None, "noise_multiplier": 1.0}, **settings)
    asked = answer(found, both=False)["phases"][0]["sampling_probability"]
    without = min(len(shard) for shard in gather(found).shards)
    tossed = [plant(found, gather(found), np.random.default_rng(seed).random(40) < 0.5) for seed in range(5)]
    run = [10 / min(len(shard) for shard in each.shards) for each in tossed]
    assert asked >= max(run) > 10 / without


def test_a_run_without_privacy_has_no_budget():
    with pytest.raises(ConfigError, match=r'privacy.unit = "none": there is no budget to compute'):
        answer(load_config("tiny", ["privacy.unit=none"]), both=False)


def test_the_warm_start_is_charged():
    without = ask("privacy.noise_multiplier=1", "privacy.target_epsilon=unset")["epsilon"]
    warm = ["head_warm_start.name=dp_probe", "head_warm_start.rounds=20", "head_warm_start.sampling_probability=0.5"]
    warm.append("head_warm_start.noise_scale=1")
    found, both = load_budget_config(
        "tiny", [*PLAIN[1:], *warm, "privacy.noise_multiplier=1", "privacy.target_epsilon=unset"]
    )
    assert answer(found, both=both)["epsilon"] > without * 1.2


@pytest.mark.parametrize(("delta", "meaningless"), [(1e-5, False), (1 / 199, False), (1 / 198, True), (0.1, True)])
def test_a_delta_of_one_over_n_is_warned_about(tiny_config, delta, meaningless):
    found = tiny_config(privacy={"target_delta": delta, "target_epsilon": None, "noise_multiplier": 1.0})
    material = gather(found)
    assert len(material.dataset.train) == 198
    if meaningless:
        with pytest.warns(UserWarning, match=r"is not below 1 / 198 examples: .* meaningless; lower it"):
            plan_privacy(found, material)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan_privacy(found, material)
