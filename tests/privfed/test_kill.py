"""A run that is killed at any moment and resumed ends as if nothing had happened."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KILLS, FEWER, SEED = 3, 2, 1


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The benchmark that does this at length."""
    path = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"
    spec = importlib.util.spec_from_file_location("privfed_kill_resume", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SERVER = {"rounds": 5, "evaluate_every": 2}
RUNS = {
    "warm start": {
        "server": {**SERVER, "optimizer": "adam", "learning_rate": 0.05},
        "head_warm_start": {"name": "dp_probe", "rounds": 2},
    },
    "own states": {"server": {**SERVER, "aggregation": "scaffold", "personal": ["head"]}},
    "carried weights": {"server": {**SERVER, "aggregation": "frlora"}, "tuning": {"name": "lora", "r": 2}},
    "sketches at the server": {
        "server": SERVER,
        "compression": {"name": "count_sketch", "rows": 3, "columns": 200, "momentum": 0.5},
        "downlink": {"name": "stochastic_quantizer", "max_value": 1.0},
    },
    # two passes, factors at the server and residuals at the clients
    "residuals at the clients": {"server": SERVER, "compression": {"name": "powersgd", "rank": 1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RUNS))
def test_a_run_killed_at_random_moments_ends_like_an_unbroken_one(
    kind: str, benchmark: ModuleType, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = tiny_config(privacy={"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"}, **RUNS[kind])
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    trainer = benchmark.Trainer(str(path), [], tmp_path)
    marks = trainer.measure("whole")
    assert 0 < marks.folder < marks.training < marks.trained < marks.end
    finished: list[str] = []
    count = KILLS if kind == "warm start" else FEWER
    when = benchmark.moments(marks, count, random.Random(SEED))
    kills = list(benchmark.kill_and_resume(trainer, when, finished))
    assert len(kills) == count
    assert finished
    for name in finished:
        assert benchmark.differences(trainer, "whole", name) == []


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
def test_the_moments_cover_the_run(benchmark: ModuleType, count: int) -> None:
    marks = benchmark.Landmarks(folder=2.0, training=4.0, trained=9.0, end=10.0)
    found = benchmark.moments(marks, count, random.Random(0))
    assert len(found) == count
    assert all(0 <= moment <= 10 for moment in found)
    assert sum(4 <= moment <= 9 for moment in found) >= count / 2 - 1
    if count > 2:
        assert min(found) < 4
        assert max(found) > 9
