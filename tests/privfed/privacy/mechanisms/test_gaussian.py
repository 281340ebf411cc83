"""DP-FedAvg by itself: small cohorts, charges, an input released once. Its noise is tested in the federation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from privfed.privacy.mechanisms import MECHANISMS, REPEATED, Moment, built


def test_a_round_costs_one_step_and_is_released_once(make, keeper):
    work = built(MECHANISMS.get("gaussian").config()).at_work(make.site())
    drive = make.Drive(work, keeper())
    first = drive.release(np.zeros(10), broadcast=b"a")
    drive.number = 0
    assert drive.release(np.zeros(10), broadcast=b"a").mean_D.tobytes() == first.mean_D.tobytes()
    for other in ({"broadcast": b"b"}, {"broadcast": b""}):
        drive.number = 0
        found = drive.release(np.zeros(10), **other)
        assert (found.mean_D, found.lost) == (None, REPEATED)
    lost = drive.release(None, lost="too few")
    assert (lost.mean_D, lost.lost) == (None, "too few")
    (entry,) = drive.keeper.ledger.entries()
    assert entry.charge.event == work.event.one_step()


def test_a_digest_tells_rounds_apart():
    moments = [Moment(phase="train", round=1, broadcast=b) for b in (b"a", b"b")]
    sums = [None, np.zeros(2), np.ones(2)]
    assert len({moment.digest(sum_M) for moment in moments for sum_M in sums}) == 6


@pytest.mark.parametrize("multiplier", [0.5, 2.0])
def test_two_sums_of_a_round_are_together_one_mechanism_of_the_stated_multiplier(make, keeper, multiplier):
    """The distance of two neighbours in noise units, over both sums: sqrt(sum of (bound / deviation)^2) = 1 / z."""
    work = built(MECHANISMS.get("gaussian").config()).at_work(make.site(noise_multiplier=multiplier))
    holder, bounds, size = keeper(), (3.0, 0.2), 40_000
    found = [
        work.release(
            np.zeros(size),
            Moment(
                phase="train" if not number else "train, second pass",
                round=1,
                broadcast=b"",
                bound=lambda clip, bound=bound: clip * bound,
                sums=2,
                charged=bool(number),
            ),
            holder,
            {},
        )
        for number, bound in enumerate(bounds)
    ]
    deviations = [float(each.mean_D.std()) * work.cohort_size for each in found]
    apart = np.sqrt(sum((bound / deviation) ** 2 for bound, deviation in zip(bounds, deviations, strict=True)))
    assert apart == pytest.approx(1 / multiplier, rel=0.02)
    assert deviations[0] / deviations[1] == pytest.approx(bounds[0] / bounds[1], rel=0.03)
    assert abs(np.corrcoef(found[0].mean_D, found[1].mean_D)[0, 1]) < 5 / np.sqrt(size)
    first, second = (entry.charge.event for entry in holder.ledger.entries())
    assert (first, second.steps) == (work.event.one_step(), 0)


@pytest.mark.parametrize(("probability", "multiplier"), [(1.0, 1.0), (0.2, 0.8)])
def test_the_accountant_agrees_that_two_such_sums_cost_one(probability, multiplier):
    """On one Poisson sample: the privacy loss of both sums, drawn, is that of the one event, at every threshold."""
    rng = np.random.default_rng(1)
    half = 1 / (np.sqrt(2) * multiplier)
    both = rng.standard_normal((400_000, 2)) + half * (rng.random((400_000, 1)) < probability)
    one = rng.standard_normal(400_000) + (rng.random(400_000) < probability) / multiplier

    def loss(exponent):
        return np.log(1 - probability + probability * np.exp(exponent))

    joint = loss((both * half).sum(axis=1) - half**2)
    single = loss(one / multiplier - 1 / (2 * multiplier**2))
    assert stats.ks_2samp(joint, single).statistic < 0.005
    sampled_apart = rng.standard_normal((400_000, 2)) + half * (rng.random((400_000, 2)) < probability)
    wrong = loss(sampled_apart[:, 0] * half - half**2 / 2) + loss(sampled_apart[:, 1] * half - half**2 / 2)
    assert probability == 1 or stats.ks_2samp(wrong, single).statistic > 0.02
