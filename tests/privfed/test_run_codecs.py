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
    {"name": "sign", "vote": "majority"},
    {"name": "random_k", "unbiased": False, "error_feedback": True},
    {"name": "count_sketch", "columns": 100},
    {"name": "powersgd", "rank": 1, "inner": {"name": "rotated_quantizer", "max_norm": 4.0}},
]
FLOATS: list[dict[str, Any]] = [{"name": "cast", "dtype": "float16"}, {"name": "top_k", "density": 0.1}]
CASES = [("masked", each) for each in RINGS] + [("none", each) for each in FLOATS]


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
    checks = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))["sentinels"]
    assert all(text.startswith("passed: ") for text in checks.values())
    sparse = compression["name"] in ("random_k", "top_k", "count_sketch")
    assert ("as clients send" in checks["moved"]) == sparse


def test_a_codec_serves_the_head_s_warm_start_and_the_way_down(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    """Two phases of other tensors, each with a state and residuals of its own."""
    config = tiny_config(
        compression={"name": "powersgd", "rank": 1},
        downlink={"name": "stochastic_quantizer", "bits": 12, "max_value": 2.0},
        head_warm_start={"name": "dp_probe", "rounds": 2},
        privacy={"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"},
    )
    folder = train(config, out=tmp_path / "run").folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [line["phase"] for line in rounds] == ["warm_start", "warm_start", "train", "train"]
    assert all(line["survivors"] == line["cohort"] and not line["lost"] for line in rounds)
    kept = {path.parents[1].name for path in folder.rglob("*.safetensors") if path.stem.isdigit()}
    assert kept == {"clients", "clients-warm_start"}
