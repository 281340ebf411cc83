"""Rules that cannot hold are refused in the configuration, in a sentence that names both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from privfed.config import apply_override, load_config, parse_config
from privfed.errors import ConfigError, UnknownNameError
from privfed.rules import RULES

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
    assert config.server.rule == rule
    assert parse_config(config.to_dict(), where="again") == config


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.combines])
@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"secagg": {"name": "masked"}}, ["masked", 'secagg.name = "none"', '"fedavg"']),
        ({"privacy": {"unit": "client", "noise_multiplier": 1.0}}, ['"client"', "no sum", '"example"', '"fedavg"']),
        ({"server": {"weighting": "examples"}}, ['"examples"', 'weighting = "uniform"']),
        (
            {"privacy": {"placement": "distributed", "noise_multiplier": 1.0}, "secagg": {"name": "masked"}},
            ["masked", "sum"],
        ),
        (
            {"privacy": {"placement": "distributed", "noise_multiplier": 1.0}},
            ["distributed", 'secagg.name = "masked"'],
        ),
    ],
)
def test_a_robust_rule_needs_single_updates_that_weigh_the_same(
    rule: str, tables: Mapping[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(rule, **tables)
    assert words[0] == "distributed" or rule in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("table", "cohort", "words"),
    [
        ({"name": "krum", "byzantine": 3}, 8, ["at least 9 updates", "2 f + 2", "rounds of 8 clients"]),
        ({"name": "multi_krum", "selected": 6}, 8, ["at least 9 updates", "selected = 6"]),
        ({"name": "trimmed_mean", "trim_share": 0.4}, 4, ["cuts 2 from each end", "cohort_size"]),
        ({"name": "trimmed_mean", "trim_share": 0.5}, 9, ["trim_share", "less than 0.5"]),
        ({"name": "krum", "byzantine": -1}, 9, ["byzantine", "greater than or equal to 0"]),
        ({"name": "krum", "trim_share": 0.1}, 9, ["Unknown key 'server.aggregation.trim_share'", "byzantine"]),
        ({"name": "norm_bound", "factor": 0.5}, 9, ["factor"]),
    ],
)
def test_options_that_cannot_hold_get_a_sentence(table: Mapping[str, Any], cohort: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _config("fedavg", server={"aggregation": table, "cohort_size": cohort})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rule_is_a_name_or_a_table() -> None:
    short = _config("krum")
    assert short.server.rule == "krum"
    assert short.to_dict()["server"]["aggregation"] == {"name": "krum", "byzantine": 1}
    assert _config("fedavg", server={"aggregation": {"name": "krum"}}) == short
    assert parse_config(short.to_dict(), where="again") == short
    with pytest.raises(ConfigError, match="expected the name of an aggregation rule"):
        _config("fedavg", server={"aggregation": 3})


def test_overrides_reach_the_rules_options() -> None:
    raw: dict[str, Any] = {"server": {"aggregation": "krum"}, "secagg": {"name": "none"}}
    apply_override(raw, "server.aggregation.byzantine=2")
    assert parse_config(raw, where="x").to_dict()["server"]["aggregation"] == {"name": "krum", "byzantine": 2}
    apply_override(raw, "server.aggregation.name=median")
    assert parse_config(raw, where="x").to_dict()["server"]["aggregation"] == {"name": "median"}
    found = load_config("tiny", ["server.aggregation.byzantine=0", "server.aggregation=krum", "secagg.name=none"])
    assert found.to_dict()["server"]["aggregation"] == {"name": "krum", "byzantine": 0}


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_zeros_of_values_that_were_not_sent_are_no_votes(rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(rule, compression={"name": "top_k"})
    for word in ("top_k", rule, '"random_k"', '"geometric_median"'):
        assert word in str(caught.value)
    for codec in ("random_k", "svd_truncate"):  # the same values of every client
        assert _config(rule, compression={"name": codec}).server.rule == rule
    assert _config("geometric_median", compression={"name": "top_k"}).server.rule == "geometric_median"
