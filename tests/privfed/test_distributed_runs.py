"""Whole runs with distributed noise: what the receipt says can be computed again from its events alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.rdp import compute_epsilon
from scipy.special import comb

from privfed.budget import answer
from privfed.cli import main
from privfed.errors import ConfigError
from privfed.federation.progress import Silent
from privfed.privacy.ledger import Ledger
from privfed.run import train
from privfed.types import EVERYONE

DELTA = 1e-4
UNITS = pytest.mark.parametrize("unit", ["client", "example"])


def _config(tiny_config: Callable[..., Any], unit: str, tmp_path: Path, **more: Any) -> Any:
    tables: dict[str, Any] = {
        "privacy": {"unit": unit, "placement": "distributed", "target_epsilon": 6.0},
        "secagg": {"name": "masked", "corrupt": 0.25, "dropped": 0.25},
        "server": {"rounds": 3, "cohort_size": 4, "evaluate_every": 3},
        "client": {"local_steps": 1 if unit == "example" else 2},
        "ledger": {"path": str(tmp_path / "holder.sqlite")},
    }
    for name, table in more.items():
        tables[name] = {**tables.get(name, {}), **table}
    return tiny_config(reproducible_noise=tables["privacy"].pop("reproducible_noise", False), **tables)


def _skellam_epsilon(events: list[dict[str, Any]], delta: float) -> float:
    """Return epsilon of Skellam events as somebody without privfed would: their moments, summed term by term."""
    orders = list(range(2, 120))
    total = np.zeros(len(orders))
    for event in events:
        told, q = event["parameters"], event["sampling_probability"]
        mu, l1, l2 = told["variance"], told["l1"], told["l2"]
        assert event["mechanism"] == "skellam"
        assert event["noise_multiplier"] == pytest.approx(math.sqrt(mu) / l2)

        def divergence(a: int, mu: float = mu, l1: float = l1, l2: float = l2) -> float:
            return a * l2**2 / (2 * mu) + min(((2 * a - 1) * l2**2 + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))

        for place, order in enumerate(orders):
            value = divergence(order)
            if q < 1:
                moments = [
                    math.log(comb(order, k))
                    + k * math.log(q)
                    + (order - k) * math.log1p(-q)
                    + ((k - 1) * divergence(k) if k > 1 else 0.0)
                    for k in range(order + 1)
                ]
                value = min(value, float(np.logaddexp.reduce(moments)) / (order - 1))
            total[place] += event["steps"] * value
    return float(compute_epsilon(orders, total, delta)[0])


@UNITS
def test_a_run_ends_in_a_receipt_that_can_be_computed_again(
    unit: str, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = _config(tiny_config, unit, tmp_path)
    receipt = train(config, out=tmp_path / "run").receipt
    assert receipt["private"] and receipt["setting"]["placement"] == "distributed"
    views = receipt["views"]
    assert views["individual"]["epsilon"] is None and "nobody sees" in views["individual"]["why"]
    assert "epsilon_survivors" not in views["individual"]
    for view in ("aggregate", "release"):
        entry = views[view]
        assert entry["accountant"] == "rdp" and entry["unit"] == unit
        assert entry["epsilon"] == pytest.approx(_skellam_epsilon(receipt["events"], DELTA), rel=1e-5)
        assert 5.9 < entry["epsilon"] <= 6.0
        # all four survived, and three were promised
        assert 0.5 * entry["epsilon"] < entry["epsilon_survivors"] < 0.95 * entry["epsilon"]
        assert entry["mu"] is None
        assert len(entry["curve"]) >= 8
    with Ledger.open(tmp_path / "holder.sqlite", create=False) as ledger:
        assert ledger.verify() == []
        entries = ledger.entries()
        assert [e.charge.client_id for e in entries].count(EVERYONE) == 3
        assert len(entries) == 3 * 5
        spent = ledger.spent(data_digest=receipt["data"]["digest"], unit=unit, delta=DELTA)  # type: ignore[arg-type]
        assert spent == pytest.approx(views["release"]["epsilon"], rel=1e-9)
    rounds = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [record for record in rounds if record["kind"] == "round"]
    assert [record["survivors"] for record in rounds] == [4, 4, 4]
    assert rounds[-1]["epsilon"] == pytest.approx(views["release"]["epsilon"], rel=1e-9)
    assert receipt["sentinels"]["moved"].startswith("passed")
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


@UNITS
def test_the_budget_says_beforehand_what_the_run_will_cost(
    unit: str, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    found = answer(_config(tiny_config, unit, tmp_path), both=False)
    receipt = train(_config(tiny_config, unit, tmp_path), out=tmp_path / "run").receipt
    assert found["epsilon"] == receipt["views"]["release"]["epsilon"]
    assert found["noise_multiplier"] == receipt["mechanism"]["noise_multiplier"]
    assert found["views"]["individual"]["epsilon"] is None
    assert found["views"]["aggregate"]["epsilon"] == found["epsilon"]
    (phase,) = found["phases"]
    assert phase["ring_bits"] == 16 and phase["n_min"] == 3 and 0 <= phase["overflow_probability"] <= 1e-9
    assert phase["local_variance"] * 2 == pytest.approx(receipt["events"][0]["parameters"]["variance"])


@UNITS
def test_rounds_follow_from_noise_and_epsilon(unit: str, tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    config = _config(tiny_config, unit, tmp_path, privacy={"target_epsilon": None, "noise_multiplier": 4.0})
    both = config.model_copy(update={"privacy": config.privacy.model_copy(update={"target_epsilon": 6.0})})
    rounds = answer(both, both=True)["rounds"]

    def cost(number: int) -> float:
        server = config.server.model_copy(update={"rounds": number})
        return float(answer(config.model_copy(update={"server": server}), both=False)["epsilon"])

    assert cost(rounds) <= 6.0 < cost(rounds + 1)


def test_a_discrete_gaussian_run_and_its_command_line(
    tiny_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"distributed": {"noise": "discrete_gaussian", "rotate": True}}
    config = _config(tiny_config, "example", tmp_path, privacy=more)
    (tmp_path / "run.toml").write_text(config.to_toml())
    main(["budget", str(tmp_path / "run.toml")])
    said = capsys.readouterr().out
    assert "discrete_gaussian; " in said and "of 16 bits, which overflow with probability at most" in said
    main(["train", str(tmp_path / "run.toml"), "-o", str(tmp_path / "run"), "--json"])
    receipt = json.loads(capsys.readouterr().out)["receipt"]
    assert receipt["events"][0]["mechanism"] == "discrete_gaussian"
    assert receipt["events"][0]["parameters"]["length"] == 512.0  # padded by the rotation
    assert 5.9 < receipt["views"]["release"]["epsilon"] <= 6.0


class _Stops(Silent):
    """Stops the run in its second round, when two clients have sent: nothing is unmasked yet."""

    def __init__(self) -> None:
        self.sent = 0

    def client_done(self, client_id: str) -> None:
        self.sent += 1
        if self.sent == 6:
            raise KeyboardInterrupt


@UNITS
def test_a_stopped_run_goes_on_to_the_same_bits_at_the_same_cost(
    unit: str, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    def config(name: str) -> Any:
        ledger = {"path": str(tmp_path / f"{name}.sqlite"), "epsilon_cap": 6.0}
        return _config(tiny_config, unit, tmp_path, ledger=ledger, privacy={"reproducible_noise": True})

    whole = train(config("whole"), out=tmp_path / "whole").receipt
    with pytest.raises(KeyboardInterrupt):
        train(config("part"), out=tmp_path / "part", progress=_Stops())
    with Ledger.open(tmp_path / "part.sqlite", create=False) as ledger:
        assert len(ledger.entries()) == 5 + 2
    resumed = train(config("part"), out=tmp_path / "part", resume=True).receipt
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    with Ledger.open(tmp_path / "part.sqlite", create=False) as ledger:
        assert len(ledger.entries()) == 3 * 5
    assert resumed["events"] == whole["events"]


REFUSALS = [
    ("client", {"secagg": {"name": "none"}}, "secagg.name = 'none'"),
    ("client", {"compression": {"name": "stochastic_quantizer"}}, "compression.name = 'stochastic_quantizer'"),
    ("example", {"server": {"weighting": "examples"}}, "server.weighting = 'examples'"),
    ("example", {"server": {"aggregation": "frlora"}}, "server.aggregation = 'frlora'"),
    ("example", {"server": {"personal": ["head"]}}, "server.personal"),
    ("client", {"server": {"meter": True}}, "server.meter"),
    ("example", {"privacy": {"neighboring_relation": "replace_one"}}, "replace_one"),
    ("example", {"client": {"local_steps": 2}}, "client.local_steps = 2"),
    ("example", {"client": {"optimizer": "adamw"}}, 'client.optimizer = "adamw"'),
    ("example", {"client": {"momentum": 0.9}}, "momentum"),
    ("example", {"client": {"weight_decay": 0.1}}, "weight_decay"),
    ("example", {"client": {"proximal_mu": 0.1}}, "proximal_mu"),
    ("example", {"head_warm_start": {"name": "dp_probe"}}, 'head_warm_start.optimizer = "adamw"'),
    ("client", {"privacy": {"accountant": "pld"}}, "accountant = 'pld'"),
    ("client", {"privacy": {"mechanism": "banded"}}, "mechanism = 'banded'"),
    ("client", {"privacy": {"placement": None, "distributed": {"noise": "skellam"}}}, "the table distributed"),
    ("client", {"privacy": {"distributed": {"noise": "laplace"}}}, "noise = 'laplace'"),
    ("client", {"privacy": {"distributed": {"overflow": 0.5}}}, "overflow = 0.5"),
]


@pytest.mark.parametrize(("unit", "change", "named"), REFUSALS, ids=lambda value: str(value)[:60])
def test_what_is_not_proved_is_refused_in_a_sentence(
    unit: str, change: dict[str, Any], named: str, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(tiny_config, unit, tmp_path, **change)
    said = str(caught.value)
    assert named in said
    assert said.endswith(".") and "\n" not in said
    assert any(word in said for word in ("use ", "set ", "expected ", "remove"))
