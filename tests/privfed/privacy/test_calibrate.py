"""The two budget questions: right, minimal, refused where there is no answer, and quick."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from privfed.errors import ConfigError
from privfed.privacy.accountant import epsilon
from privfed.privacy.calibrate import LEAST_NOISE, Stage, events_for, noise_for, steps_for

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text())
DELTA = VECTORS["delta"]


def stage(q=0.01, steps=1000):
    return Stage(sampling_probability=q, steps=steps)


@pytest.mark.parametrize("case", VECTORS["noise"], ids=str)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_golden_noise(case, accountant):
    stages = [stage(case["q"], case["steps"])]
    noise = noise_for(stages, unit="example", target_epsilon=case["epsilon"], target_delta=DELTA, accountant=accountant)
    assert noise == pytest.approx(case[accountant], rel=8e-3 if accountant == "rdp" else 2e-3)


@pytest.mark.parametrize(
    ("stages", "target", "relation"),
    [
        ([stage()], 2.0, "add_or_remove_one"),
        ([stage(0.5, 15), stage(0.02, 800)], 4.0, "add_or_remove_one"),
        ([stage(1.0, 50)], 3.0, "add_or_remove_one"),
        ([stage(0.02, 300)], 3.0, "replace_one"),
        ([stage(0.01, 10000)], 0.1, "add_or_remove_one"),
        ([stage(1.0, 1)], 20.0, "replace_one"),
    ],
)
def test_noise_meets_the_target_and_a_hundredth_less_does_not(stages, target, relation):
    noise = noise_for(stages, unit="client", target_epsilon=target, target_delta=DELTA, relation=relation)

    def cost(sigma):
        return epsilon(events_for(stages, sigma, unit="client", relation=relation), DELTA, fine=True)

    assert cost(noise) <= target < cost(noise * 0.99)


def test_a_budget_that_no_noise_reaches_or_that_needs_none():
    with pytest.raises(ConfigError, match="budget that no noise reaches") as caught:
        noise_for([stage(1.0, 10**6)], unit="example", target_epsilon=0.01, target_delta=DELTA)
    assert str(caught.value).endswith("budget.")
    assert noise_for([stage(1.0, 1)], unit="example", target_epsilon=1e5, target_delta=DELTA) == LEAST_NOISE


@pytest.mark.parametrize(("sigma", "target", "q"), [(4.0, 1.0, 0.01), (2.0, 3.0, 1.0)])
def test_steps_are_the_largest_that_fit(sigma, target, q):
    def fits(size):
        return epsilon(events_for([stage(q, size)], sigma, unit="example"), DELTA) <= target

    size = steps_for(
        lambda n: [stage(q, n)],
        noise_multiplier=sigma,
        unit="example",
        target_epsilon=target,
        target_delta=DELTA,
    )
    assert fits(size) and not fits(size + 1)


def test_steps_at_the_ends():
    budget = {"unit": "example", "target_epsilon": 1.0, "target_delta": DELTA}
    assert steps_for(lambda n: [stage(1.0, n)], noise_multiplier=0.5, **budget) == 0
    assert steps_for(lambda n: [stage(1e-3, n)], noise_multiplier=9.0, most=37, **budget) == 37
    assert steps_for(lambda n: [stage(1e-3, n)], noise_multiplier=9.0, most=0, **budget) == 0
    assert steps_for(lambda n: [stage(1e-3, n)], noise_multiplier=9.0, most=1, **budget) == 1
    budget["target_epsilon"] = 4.0
    warm = steps_for(lambda n: [stage(0.5, 5), stage(0.05, 10 * n)], noise_multiplier=3.0, **budget)
    plain = steps_for(lambda n: [stage(0.05, 10 * n)], noise_multiplier=3.0, **budget)
    assert 0 < warm < plain


@pytest.mark.parametrize(
    ("stages", "target", "delta"),
    [
        ([stage()], 0.0, DELTA), ([stage()], -1.0, DELTA), ([stage()], math.inf, DELTA),
        ([stage()], 1.0, 0.0),
        ([stage()], 1.0, 1.0), ([stage(0.0)], 1.0, DELTA), ([stage(1.5)], 1.0, DELTA),
        ([stage(0.1, -1)], 1.0, DELTA), ([stage(0.1, 0)], 1.0, DELTA), ([], 1.0, DELTA),
    ],
)  # fmt: skip
def test_noise_refusals(stages, target, delta):
    with pytest.raises(ConfigError, match=r"^Expected .*\.$"):
        noise_for(stages, unit="example", target_epsilon=target, target_delta=delta)


def test_steps_refusals():
    budget = {"unit": "example", "target_epsilon": 1.0, "target_delta": DELTA}
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="noise multiplier"):
            steps_for(lambda n: [stage(0.1, n)], noise_multiplier=sigma, **budget)
    with pytest.raises(ConfigError, match="at most"):
        steps_for(lambda n: [stage(0.1, n)], noise_multiplier=1.0, most=-1, **budget)
