"""Constraints, what meets them, what that gives up, and a run.toml that trains for real."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from privfed.config import load_config
from privfed.errors import ConfigError
from privfed_audits.grids.recommend import parse, recommend, write_runs


@pytest.mark.parametrize(
    ("text", "measure", "sign", "value"),
    [
        ("epsilon<=4", "epsilon", "<=", 4.0),
        (" bytes < 1MB ", "bytes", "<", 1e6),
        ("bytes<=1.5 kB", "bytes", "<=", 1500.0),
        ("bytes_round<=2KiB", "bytes_round", "<=", 2048.0),
        ("bytes<=800", "bytes", "<=", 800.0),
        ("accuracy>=60%", "accuracy", ">=", 0.6),
        ("accuracy > 0.6", "accuracy", ">", 0.6),
        ("empirical<=1e-1", "empirical", "<=", 0.1),
        ("perplexity<=12.5", "perplexity", "<=", 12.5),
    ],
)
def test_constraints_that_are_understood(text: str, measure: str, sign: str, value: float) -> None:
    (found,) = parse(text)
    assert (found.measure, found.sign) == (measure, sign) and found.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no constraint: expected something like"),
        ("epsilon", "'epsilon' is malformed: expected a measure, one of <= < >= >, and a number"),
        ("epsilon=4", "is malformed"),
        ("epsilon<=-4", "is malformed"),
        ("epsilon<=four", "is malformed"),
        ("epsilon<=4, , bytes", "'bytes' is malformed"),
        ("epsilom<=4", "names no measure: 'epsilom'. Did you mean 'epsilon'?"),
        ("epsilon<=4MB", "'MB' is no unit of epsilon: expected no unit"),
        ("bytes<=4apples", "'apples' is no unit of bytes: expected B, kB, MB"),
        ("accuracy>=4kB", "'kB' is no unit of accuracy: expected % or no unit"),
        ("epsilon<=1.2.3", "'1.2.3' is not a number"),
    ],
)
def test_constraints_that_are_not(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert sentence in str(caught.value)


def test_the_best_under_constraints_and_what_is_given_up(results: Any) -> None:
    advice = recommend(results.settings, parse("epsilon<=4, bytes<=50kB"), "accuracy")
    meeting = [s for s in results.settings if s.epsilon is not None and s.epsilon <= 4 and s.bytes_run <= 50e3]
    assert advice.best[0] is max(meeting, key=lambda each: each.utility.mean) and len(advice.best) == 3
    text = "\n".join(advice.lines)
    assert f"{len(meeting)} of {len(results.settings)} configurations meet epsilon<=4, bytes<=50kB" in text
    assert "Given up: against the most useful of all" in text and "no guarantee" in text
    assert "Without epsilon<=4: " in text and "Without bytes<=50kB: " in text
    assert " to " in advice.lines[1]  # the interval


def test_nothing_is_given_up_by_what_binds_nothing(results: Any) -> None:
    advice = recommend(results.settings, parse("accuracy>=1%"), "accuracy")
    assert advice.lines[-1] == "Nothing is given up: it is the most useful of all."


def test_what_nobody_meets_says_how_near_the_grid_comes(results: Any) -> None:
    advice = recommend(results.settings, parse("epsilon<=0.5, accuracy>=99%, perplexity<=3"), "accuracy")
    assert advice.best == () and advice.lines[0].startswith("No configuration meets epsilon<=0.5")
    assert "nearest to epsilon<=0.5: 2" in advice.lines[1]
    assert "accuracy (on the test rows) nearest to accuracy>=99%: 0.7" in advice.lines[2]


def test_the_written_runs_train_for_real(results: Any, made: ModuleType, tmp_path: Path) -> None:
    advice = recommend(results.settings, parse("epsilon<=4"), "accuracy")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "9-old.toml").write_text("")
    paths = write_runs(advice.best, tmp_path / "out")
    assert sorted(paths) == sorted((tmp_path / "out").iterdir()) and paths[0].name.startswith("1-lora-")
    config = load_config(str(paths[0]))
    assert config.privacy.reproducible_noise is False and config.privacy.target_epsilon == 2.0
    assert config.audit.canaries == 0 and config.audit.record is False
    experiment = advice.best[0].points[0].cell.config
    assert experiment is not None and experiment.privacy.reproducible_noise is True
    assert config.tuning == experiment.tuning and config.compression == experiment.compression
