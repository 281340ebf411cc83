"""Correlated noise: who takes part, what is charged when, the noise's scale and correlation, what it buys."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.errors import ConfigError, ResumeError
from privfed.privacy.accountant import check_event, delta_for, epsilon
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.mechanisms import MECHANISMS, REPEATED, Moment, built
from privfed.privacy.noise import gaussian_noise
from privfed.privacy.plan import affordable_rounds, make_plan
from privfed.privacy.spending import spent_so_far
from privfed.privacy.toeplitz import inverse, prefix_error, sensitivity
from privfed.types import EVERYONE


def two_or_more(clients):
    """A masked sum over any cohort of two."""
    return clients >= 2


BOTH = pytest.mark.parametrize("sampling", ["cyclic_poisson", "min_separation"])


def mechanism(**options):
    return built(MECHANISMS.get("banded").config(**options))


def table(**changes):
    values = {"unit": "client", "noise_multiplier": 1.0, "mechanism": {"name": "banded", "bands": 4}}
    return PrivacyConfig(**{**values, **changes})


def plausible(draws, sigma, significance=1e-6):
    """Two-sided chi-square test of the variance, mean known to be 0."""
    statistic = float(np.sum((np.asarray(draws) / sigma) ** 2))
    law = stats.chi2(np.size(draws))
    return min(law.cdf(statistic), law.sf(statistic)) > significance / 2


# --- who takes part ----------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(clients=st.integers(1, 60), share=st.floats(0.01, 1), rounds=st.integers(1, 40), seed=st.integers(0, 99))
def test_turns_are_as_far_apart_and_as_few_as_accounted(make, clients, share, rounds, seed):
    cohort = max(1, int(share * clients))
    plan = {"clients": clients, "cohort_size": cohort, "rounds": rounds}
    work = mechanism(bands=1, sampling="min_separation").at_work(make.site(plan=plan, seed=seed))
    names = [f"c{i}" for i in range(clients)]
    turns = {name: [] for name in names}
    for number in range(1, rounds + 1):
        chosen, probability = work.sampled(names, number)
        assert probability == 1.0 and len(set(chosen)) == len(chosen) == cohort
        for name in chosen:
            turns[name].append(number)
    found = dict(work.event.parameters)
    assert max(map(len, turns.values())) <= found["participations"]
    gaps = [b - a for each in turns.values() for a, b in itertools.pairwise(each)]
    assert min(gaps, default=math.inf) >= found["separation"]


def test_groups_are_a_division_and_come_round_in_cycles(make):
    work = mechanism(bands=4).at_work(make.site(plan={"clients": 22, "cohort_size": 5}))
    names = [f"c{i}" for i in range(22)]
    groups = [set(work.sampled(names, number)[0]) for number in range(1, 13)]
    assert groups[:4] == groups[4:8] == groups[8:]
    assert sorted(name for group in groups[:4] for name in group) == sorted(names)
    assert {len(group) for group in groups} == {5, 6}
    assert work.sampled(names, 1)[1] == pytest.approx(20 / 22)


def test_groups_smaller_than_a_cohort_are_refused(make):
    with pytest.raises(ConfigError, match=r"bands = 6 makes groups of 16 clients.*cohort of 20.*at most 5 bands"):
        mechanism(bands=6).stage(make.plan())
    assert mechanism(bands=5).stage(make.plan()).sampling_probability == 1.0
    assert mechanism().bands(make.plan()) == 5
    assert mechanism().bands(make.plan(cohort_size=2)) == 8
    assert mechanism(sampling="min_separation").bands(make.plan()) == 8


# --- what it costs -----------------------------------------------------------------------------------------------


def test_one_band_is_dp_fedavg(make):
    phase = [make.plan(probabilities={"a": 1.0}, rounds=50)]
    plain, one = (
        make_plan(table(mechanism=each), phase, masks=None) for each in ("gaussian", {"name": "banded", "bands": 1})
    )
    assert one.epsilon == plain.epsilon


def test_cycles_are_poisson_samples_of_groups(make):
    (event,) = make_plan(table(), [make.plan(probabilities={"a": 1.0}, rounds=10)], masks=None).events_by_client["*"]
    assert (event.sampling_probability, event.steps, event.noise_multiplier) == (0.8, 3, 1.0)
    check_event(event)


def test_turns_are_one_gaussian_with_the_sensitivity_of_the_whole(make):
    """100 clients by 20: 5 rounds apart, 6 turns in 28 rounds; four bands fit, so it is sqrt of their norms."""
    plan = make.plan(rounds=28)
    event = mechanism(bands=4, sampling="min_separation").event(plan, 2.0, "add_or_remove_one")
    c_B = np.array(dict(event.parameters)["coefficients"])
    expected = math.sqrt(5 + np.sum(c_B[:3] ** 2))  # the sixth column is cut off after three rounds
    assert (event.sampling_probability, event.steps) == (1.0, 1)
    assert event.noise_multiplier == pytest.approx(2.0 / expected)
    check_event(event)


@BOTH
def test_an_event_that_claims_more_noise_than_it_has_is_refused(sampling, make):
    event = mechanism(bands=3, sampling=sampling).event(make.plan(), 1.0, "add_or_remove_one")
    found = dict(event.parameters)

    def told(**changes):
        return replace(event, parameters=tuple(sorted({**found, **changes}.items())))

    with pytest.raises(ConfigError, match="makes less"):
        check_event(replace(event, noise_multiplier=event.noise_multiplier * 1.001))
    with pytest.raises(ConfigError, match="makes less"):
        check_event(told(coefficients=tuple(1.01 * c for c in found["coefficients"])))
    with pytest.raises(ConfigError, match="decreasing"):
        check_event(told(coefficients=tuple(sorted(found["coefficients"]))))
    with pytest.raises(ConfigError, match="incomplete"):
        check_event(replace(event, parameters=event.parameters[1:]))
    with pytest.raises(ConfigError, match="incomplete"):
        check_event(replace(event, unit="example"))
    if sampling == "cyclic_poisson":
        with pytest.raises(ConfigError, match="contradicts"):
            check_event(told(groups=2.0))
    else:
        with pytest.raises(ConfigError, match="contradicts"):
            check_event(replace(event, sampling_probability=0.5))
        with pytest.raises(ConfigError, match="makes less"):
            check_event(told(participations=found["participations"] + 1, separation=found["separation"] - 1))


def _losses(c_B, rounds, probability, every, sigma, count=400_000):
    """Return the privacy losses, under the unit's presence, of a unit that may take part every so many rounds.

    The exact likelihood ratio of C x + z where every participation has its own coin.
    """
    rng = np.random.default_rng(7)
    column = np.zeros(rounds)
    column[: len(c_B)] = c_B
    turns = list(range(0, rounds, every))
    columns_KN = np.array([np.concatenate([np.zeros(t), column[: rounds - t]]) for t in turns])
    coins = rng.random((count, len(turns))) < probability
    u = coins @ columns_KN + sigma * rng.standard_normal((count, rounds))
    ratio = np.zeros(count)
    for chosen in itertools.product((0, 1), repeat=len(turns)):
        shift_N = np.array(chosen) @ columns_KN
        weight = math.prod(probability if bit else 1 - probability for bit in chosen)
        ratio += weight * np.exp((u @ shift_N - shift_N @ shift_N / 2) / sigma**2)
    return np.log(ratio)


def _delta(losses, eps):
    """Return the estimate of delta at ``eps`` and its standard error."""
    terms = np.maximum(0.0, -np.expm1(eps - losses))
    return terms.mean(), terms.std() / math.sqrt(len(terms))


@pytest.mark.parametrize(("probability", "sigma"), [(0.3, 0.8), (0.9, 1.5)])
def test_the_true_loss_of_a_run_is_the_accounted_one(probability, sigma, make):
    """Nine rounds, three bands: exact likelihood ratios against the event. A unit in two groups costs more."""
    plan = make.plan(rounds=9, clients=1000, cohort_size=round(1000 * probability / 3))
    event = mechanism(bands=3).event(plan, sigma, "add_or_remove_one")
    event = replace(event, sampling_probability=probability)
    c_B = np.array(dict(event.parameters)["coefficients"])
    losses, twice = (_losses(c_B, 9, probability, every, sigma) for every in (3, 2))
    for eps in (0.5, 1.0, 2.0):
        accounted = delta_for([event], eps)
        value, error = _delta(losses, eps)
        assert value <= accounted + 5 * error
        assert value == pytest.approx(accounted, rel=0.03)  # the account is tight, too
        beyond, error = _delta(twice, eps)
        assert beyond > accounted + 5 * error  # what the server enforces is needed


def test_what_is_charged_is_never_less_than_what_was_released(make, keeper):
    """Stopped after any round: the ledger has paid for every group's every turn so far."""
    plan = {"rounds": 11, "clients": 80}
    drive = make.Drive(mechanism(bands=4).at_work(make.site(plan=plan)), keeper())
    for number in range(1, 12):
        drive.zeros(10)
        (charged,) = drive.keeper.ledger.events_of("run")[EVERYONE]
        turns = max(len([t for t in range(1, number + 1) if (t - 1) % 4 == group]) for group in range(4))
        assert charged.steps == turns
    assert charged.steps == 3
    assert len(drive.keeper.ledger.entries()) == 11


