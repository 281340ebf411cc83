"""Plain words and honest rounding."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest

from privfed.report import text
from privfed.report.receipt import ViewFacts, build_receipt
from privfed.report.tradeoff import clean_curve, hit_rate_bound


def normal(x: float) -> float:
    """Return the standard normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(0.0, "0.00"), (3.1, "3.10"), (3.1001, "3.11"), (7.999, "8.00"), (1234.5, "1,234.50")],
)
def test_epsilon_is_never_rounded_down(epsilon: float, words: str) -> None:
    assert text.epsilon_text(epsilon) == words


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(0.0, "1.0"), (1.0, "2.8"), (3.0, "21"), (8.0, "3,000"), (2000.0, "more than a million billion")],
)
def test_factor_is_never_rounded_down(epsilon: float, words: str) -> None:
    assert text.factor_text(epsilon) == words


@pytest.mark.parametrize(("delta", "words"), [(1e-5, "1 in 100,000"), (3e-6, "1 in 333,333"), (0.0, "zero")])
def test_chance(delta: float, words: str) -> None:
    assert text.chance_text(delta) == words


def test_small_words() -> None:
    assert text.delta_text(1e-5) == "1e-5"
    assert text.seconds_text(123.4) == "2 min 3 s" and text.seconds_text(59.96) == "60.0 s"
    assert text.seconds_text(3720) == "1 h 2 min"
    assert text.bytes_text(163840) == "163.8 kB"
    assert text.when_text("2026-03-14T10:26:53+01:00") == "14 March 2026, 09:26 UTC"
    assert text.when_text("yesterday") == "yesterday"
    assert text.interval(0.5, 0) is None


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("alarm", [0.01, 0.1, 0.4])
def test_bound_from_a_curve_is_just_above_the_exact_gaussian(folders: ModuleType, mu: float, alarm: float) -> None:
    from scipy.stats import norm

    exact = float(norm.cdf(norm.ppf(alarm) + mu))
    bound = hit_rate_bound(folders.gaussian_curve(mu), alarm)
    assert exact - 1e-9 <= bound <= exact + 0.02


def test_bound_of_no_curve_bounds_nothing() -> None:
    assert hit_rate_bound((), 0.1) == 1.0
    assert hit_rate_bound(((0.0, 0.0),), 0.1) == pytest.approx(0.1)
    assert hit_rate_bound(((1e6, 0.0),), 0.1) == 1.0
    assert clean_curve([(math.inf, 0.1), (1.0, 2.0), (-1.0, 0.0), (1, 0)]) == ((1.0, 0.0),)


def test_summary_of_a_private_run(folders: ModuleType) -> None:
    lines = text.summarise(build_receipt(folders.facts()), Path("runs/demo"))
    assert lines[0] == (
        "Guarantee:  epsilon 7.32 at delta 1e-5 for one training example, against anyone who gets the trained model."
    )
    assert "accuracy 71.3% on 1,500 test examples" in lines[2]
    assert lines[-1].startswith("Files:") and "runs/demo" in lines[-1]
    assert 4 <= len(lines) <= 7 and all("\n" not in line for line in lines)


def test_summary_names_the_view_that_has_none(folders: ModuleType) -> None:
    lines = text.summarise(build_receipt(folders.central()))
    assert "individual none (" in lines[1] and "release epsilon 3.20" in lines[1]


@pytest.mark.parametrize("kind", ["none", "reproducible"])
def test_summary_without_a_promise_prints_no_epsilon(folders: ModuleType, kind: str) -> None:
    facts = folders.no_privacy() if kind == "none" else folders.facts(noise_source="reproducible")
    lines = text.summarise(build_receipt(facts))
    assert "none. This run is not private" in lines[0]
    assert not any("epsilon" in line for line in lines)


def test_summary_warns(folders: ModuleType) -> None:
    facts = folders.facts(views={"release": ViewFacts(epsilon=20.0)}, sampling="shuffled", beats_probe=False)
    warned = [line for line in text.summarise(build_receipt(facts)) if line.startswith("Warning:")]
    assert len(warned) == 3
