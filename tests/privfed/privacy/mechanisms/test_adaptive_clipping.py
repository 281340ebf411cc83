"""Adaptive clipping: the split of the noise, the clip's course, both noises' scales, one round of the federation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.errors import ClientError, ConfigError, ProtocolError
from privfed.privacy.accountant import check_event, epsilon
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.mechanisms import MECHANISMS, built
from privfed.privacy.mechanisms.adaptive_clipping import joint_noise, update_noise
from privfed.privacy.plan import make_plan
from privfed.types import PrivacyEvent


def mechanism(**options):
    return built(MECHANISMS.get("adaptive_clipping").config(**options))


def plausible(draws, sigma, significance=1e-6):
    """Two-sided chi-square test of the variance, mean known to be 0."""
    statistic = float(np.sum((np.asarray(draws) / sigma) ** 2))
    law = stats.chi2(np.size(draws))
    return min(law.cdf(statistic), law.sf(statistic)) > significance / 2


# --- the split ---------------------------------------------------------------------------------------------------


def test_the_split_by_hand():
    """z = 1 and sigma_b = 5: 1 / sqrt(1 - 1/100); z = 2 and sigma_b = 2: 1 / sqrt(1/4 - 1/16)."""
    assert update_noise(1.0, 5.0) == pytest.approx(1.0050378152592121, rel=1e-12)
    assert update_noise(2.0, 2.0) == pytest.approx(2.3094010767585034, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(noise=st.floats(0.01, 100), over=st.floats(1 / math.sqrt(2), 1e3))
def test_both_noises_together_are_the_planned_one(noise, over):
    count = max(noise * over, noise / math.sqrt(2) * (1 + 1e-12))
    assert joint_noise(update_noise(noise, count), count) == pytest.approx(noise, rel=1e-9)
    assert update_noise(noise, count) > noise


def test_a_round_costs_what_its_two_gaussians_cost_together():
    """Without sampling the two mechanisms compose exactly; a bit moves the shifted count by a half."""

    def gaussian(noise):
        return PrivacyEvent(unit="client", noise_multiplier=noise, sampling_probability=1.0, steps=1)

    count = 1.3
    apart = epsilon([gaussian(update_noise(1.0, count)), gaussian(2 * count)], 1e-5)
    assert epsilon([gaussian(1.0)], 1e-5) == pytest.approx(apart, rel=1e-3)
    assert epsilon([gaussian(update_noise(1.0, count))], 1e-5) < apart * 0.95  # the count is not free


def test_a_count_with_too_little_noise_is_refused(make):
    with pytest.raises(
        ConfigError, match=r"count_noise = 0.5 is too small for a noise multiplier of 1.*at least 0.707"
    ):
        mechanism(count_noise=0.5).event(make.plan(), 1.0, "add_or_remove_one")
    assert mechanism(count_noise=0.72).event(make.plan(), 1.0, "add_or_remove_one")


def test_the_event_says_both_noises_and_is_checked(make):
    event = mechanism().event(make.plan(noise_scale=1.2), 1.0, "add_or_remove_one")
    assert dict(event.parameters) == {"count_noise": 1.2, "update_noise_multiplier": update_noise(1.2, 1.2)}
    assert (event.noise_multiplier, event.steps, event.sampling_probability) == (1.2, 10, 0.2)
    large = mechanism().event(make.plan(cohort_size=90), 1.0, "add_or_remove_one")
    assert dict(large.parameters)["count_noise"] == 4.5  # a twentieth of the cohort
    check_event(event)
    with pytest.raises(ConfigError, match="do not make"):
        check_event(replace(event, noise_multiplier=1.201))
    with pytest.raises(ConfigError, match="incomplete"):
        check_event(replace(event, parameters=event.parameters[:1]))
    with pytest.raises(ConfigError, match="incomplete"):
        check_event(replace(event, unit="example"))


def test_the_plan_costs_what_the_fixed_clip_costs(make):
    """The count's share is taken out of the updates' noise, not out of the budget."""
    table = {"unit": "client", "noise_multiplier": 1.0}
    phase = [make.plan(probabilities={"a": 1.0})]
    plain, adaptive = (
        make_plan(PrivacyConfig(mechanism=name, **table), phase, masks=None)
        for name in ("gaussian", "adaptive_clipping")
    )
    assert plain.epsilon == adaptive.epsilon
    (event,) = adaptive.events_by_client["*"]
    assert event.mechanism == "adaptive_clipping" and event.steps == 10


# --- the clip ----------------------------------------------------------------------------------------------------


def test_the_clip_moves_as_by_hand(make, keeper):
    """Three of four within clip 2: the share is 3/4, and the clip 2 exp(-0.2 (0.75 - 0.5)) = 1.9024588."""
    work = mechanism(count_noise=1e-6).at_work(
        make.site(noise_multiplier=1e-7, l2_clip_norm=2.0, plan={"cohort_size": 4})
    )
    drive = make.Drive(work, keeper())
    messages = [work.bounded(np.full(10, v, dtype=np.float32), work.terms({}))[0] for v in (0.0, 0.1, 0.2, 9.0)]
    found = drive.release(np.sum(messages, axis=0, dtype=np.float64))
    assert drive.memory["clip"][0] == pytest.approx(2 * math.exp(-0.05), rel=1e-4)
    clipped = 2 / math.sqrt(10)
    np.testing.assert_allclose(found.mean_D, np.full(10, (0.3 + clipped) / 4), rtol=1e-5)
    assert work.terms(drive.memory) == (drive.memory["clip"][0], drive.memory["clip"][0] * work.bit_over_clip)


def test_the_clip_finds_the_quantile(make, keeper):
    """Norms uniform on (0, 1): the clip settles at the quantile wanted, from far below and from far above."""
    rng = np.random.default_rng(0)
    for quantile, first in ((0.3, 10.0), (0.8, 0.01)):
        options = {"quantile": quantile, "learning_rate": 0.3, "count_noise": 10.0}
        plan = {"cohort_size": 200, "clients": 1000}
        work = mechanism(**options).at_work(make.site(size=1, l2_clip_norm=first, plan=plan))
        drive = make.Drive(work, keeper())
        course = []
        for _ in range(120):
            clip, worth = work.terms(drive.memory)
            norms = rng.uniform(0, 1, 200)
            bits = np.where(norms <= clip, worth / 2, -worth / 2)
            drive.release(np.array([np.minimum(norms, clip).sum(), bits.sum()]))
            course.append(clip)
        assert np.mean(course[-40:]) == pytest.approx(quantile, abs=0.04)


def test_the_clip_keeps_within_the_codecs_range(make, keeper):
    work = mechanism(learning_rate=2.0).at_work(make.site(largest_clip=1.5, size=1))
    drive = make.Drive(work, keeper())
    for _ in range(5):
        _, worth = work.terms(drive.memory)
        drive.release(np.array([0.0, -20 * worth / 2]))  # nobody within the clip
    assert work.terms(drive.memory)[0] == 1.5


# --- a client ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-6, 1e6),
    clip=st.floats(1e-3, 1e3),
    noise=st.floats(0.05, 20),
    seed=st.integers(0, 2**31),
)
def test_no_message_is_longer_than_the_sensitivity(make, scale, clip, noise, seed):
    site = make.site(noise_multiplier=noise, l2_clip_norm=clip)
    work = mechanism(count_noise=noise / math.sqrt(2) * 1.0001).at_work(site)
    delta_D = (np.random.default_rng(seed).standard_normal(10) * scale).astype(np.float32)
    message_M, bound = work.bounded(delta_D, work.terms({}))
    assert message_M.dtype == np.float32 and message_M.shape == (11,)
    assert np.linalg.norm(message_M.astype(np.float64)) <= bound
    assert bound == pytest.approx(clip * math.hypot(1, work.bit_over_clip / 2))


@pytest.mark.parametrize("terms", [(), (1.0,), (0.0, 0.1), (1.0, 0.0), (1.0, -1.0), (1.0, 2.1), (1.0, 0.1, 0.1)])
def test_a_client_refuses_terms_that_it_cannot_bound(terms, make):
    work = mechanism().at_work(make.site())
    with pytest.raises(ProtocolError, match="expected the clip"):
        work.bounded(np.zeros(10, dtype=np.float32), terms)


def test_a_client_refuses_an_update_without_a_norm(make):
    work = mechanism().at_work(make.site())
    with pytest.raises(ClientError, match="finite"):
        work.bounded(np.full(10, np.nan, dtype=np.float32), work.terms({}))


# --- the noise ---------------------------------------------------------------------------------------------------


def test_both_noises_have_the_accounted_scale(make, keeper):
    size, rounds, noise, count = 50, 400, 1.0, 2.0
    work = mechanism(count_noise=count).at_work(make.site(size=size, noise_multiplier=noise, l2_clip_norm=0.5))
    holder = keeper()
    means, shares = [], []
    for number in range(rounds):
        drive = make.Drive(work, holder)
        drive.number = number
        means.append(drive.zeros(size) * 20)
        shares.append(-math.log(drive.memory["clip"][0] / 0.5) / 0.2 * 20)  # (share - 1/2) of a cohort of 20
    for draws, sigma in ((means, update_noise(noise, count) * 0.5), (shares, count)):
        assert plausible(draws, sigma)
        assert not plausible(draws, sigma * 2 / 3)
        assert not plausible(draws, sigma * 3 / 2)
    assert abs(np.corrcoef([m[0] for m in means], shares)[0, 1]) < 5 / math.sqrt(rounds)


def test_the_noise_moves_with_the_clip_and_with_the_codec(make, keeper):
    site = make.site(size=20_000, bound=lambda clip, length: clip + 1e-5 * length)
    work = mechanism(count_noise=5.0).at_work(site)
    drive = make.Drive(work, keeper())
    drive.memory = {"clip": np.array([0.25])}
    draws = drive.zeros(20_000) * 20
    sigma = 0.25 * math.hypot(1, work.bit_over_clip / 2) + 1e-5 * 20_001
    assert plausible(draws, sigma)
    for wrong in (2 / 3, 3 / 2):
        assert not plausible(draws, sigma * wrong)


# --- again, and lost ---------------------------------------------------------------------------------------------


def test_a_restart_gives_the_same_bits_and_no_new_charge(make, keeper, tmp_path):
    path = tmp_path / "one.sqlite"
    work = mechanism().at_work(make.site())
    first = make.Drive(work, keeper(path=path))
    course = [first.zeros(10) for _ in range(3)]
    second = make.Drive(mechanism().at_work(make.site()), keeper(path=path))
    again = [second.zeros(10) for _ in range(3)]
    assert [a.tobytes() for a in course] == [b.tobytes() for b in again]
    assert first.memory["clip"].tobytes() == second.memory["clip"].tobytes()
    assert len(first.keeper.ledger.entries()) == 3


def test_a_lost_round_costs_and_moves_nothing(make, keeper):
    drive = make.Drive(mechanism().at_work(make.site()), keeper())
    found = drive.release(None, lost="too few")
    assert (found.mean_D, found.lost, dict(found.memory)) == (None, "too few", {})
    assert drive.keeper.ledger.entries() == []