def test_turns_are_paid_for_in_full_before_the_first_release(make, keeper):
    work = mechanism(bands=4, sampling="min_separation").at_work(make.site())
    drive = make.Drive(work, keeper())
    for _ in range(3):
        drive.zeros(10)
        assert drive.keeper.ledger.events_of("run")[EVERYONE] == (work.event,)


@BOTH
def test_what_was_spent_so_far_follows_the_charges(sampling, make):
    found = table(mechanism={"name": "banded", "bands": 4, "sampling": sampling})
    phase = make.plan(probabilities={"a": 1.0}, rounds=10)
    whole = make_plan(found, [phase], masks=None)
    spent = spent_so_far(found, whole, [phase])
    course = [spent("train", number) for number in range(1, 11)]
    (event,) = whole.events_by_client["*"]
    for number, value in enumerate(course, start=1):
        steps = math.ceil(number / 4) if sampling == "cyclic_poisson" else 1
        assert value == pytest.approx(epsilon([replace(event, steps=steps)], found.target_delta))
    assert course[-1] == whole.epsilon


# --- the questions before a run ----------------------------------------------------------------------------------


@BOTH
def test_noise_for_a_budget_and_rounds_for_a_budget(sampling, make):
    given = table(mechanism={"name": "banded", "bands": 4, "sampling": sampling}, noise_multiplier=None,
                  target_epsilon=4.0)  # fmt: skip
    phase = make.plan(probabilities={"a": 1.0}, rounds=40)
    solved = make_plan(given, [phase], masks=None)
    assert solved.epsilon <= 4.0
    assert solved.epsilon == pytest.approx(4.0, rel=5e-3)
    both = given.model_copy(update={"noise_multiplier": solved.noise_multiplier})
    rounds = affordable_rounds(both, [phase], masks=None)
    assert rounds >= 40
    fixed = table(mechanism=given.mechanism, noise_multiplier=solved.noise_multiplier)
    assert make_plan(fixed, [replace(phase, rounds=rounds)], masks=None).epsilon <= 4.0
    assert make_plan(fixed, [replace(phase, rounds=rounds + 5)], masks=None).epsilon > 4.0


