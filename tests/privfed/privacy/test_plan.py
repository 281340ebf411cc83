"""From a run's shape to its epsilon: who takes part how often, composed as dp_accounting itself would."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from privfed.errors import ConfigError
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.plan import PhasePlan, affordable_rounds, make_plan


def two_or_more(clients):
    """A masked sum over any cohort of two."""
    return clients >= 2


DELTA = 1e-5


def privacy(**changes):
    return PrivacyConfig(**{"unit": "example", "noise_multiplier": 1.0, "target_delta": DELTA, **changes})


def both(target, **changes):
    """Return a table with a noise multiplier and a target: the question of how many rounds a budget affords."""
    return privacy(**changes).model_copy(update={"target_epsilon": target})


def phase(rounds=100, cohort=10, clients=100, steps=10, rate=0.05, **changes):
    values = {
        "name": "train",
        "rounds": rounds,
        "cohort_size": cohort,
        "clients": clients,
        "local_steps": steps,
        "probabilities": {f"c{i}": rate for i in range(clients)},
    }
    return PhasePlan(**{**values, **changes})


def direct(*parts, delta=DELTA):
    """Return dp_accounting's own epsilon of (probability, noise, steps) parts, composed."""
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    for probability, noise, steps in parts:
        event = dp_event.GaussianDpEvent(noise)
        accountant.compose(dp_event.PoissonSampledDpEvent(probability, event) if probability < 1 else event, steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(
    ("rounds", "cohort", "clients", "expected"),
    [(100, 10, 100, 10), (100, 100, 100, 100), (10, 3, 4, 8), (3, 3, 4, 3), (1, 1, 50, 1), (7, 5, 10, 4)],
)
def test_participations_are_the_most_that_balanced_cohorts_reach(rounds, cohort, clients, expected):
    assert phase(rounds, cohort, clients).participations == expected == math.ceil(rounds * cohort / clients)


@pytest.mark.parametrize(("cohort", "epsilon"), [(100, 10.99), (10, 3.50)])
def test_golden_example_level(cohort, epsilon):
    """Taking part in every round, and in ten of a hundred; never the naive product of the two sampling rates."""
    plan = make_plan(privacy(), [phase(cohort=cohort)], masks=two_or_more)
    assert plan.epsilon == pytest.approx(epsilon, abs=0.006)
    assert plan.noise_multiplier == 1.0
    assert plan.epsilon == pytest.approx(direct((0.05, 1.0, 10 * cohort)), rel=2e-3)
    assert plan.lost_rounds_delta == 0
    naive = direct((0.05 * cohort / 100, 1.0, 1000))
    if cohort == 10:
        assert naive < 0.9 < plan.epsilon


def test_golden_client_level():
    plan = make_plan(privacy(unit="client"), [phase(cohort=100, clients=1000)], masks=None)
    assert plan.epsilon == pytest.approx(7.05, abs=0.01)
    assert list(plan.events_by_client) == ["*"]
    (event,) = plan.events_by_client["*"]
    assert (event.unit, event.sampling_probability, event.steps) == ("client", 0.1, 100)


def test_client_level_does_not_count_local_steps_and_example_level_does():
    for unit, same in (("client", True), ("example", False)):
        few, many = (
            make_plan(privacy(unit=unit), [phase(20, 50, 100, steps)], masks=None).epsilon for steps in (1, 10)
        )
        assert (few == many) is same


def test_warm_start_and_training_compose_jointly():
    warm = phase(20, 100, 100, 1, rate=0.5, name="warm_start", noise_scale=3.0)
    main = phase(100, 10, 100, 10)
    together = make_plan(privacy(), [warm, main], masks=two_or_more)
    assert together.epsilon == pytest.approx(direct((0.5, 3.0, 20), (0.05, 1.0, 100)), rel=2e-3)
    alone = [make_plan(privacy(), [part], masks=two_or_more).epsilon for part in (warm, main)]
    assert max(alone) < together.epsilon < sum(alone)  # charged, and not by adding epsilons up
    first, second = together.events_by_client["c0"]
    assert (first.noise_multiplier, first.steps, first.sampling_probability) == (3.0, 20, 0.5)
    assert (second.noise_multiplier, second.steps, second.sampling_probability) == (1.0, 100, 0.05)


def test_the_noise_of_every_phase_keeps_its_scale_when_solved_for():
    warm = phase(20, 100, 100, 1, rate=0.5, name="warm_start", noise_scale=3.0)
    plan = make_plan(privacy(noise_multiplier=None, target_epsilon=4.0), [warm, phase()], masks=two_or_more)
    sigma = plan.noise_multiplier
    assert plan.epsilon <= 4.0
    assert plan.epsilon == pytest.approx(4.0, rel=5e-3)
    assert direct((0.5, 3 * sigma, 20), (0.05, sigma, 100)) == pytest.approx(plan.epsilon, rel=2e-3)
    quieter = make_plan(privacy(noise_multiplier=sigma), [replace(warm, noise_scale=6.0), phase()], masks=two_or_more)
    assert quieter.epsilon < plan.epsilon  # more noise in the first phase leaves more of the budget


def test_the_most_exposed_client_sets_epsilon():
    uneven = phase(10, 3, 3, 5, probabilities={"small": 0.5, "large": 0.01, "middle": 0.1})
    plan = make_plan(privacy(), [uneven], masks=two_or_more)
    assert plan.worst_client == "small"
    assert plan.epsilon == pytest.approx(direct((0.5, 1.0, 50)), rel=2e-3)
    assert {c: events[0].sampling_probability for c, events in plan.events_by_client.items()} == {
        "small": 0.5,
        "large": 0.01,
        "middle": 0.1,
    }


def test_the_worst_client_is_the_one_whose_cost_is_highest():
    warm = phase(5, 2, 2, 1, name="warm_start", probabilities={"a": 0.9, "b": 0.3})
    main = phase(5, 2, 2, 1, probabilities={"a": 0.3, "b": 0.1})
    plan = make_plan(privacy(), [warm, main], masks=two_or_more)
    assert plan.worst_client == "a"


def test_masked_client_level_with_a_tiny_cohort_is_refused_in_a_sentence():
    with pytest.raises(ConfigError) as caught:
        make_plan(privacy(unit="client"), [phase(10, 5, 20)], masks=two_or_more)
    sentence = str(caught.value)
    assert "5 expected clients" in sentence and "than [secagg] can mask with probability" in sentence
    assert sentence.endswith('leave secagg.n_min unset, or set secagg.name = "none".')
    assert make_plan(privacy(unit="client"), [phase(10, 5, 20)], masks=None).lost_rounds_delta == 0


def test_rounds_that_may_be_lost_are_taken_out_of_delta():
    plan = make_plan(privacy(unit="client", noise_multiplier=2.0), [phase(100, 22, 100)], masks=two_or_more)
    assert 0 < plan.lost_rounds_delta < 0.1 * DELTA
    assert plan.delta == DELTA
    exact = direct((0.22, 2.0, 100), delta=DELTA - plan.lost_rounds_delta)
    assert plan.epsilon == pytest.approx(exact, rel=2e-3)
    assert (
        plan.epsilon
        > make_plan(privacy(unit="client", noise_multiplier=2.0), [phase(100, 22, 100)], masks=None).epsilon
    )


@pytest.mark.parametrize("warm", [False, True])
def test_affordable_rounds_fit_and_one_more_participation_does_not(warm):
    table = both(5.0)
    before = [phase(5, 100, 100, 1, rate=0.5, name="warm_start", noise_scale=4.0)] if warm else []
    rounds = affordable_rounds(table, [*before, phase(1, 30)], masks=two_or_more)
    assert rounds > 1
    given = privacy()
    assert make_plan(given, [*before, phase(rounds, 30)], masks=two_or_more).epsilon <= 5.0
    above = make_plan(given, [*before, phase(rounds + 1, 30)], masks=two_or_more)
    most = phase(rounds, 30).participations
    assert above.events_by_client["c0"][-1].steps == (most + 1) * 10
    assert above.epsilon > 5.0


@pytest.mark.parametrize("masks", [None, two_or_more])
def test_affordable_rounds_under_client_level_keep_what_masking_takes_out_of_delta(masks):
    table = both(6.0, unit="client", noise_multiplier=2.0)
    given = privacy(unit="client", noise_multiplier=2.0)
    rounds = affordable_rounds(table, [phase(1, 22)], masks=masks)
    assert make_plan(given, [phase(rounds, 22)], masks=masks).epsilon <= 6.0
    assert make_plan(given, [phase(rounds + 1, 22)], masks=masks).epsilon > 6.0


def test_questions_without_an_answer():
    with pytest.raises(ConfigError, match="A budget that no noise reaches"):
        make_plan(
            privacy(noise_multiplier=None, target_epsilon=1e-5), [phase(10**5, 100, 100, rate=1.0)], masks=two_or_more
        )
    with pytest.raises(ConfigError, match="nothing to plan"):
        make_plan(PrivacyConfig(unit="none"), [phase()], masks=two_or_more)
    for table in (privacy(), PrivacyConfig(unit="none"), privacy(noise_multiplier=None, target_epsilon=1.0)):
        with pytest.raises(ConfigError, match="give both"):
            affordable_rounds(table, [phase()], masks=two_or_more)
    assert affordable_rounds(both(1e-3), [phase()], masks=two_or_more) == 0


def test_rdp_and_replace_one_are_passed_on():
    one = [phase(20, 10, 100)]
    pld, rdp = (make_plan(privacy(accountant=name), one, masks=two_or_more).epsilon for name in ("pld", "rdp"))
    assert pld < rdp < 1.6 * pld
    replaced = make_plan(privacy(neighboring_relation="replace_one"), one, masks=two_or_more)
    assert replaced.epsilon > 1.1 * pld
    assert replaced.events_by_client["c0"][0].relation == "replace_one"
