"""Rules that cannot hold are refused in the configuration, in a sentence that names both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from privfed.config import parse_config
from privfed.errors import ConfigError, UnknownNameError

LORA = {"tuning": {"name": "lora"}, "secagg": {"name": "none"}}


def _config(rule: str, **tables: Any) -> Any:
    raw: dict[str, Any] = {**LORA, **tables}
    raw["server"] = {"aggregation": rule, **tables.get("server", {})}
    return parse_config(raw, where="run.toml")


@pytest.mark.parametrize(
    ("rule", "tables", "words"),
    [
        ("rolora", {"tuning": {"name": "ffa_lora"}}, ["rolora", "ffa_lora", '"lora"', '"fedavg"']),
        ("fedsa_lora", {"tuning": {"name": "bitfit"}}, ["fedsa_lora", "bitfit", '"lora"']),
        ("fedex_lora", {"secagg": {"name": "masked"}}, ["fedex_lora", "masked", 'secagg.name = "none"', "frlora"]),
        ("flexlora", {"privacy": {"unit": "client", "noise_multiplier": 1.0}}, ["flexlora", '"client"', '"example"']),
        ("flora", {"server": {"optimizer": "fedadam"}}, ["flora", "anew", 'optimizer = "sgd"']),
        ("fedsvd", {"server": {"momentum": 0.5}}, ["fedsvd", "momentum = 0.0"]),
        ("frlora", {"server": {"learning_rate": 0.5}}, ["frlora", "learning_rate = 1.0"]),
        ("scaffold", {}, ["scaffold", 'client.optimizer = "sgd"']),
        ("scaffold", {"client": {"optimizer": "sgd", "momentum": 0.9}}, ["scaffold", "momentum"]),
        (
            "scaffold",
            {"client": {"optimizer": "sgd"}, "server": {"weighting": "examples"}},
            ["scaffold", 'weighting = "uniform"'],
        ),
        ("fedavg", {"server": {"optimizer": "fedavgm"}}, ["fedavgm", "momentum"]),
    ],
)
def test_what_cannot_hold_is_refused(rule: str, tables: Mapping[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(rule, **tables)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_rule_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'rolora'"):
        _config("roloora")


@pytest.mark.parametrize("rule", ["fedavg", "rolora", "fedsa_lora", "fedsvd", "frlora"])
@pytest.mark.parametrize("unit", ["example", "client"])
def test_rules_on_sums_go_with_masking_and_both_units(rule: str, unit: str) -> None:
    config = _config(rule, secagg={"name": "masked"}, privacy={"unit": unit, "noise_multiplier": 1.0})
    assert config.server.aggregation == rule
    assert parse_config(config.to_dict(), where="again") == config
