"""Whole runs with each codec that a run takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privfed.run import train

# what adds up in a ring, and what is sent as it is
RINGS: list[dict[str, Any]] = [
    {"name": "identity"},
    {"name": "stochastic_quantizer", "bits": 1},
    {"name": "stochastic_quantizer", "bits": 4},
    {"name": "sign", "vote": "mean"},
    {"name": "sign", "vote": "majority"},
]
FLOATS: list[dict[str, Any]] = [{"name": "cast", "dtype": "bfloat16"}, {"name": "cast", "dtype": "float16"}]
CASES = [("masked", each) for each in RINGS] + [("none", each) for each in [*RINGS, *FLOATS]]


@pytest.mark.parametrize(("masking", "compression"), CASES, ids=lambda case: str(case))
def test_every_client_of_every_round_is_heard(
    masking: str, compression: dict[str, Any], tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = tiny_config(
        compression=compression,
        secagg={"name": masking},
        server={"rounds": 2},
        privacy={"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"},
    )
    folder = train(config, out=tmp_path / "run").folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [line["survivors"] for line in rounds] == [line["cohort"] for line in rounds]
    assert all(line["update_norm"] > 0 and not line["dropped"] for line in rounds)