def test_small_groups_are_set_aside_or_refused_under_masking(make):
    """The smallest group counts, and a schedule has no small cohorts."""
    few = make.plan(probabilities={"a": 1.0}, cohort_size=4, rounds=10)
    with pytest.raises(ConfigError, match=r"than \[secagg\] can mask"):
        make_plan(table(), [few], masks=two_or_more)
    assert make_plan(table(), [few], masks=None).lost_rounds_delta == 0
    turns = table(mechanism={"name": "banded", "sampling": "min_separation"})
    assert make_plan(turns, [few], masks=two_or_more).lost_rounds_delta == 0
    assert mechanism(bands=4).others(few) == (24, pytest.approx(0.16))


# --- the noise ---------------------------------------------------------------------------------------------------


def _course(make, keeper, rounds=12, size=4000, **options):
    """Return the mechanism and what it added to nothing, round by round [N, D]."""
    site = make.site(size=size, l2_clip_norm=0.5, noise_multiplier=1.3, plan={"rounds": rounds})
    work = mechanism(**options).at_work(site)
    drive = make.Drive(work, keeper())
    return work, np.array([drive.zeros(size) * 20 for _ in range(rounds)])


@BOTH
def test_noise_has_the_accounted_scale_and_correlation(sampling, make, keeper):
    """C times the noise is white, of the planned deviation; no other scale and no other matrix makes it so."""
    work, noise_ND = _course(make, keeper, bands=4, sampling=sampling)
    rounds, sigma = len(noise_ND), 1.3 * 0.5
    inverse_N = inverse(work.coefficients_B, rounds)

    def whitened(inverse_N):
        solved = np.empty_like(noise_ND)
        for t in range(rounds):
            earlier = sum(inverse_N[t - s] * solved[s] for s in range(t))
            solved[t] = (noise_ND[t] - earlier) / inverse_N[0]
        return solved

    def white(z_ND, sigma):
        covariance = z_ND @ z_ND.T / z_ND.shape[1]
        off = covariance[~np.eye(rounds, dtype=bool)]
        return plausible(z_ND, sigma) and np.abs(off).max() < 5.5 * sigma**2 / math.sqrt(z_ND.shape[1])

    z_ND = whitened(inverse_N)
    assert white(z_ND, sigma)
    for wrong in (2 / 3, 3 / 2):
        assert not white(z_ND, sigma * wrong)
    independent = np.zeros(rounds)
    independent[0] = inverse_N[0]
    assert not white(whitened(independent), sigma)  # the releases themselves are correlated
    other = inverse(np.array([1.0, 0.3, 0.1]), rounds)
    assert not white(whitened(other * inverse_N[0]), sigma)


