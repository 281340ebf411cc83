"""Robust rules in real rounds: what the server applies, what a lost client costs, and what a wrong one cannot do.

Shape suffixes: D trained values, K updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from privfed.errors import ClientError, ConfigError
from privfed.federation import material as materials
from privfed.federation.phases import phases
from privfed.rules import RULES, made

ROBUST = [name for name, rule in RULES.items() if rule.combines]
FREE = {
    "privacy": {"unit": "none", "noise_multiplier": None},
    "secagg": {"name": "none"},
    "partition": {"name": "iid", "clients": 7},
}


def _updates(run: Any, wrong: int) -> np.ndarray:
    """One update for each client, in the order of their names; the last ones are wrong."""
    size, count = run.phase.layout.size, len(run.phase.clients)
    updates_KD = np.random.default_rng(5).standard_normal((count, size)) * 0.1 + 1.0
    updates_KD[count - wrong :] *= -1e4
    return updates_KD.astype(np.float32)


def _answering(run: Any, given: Any, updates_KD: np.ndarray) -> None:
    by_name = dict(zip(sorted(run.phase.clients), updates_KD, strict=True))
    run.trainers(lambda client: given(by_name[client.shard.client_id]))


@pytest.mark.parametrize("rule", ROBUST)
def test_the_server_applies_what_the_rule_makes_of_the_updates(
    rule: str, federation: Callable[..., Any], given: Any
) -> None:
    run = federation(**FREE, server={"aggregation": rule, "cohort_size": 7, "learning_rate": 0.5})
    updates_KD = _updates(run, wrong=1)
    _answering(run, given, updates_KD)
    before = run.state.params_D
    after, report = run.round()
    wanted_D = made(run.config.server.aggregation).combined(updates_KD.astype(np.float64))
    assert report.survivors == 7
    assert report.update_norm == pytest.approx(float(np.linalg.norm(wanted_D)))
    np.testing.assert_allclose(after.params_D, before + 0.5 * wanted_D, atol=1e-5)
    if rule != "norm_bound":  # its clip leaves a wrong direction in, at no more than an honest length
        assert np.abs(after.params_D - before).max() < 1.0
    assert np.abs(updates_KD.mean(axis=0)).min() > 500


def test_a_server_optimiser_works_on_the_combined_update(federation: Callable[..., Any], given: Any) -> None:
    server = {"aggregation": "median", "cohort_size": 7, "momentum": 0.5}
    run = federation(**FREE, server=server)
    updates_KD = _updates(run, wrong=1)
    _answering(run, given, updates_KD)
    start_D, median_D = run.state.params_D, np.median(updates_KD, axis=0)
    run.round()
    after, _ = run.round()
    np.testing.assert_allclose(after.params_D, start_D + 2.5 * median_D, atol=1e-4)


def test_too_few_survivors_lose_the_round(federation: Callable[..., Any], given: Any) -> None:
    run = federation(**FREE, server={"aggregation": {"name": "krum", "byzantine": 2}, "cohort_size": 7})
    _answering(run, given, _updates(run, wrong=1))

    def fails(_params_D: np.ndarray) -> np.ndarray:
        raise ClientError("gone")

    first = min(run.phase.clients)
    clients = {**run.phase.clients, first: replace(run.phase.clients[first], trainer=given(fails))}
    run.phase = replace(run.phase, clients=clients)
    before = run.state.params_D
    after, report = run.round()
    assert report.survivors == 6
    assert "6 finite updates: it needs at least 7 updates" in str(report.lost)
    assert report.update_norm == 0.0
    np.testing.assert_array_equal(after.params_D, before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_left_out(value: float, federation: Callable[..., Any], given: Any) -> None:
    run = federation(**FREE, server={"aggregation": "median", "cohort_size": 7})
    updates_KD = _updates(run, wrong=1)
    updates_KD[-1, 3] = value
    _answering(run, given, updates_KD)
    before = run.state.params_D
    after, report = run.round()
    assert np.isfinite(report.update_norm)
    np.testing.assert_allclose(after.params_D, before + np.median(updates_KD[:-1], axis=0), atol=1e-6)


def test_a_cohort_of_all_clients_is_checked_when_the_clients_are_known(tiny_config: Callable[..., Any]) -> None:
    rule = {"name": "krum", "byzantine": 3}
    config = tiny_config(**FREE, server={"aggregation": rule, "cohort_size": None})
    with pytest.raises(ConfigError, match=r"rounds of 7 clients: it needs at least 9 updates.*\.$"):
        materials.gather(config)


def test_the_warm_start_is_as_robust_as_the_rest(tiny_config: Callable[..., Any]) -> None:
    tables = {**FREE, "head_warm_start": {"name": "dp_probe", "rounds": 2}, "tuning": {"name": "lora", "r": 2}}
    robust = tiny_config(**tables, server={"aggregation": "median"})
    assert [server.rule for _, _, server in phases(robust)] == ["median", "median"]
    other = tiny_config(**tables, server={"aggregation": "rolora"})
    assert [server.rule for _, _, server in phases(other)] == ["fedavg", "rolora"]
