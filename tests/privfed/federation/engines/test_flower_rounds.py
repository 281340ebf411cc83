"""A deployment's rounds, with real sites and without Flower: the same bits as in one process, and what faults cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.config import RunConfig
from privfed.federation.checkpoint import load_checkpoint
from privfed.federation.engines.flower.engine import FlowerEngine
from privfed.federation.engines.flower.fleet import Deadlines
from privfed.run import train

from .deployment import Lab, LabChannel

QUICK = Deadlines(stage=0.05, opening=30.0, patience=30.0)


@pytest.fixture
def labs(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """Return ``labs(config, count, **lab)``: running sites, ended after the test."""
    made: list[Lab] = []

    def make(config: RunConfig, count: int = 4, **given: Any) -> Lab:
        made.append(Lab(config, count, tmp_path / f"sites{len(made)}", **given))
        return made[-1]

    yield make
    for lab in made:
        lab.close()


def _engine(lab: Lab) -> FlowerEngine:
    return FlowerEngine(sites=lab.sites, channel=LabChannel(lab), deadlines=QUICK)


def _params(folder: Path) -> np.ndarray:
    checkpoint = load_checkpoint(folder / "checkpoint" / "state.safetensors")
    assert checkpoint is not None
    return checkpoint.state.params_D


def _rounds(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [found for found in map(json.loads, lines) if found["kind"] == "round"]


def _deployed(config: RunConfig, lab: Lab, out: Path, **given: Any) -> Path:
    train(config, out=out, engine=_engine(lab), **given)
    return out


CASES: dict[str, dict[str, Any]] = {
    "masked": {},
    "plain": {"secagg": {"name": "none"}},
    "examples": {"server": {"weighting": "examples", "cohort_size": 4}, "partition": {"name": "quantity"}},
    "error feedback": {"compression": {"name": "sign"}, "secagg": {"name": "none"}},
    "distributed": {
        "privacy": {"placement": "distributed"},
        "client": {"local_steps": 1},
        "server": {"cohort_size": 4},
    },
    "warm start": {"head_warm_start": {"name": "dp_probe", "rounds": 1, "sampling_probability": 0.5}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_deployment_gives_the_same_bits_as_one_process(
    name: str, tiny_config: Callable[..., RunConfig], labs: Callable[..., Lab], tmp_path: Path
) -> None:
    config = tiny_config(**CASES[name])
    here = tmp_path / "here"
    train(config, out=here)
    lab = labs(config, 2, accept={"secagg": False})
    there = _deployed(config, lab, tmp_path / "there")
    np.testing.assert_array_equal(_params(there), _params(here))
    assert [r["survivors"] for r in _rounds(there)] == [r["survivors"] for r in _rounds(here)]