def test_running_sums_are_off_by_what_is_promised(make, keeper):
    work, noise_ND = _course(make, keeper, bands=5, rounds=20)
    measured = math.sqrt(np.mean(np.cumsum(noise_ND, axis=0) ** 2))
    assert measured == pytest.approx(1.3 * 0.5 * prefix_error(work.coefficients_B, 20), rel=0.05)
    assert measured < 0.7 * 1.3 * 0.5 * math.sqrt(21 / 2)  # independent noise of the same deviation


def test_correlated_noise_beats_independent_noise_at_the_same_epsilon(make, keeper):
    """1,727 clients in cohorts of 100 over 100 rounds, epsilon 8: measured error of the running sum of noise."""
    phase = make.plan(clients=1727, cohort_size=100, rounds=100, probabilities={"a": 1.0})
    errors = {}
    for name in ("gaussian", "banded"):
        given = PrivacyConfig(unit="client", target_epsilon=8.0, mechanism=name)
        noise = make_plan(given, [phase], masks=None).noise_multiplier
        work = built(given.mechanism).at_work(make.site(plan={"clients": 1727, "cohort_size": 100, "rounds": 100},
                                                        size=300, noise_multiplier=noise))  # fmt: skip
        drive = make.Drive(work, keeper())
        sums_ND = np.cumsum([drive.zeros(300) for _ in range(100)], axis=0)
        errors[name] = math.sqrt(np.mean(sums_ND**2))
        told = built(given.mechanism).running_error(phase, noise)
        assert errors[name] == pytest.approx(told, rel=0.1)
    assert errors["banded"] < 0.9 * errors["gaussian"]


