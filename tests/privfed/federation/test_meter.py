"""The meter: what averaging factors misses, by hand; and what it reads in real rounds of each rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.errors import ConfigError

LORA = {"name": "lora", "r": 2}
METER = {"meter": True, "cohort_size": 4}


@pytest.mark.parametrize(
    ("tuning", "rule", "zero"),
    [
        ("lora", "fedavg", False),
        ("ffa_lora", "fedavg", True),
        ("fed_sb", "fedavg", True),
        ("lora", "rolora", True),
        ("lora", "fedsvd", True),
        ("lora", "flexlora", False),
        ("lora", "frlora", False),
    ],
)
def test_it_reads_zero_where_one_factor_stands_still(
    tuning: str, rule: str, zero: bool, federation: Callable[..., Any]
) -> None:
    run = federation(
        privacy={"unit": "none"},
        secagg={"name": "none"},
        tuning={"name": tuning, "r": 2},
        client={"learning_rate": 5.0},
        server={**METER, "aggregation": rule},
    )
    for _ in range(3):
        _, report = run.round()
        assert report.survivors == 4
        assert (report.meter.relative < 1e-6) == zero
        assert report.meter.error >= 0
    assert report.meter.noise_product == 0.0


@pytest.mark.parametrize("masked", ["masked", "none"])
@pytest.mark.parametrize("compression", [{"name": "identity"}, {"name": "stochastic_quantizer", "bits": 12}])
def test_it_is_the_norm_done_by_hand(
    masked: str, compression: dict[str, Any], federation: Callable[..., Any], given: Any
) -> None:
    run = federation(
        privacy={"unit": "none"},
        secagg={"name": masked},
        tuning=LORA,
        compression={**compression, **({"max_value": 1.0} if "bits" in compression else {})},
        server={**METER, "weighting": "examples"},
        partition={"name": "quantity", "clients": 4, "alpha": 0.7, "min_size": 8},
    )
    rng = np.random.default_rng(4)
    size = run.phase.layout.size
    deltas = {name: rng.normal(0, 0.1, size).astype(np.float32) for name in run.phase.clients}
    weights = np.array([run.phase.clients[name].weight for name in deltas])
    run.trainers(lambda client: given(deltas[client.shard.client_id]))
    before = run.state
    _, report = run.round()
    from privfed.federation.state import tensors_of

    clients = [tensors_of(run.phase.layout, before.params_D + delta_D) for delta_D in deltas.values()]
    shares, total, whole = weights / weights.sum(), 0.0, 0.0
    for pair in run.phase.sharing.pairs:
        mean = sum(s * each[pair.b].astype(np.float64) @ each[pair.a] for s, each in zip(shares, clients, strict=True))
        b = sum(s * each[pair.b].astype(np.float64) for s, each in zip(shares, clients, strict=True))
        a = sum(s * each[pair.a].astype(np.float64) for s, each in zip(shares, clients, strict=True))
        total += np.linalg.norm(mean - b @ a) ** 2
        whole += np.linalg.norm(mean) ** 2
    rel = 1e-4 if compression["name"] == "identity" else 0.02
    assert report.meter.error == pytest.approx(math.sqrt(total), rel=rel)
    assert report.meter.relative == pytest.approx(math.sqrt(total / whole), rel=rel)


def test_the_product_of_the_servers_noise_is_the_predicted_one(federation: Callable[..., Any], given: Any) -> None:
    run = federation(
        privacy={"unit": "client", "l2_clip_norm": 0.5},
        secagg={"name": "none"},
        tuning=LORA,
        server=METER,
    )
    zero = np.zeros(run.phase.layout.size, dtype=np.float32)
    run.trainers(lambda client: given(zero))
    from privfed.federation.state import tensors_of

    squares = []
    for _ in range(20):
        before = run.state
        after, report = run.round()
        noise = tensors_of(run.phase.layout, after.params_D - before.params_D)
        squares.append(sum(np.linalg.norm(noise[p.b] @ noise[p.a]) ** 2 for p in run.phase.sharing.pairs))
    assert report.meter.noise_product == pytest.approx(math.sqrt(np.mean(squares)), rel=0.1)


def test_the_product_of_the_clients_noise_is_the_predicted_one(federation: Callable[..., Any]) -> None:
    """A clip of almost nothing leaves pure noise in the updates."""
    run = federation(
        tuning=LORA,
        client={"optimizer": "sgd", "learning_rate": 0.5, "local_steps": 3},
        privacy={"l2_clip_norm": 1e-9, "noise_multiplier": 1e6},
        secagg={"name": "none"},
        server=METER,
    )
    from privfed.federation.state import tensors_of

    squares = []
    for _ in range(12):
        before = run.state
        after, report = run.round()
        noise = tensors_of(run.phase.layout, after.params_D - before.params_D)
        squares.append(sum(np.linalg.norm(noise[p.b] @ noise[p.a]) ** 2 for p in run.phase.sharing.pairs))
    assert report.meter.noise_product == pytest.approx(math.sqrt(np.mean(squares)), rel=0.15)


@pytest.mark.parametrize(
    ("tables", "wanted"),
    [
        ({"tuning": {"name": "ffa_lora", "r": 2}}, 0.0),
        ({"tuning": LORA, "server": {"aggregation": "rolora"}}, 0.0),
        ({"tuning": LORA, "client": {"optimizer": "adamw", "learning_rate": 0.01}}, None),
    ],
)
def test_noise_on_one_factor_has_no_product_and_adams_is_not_known(
    tables: dict[str, Any], wanted: float | None, federation: Callable[..., Any]
) -> None:
    run = federation(**{**tables, "server": {**METER, **tables.get("server", {})}})
    _, report = run.round()
    assert report.meter.noise_product == wanted


@pytest.mark.parametrize("unit", ["example", "client"])
def test_fed_sbs_own_tuning_reads_zero_under_privacy_and_its_noise_has_no_product(
    unit: str, federation: Callable[..., Any]
) -> None:
    run = federation(
        tuning={"name": "fed_sb", "r": 3},
        privacy={"unit": unit},
        secagg={"name": "none"},
        client={"optimizer": "sgd", "learning_rate": 5.0, "local_steps": 2},
        server=METER,
    )
    start_D = run.state.params_D
    for _ in range(2):
        _, report = run.round()
        assert report.meter.relative < 1e-6
        assert report.meter.noise_product == 0.0
    cores = [pair.core for pair in run.phase.sharing.pairs]
    assert cores and set(cores) <= set(run.phase.layout.names)
    assert not np.array_equal(run.state.params_D, start_D)


def test_a_core_between_the_factors_is_averaged_exactly() -> None:
    """Fed-SB: B R A with only R trained."""
    from privfed.federation.meter import Meter
    from privfed.federation.sharing import share_out
    from privfed.rules import RULES, Pair
    from privfed.types import ParamLayout

    rng = np.random.default_rng(0)
    pair = Pair(a="a", b="b", weight="w", scale=1.0, core="r")
    layout = ParamLayout(names=("r",), shapes=((2, 2),), digest="")
    sharing = share_out(RULES.get("fedavg")(), layout, [pair], patterns=(), head=None)
    frozen = {"a": rng.standard_normal((2, 5)).astype(np.float32), "b": rng.standard_normal((4, 2)).astype(np.float32)}
    meter = Meter(sharing=sharing, frozen=frozen, deviation=None, central=1.0)
    for _ in range(3):
        meter.add(rng.standard_normal(4).astype(np.float32), {}, 1.0, 10)
    reading = meter.read(1)
    assert reading is not None
    assert reading.relative < 1e-12
    assert reading.noise_product == 0.0


@pytest.mark.parametrize("tables", [{"tuning": {"name": "bitfit"}}, {"server": {"aggregation": "fedsa_lora"}}])
def test_where_there_is_nothing_to_compare_it_is_refused(
    tables: dict[str, Any], federation: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=r"server\.meter"):
        federation(**{"tuning": LORA, **tables, "server": {**METER, **tables.get("server", {})}})


def test_its_lines_say_that_they_are_no_part_of_the_release(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    from privfed.report.load import load_metrics
    from privfed.run import train

    config = tiny_config(
        tuning=LORA,
        privacy={"unit": "client", "target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"},
        secagg={"name": "none"},
        server={"meter": True, "cohort_size": 4},
        ledger={"path": str(tmp_path / "ledger.sqlite")},
    )
    folder = train(config, out=tmp_path / "run").folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "simulation"]
    assert len(found) == 2
    assert all("Not part of the release" in line["note"] for line in found)
    assert all("aggregation_error" not in line for line in lines if line["kind"] != "simulation")
    assert "aggregation_error" not in (folder / "receipt.json").read_text()
    assert len(load_metrics(folder / "metrics.jsonl").rounds) == 2
