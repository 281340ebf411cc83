"""The cost of a run's own masked sums, and that what it says is what a round sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from privfed.errors import ConfigError
from privfed.federation.cost import run_cost
from privfed.federation.workbench import planned_lengths


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_cost_is_that_of_a_real_round(federation: Callable[..., Any], weighting: str) -> None:
    run = federation(privacy={"unit": "none"}, server={"cohort_size": 4, "weighting": weighting})
    _, report = run.round()
    cost = run_cost(run.config)
    assert cost["values"] == run.phase.layout.size == planned_lengths(run.config, run.material)["train"]
    assert cost["clients"] == 4 and cost == run_cost(run.config, length=cost["values"])
    assert report.bytes_up == cost["nobody_dropped"]["server"]["bytes_up"]
    broadcast = report.bytes_down - cost["nobody_dropped"]["server"]["bytes_down"]
    assert broadcast > 4 * 4 * cost["values"] and broadcast < 4 * (4 * cost["values"] + 200)
    assert any("4 clients a round" in line for line in cost["lines"])


def test_a_run_without_masking_has_no_such_cost(federation: Callable[..., Any]) -> None:
    run = federation(privacy={"unit": "none"}, secagg={"name": "none"})
    with pytest.raises(ConfigError, match="there is no masked sum"):
        run_cost(run.config, length=10)


@pytest.mark.parametrize(
    "compression",
    [
        {"name": "random_k", "density": 0.3, "inner": {"name": "stochastic_quantizer", "bits": 6}},
        {"name": "count_sketch", "rows": 2, "columns": 50},
        {"name": "rotated_quantizer", "bits": 4},
    ],
)
def test_the_cost_of_a_codec_is_that_of_a_real_round(
    compression: dict[str, Any], federation: Callable[..., Any]
) -> None:
    run = federation(privacy={"unit": "none"}, server={"cohort_size": 4}, compression=compression)
    _, report = run.round()
    cost = run_cost(run.config)
    assert report.bytes_up == cost["nobody_dropped"]["server"]["bytes_up"]
    assert any(f"{cost['sent_values']:,} values in a ring of {run.phase.ring_bits} bits" in x for x in cost["lines"])


def test_two_passes_are_not_costed_from_a_length(federation: Callable[..., Any]) -> None:
    run = federation(privacy={"unit": "none"}, server={"cohort_size": 4}, compression={"name": "powersgd"})
    with pytest.raises(ConfigError, match="'powersgd' sends two sums"):
        run_cost(run.config, length=1000)