# --- again, lost and repeated ------------------------------------------------------------------------------------


@BOTH
def test_a_lost_round_is_charged_and_the_noise_goes_on(sampling, make, keeper):
    site = make.site(size=4000, plan={"rounds": 6})
    work = mechanism(bands=3, sampling=sampling).at_work(site)
    drive = make.Drive(work, keeper())
    lost = drive.release(None, lost="too few")
    assert (lost.mean_D, lost.lost) == (None, "too few")
    noise_D = drive.zeros(4000) * 20
    assert len(drive.keeper.ledger.entries()) == 2
    kept = bytes(lost.memory["inputs"].astype(np.uint8)).hex()
    assert kept == drive.keeper.ledger.entries()[0].charge.input_digest
    z_D = gaussian_noise(drive.keeper.stream("noise", "train", 1, kept), 4000, 1.0)
    share = float(noise_D @ z_D / (z_D @ z_D))
    assert share == pytest.approx(work.inverse_N[1], abs=5 * work.inverse_N[0] / math.sqrt(4000))
    assert abs(work.inverse_N[1]) > 10 * work.inverse_N[0] / math.sqrt(4000)


@BOTH
def test_a_repeated_round_is_lost_and_goes_on_with_the_noise_of_the_first(sampling, make, keeper):
    """Else one turn of a client would be seen in more rows than were paid for."""
    work = mechanism(bands=3, sampling=sampling).at_work(make.site(plan={"rounds": 6}))
    drive = make.Drive(work, keeper())
    drive.zeros(10)
    before = drive.memory
    first = drive.release(np.zeros(10))
    charged = drive.keeper.ledger.head()
    again = work.release(np.ones(10), Moment(phase="train", round=2, broadcast=b""), drive.keeper, before)
    assert (again.mean_D, again.lost) == (None, REPEATED)
    assert again.memory["inputs"].tobytes() == first.memory["inputs"].tobytes()
    assert drive.keeper.ledger.head() == charged


def test_a_restart_from_the_beginning_gives_the_same_bits(make, keeper, tmp_path):
    path = tmp_path / "one.sqlite"
    courses = []
    for _ in range(2):
        drive = make.Drive(mechanism(bands=4).at_work(make.site()), keeper(path=path))
        courses.append([drive.zeros(10).tobytes() for _ in range(5)])
    assert courses[0] == courses[1]
    assert len(drive.keeper.ledger.entries()) == 5
    other = make.Drive(mechanism(bands=4).at_work(make.site()), keeper(key=bytes(32)))
    assert other.zeros(10).tobytes() != courses[0][0]


@pytest.mark.parametrize("fault", ["another course", "no memory", "other coefficients"])
def test_a_memory_of_another_course_is_refused(fault, make, keeper):
    drive = make.Drive(mechanism(bands=4).at_work(make.site()), keeper())
    drive.zeros(10)
    if fault == "another course":
        drive.number = 4
    elif fault == "no memory":
        drive.memory = {}
    else:
        drive.memory = {**drive.memory, "coefficients": drive.memory["coefficients"] * 0.99}
    charged = drive.keeper.ledger.head()
    with pytest.raises(ResumeError, match="correlated noise needs in round"):
        drive.zeros(10)
    assert drive.keeper.ledger.head() == charged


def test_the_sensitivity_is_no_guess(make):
    """The event's noise multiplier times the sensitivity, found by trying all sets of turns, is the deviation."""
    plan = make.plan(clients=7, cohort_size=3, rounds=8)
    event = mechanism(bands=3, sampling="min_separation").event(plan, 1.0, "add_or_remove_one")
    c_B = np.array(dict(event.parameters)["coefficients"])
    assert sensitivity(c_B, 8, 4, 2) == pytest.approx(1 / event.noise_multiplier)
