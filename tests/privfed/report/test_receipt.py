"""The receipt: everything a reader needs, and no number where nothing is promised."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from privfed.errors import ConfigError
from privfed.report.receipt import ViewFacts, build_receipt, read_receipt, write_receipt
from privfed.types import VIEWS, PrivacyEvent

VIEW_KEYS = {"epsilon", "delta", "unit", "neighboring_relation", "accountant", "assumptions", "curve", "mu"}


def numbers(value: Any) -> list[float]:
    """Return every number inside a JSON value, those written in its sentences too."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, str):
        return [float(c) for c in value if c.isdigit()]
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    return [n for item in value for n in numbers(item)]


def test_receipt_has_every_item_a_reader_is_owed(folders: ModuleType) -> None:
    receipt = build_receipt(folders.facts())
    assert set(receipt["coverage"]) == {"training", "tuning", "evaluation", "pretraining"}
    assert [entry["covered"] for entry in receipt["coverage"].values()] == [True, False, False, False]
    assert all(entry["sentence"].endswith(".") for entry in receipt["coverage"].values())
    assert receipt["released"]["what"] == "every_iterate"
    assert len(receipt["setting"]["trust_model"]) == 3
    assert receipt["mechanism"]["noise_multiplier"] == 0.8125
    assert {h["name"] for h in receipt["hazards"]} == {
        "large_epsilon",
        "unit_below_person",
        "unbounded_contribution",
        "tuning_on_private_data",
        "floating_point",
        "subgroups",
    }
    states = {a["name"]: a["status"] for a in receipt["accountant"]["assumptions"]}
    assert states == {
        "sampling": "met",
        "public_sizes": "assumed",
        "noise_grid": "assumed",
        "noise_secret": "met",
    }
    assert {"privfed", "python", "torch", "opacus", "dp-accounting", "peft", "transformers"} <= set(receipt["versions"])
    assert receipt["status"] == "finished" and receipt["private"] is True
    for view in VIEWS:
        entry = receipt["views"][view]
        assert set(entry) >= VIEW_KEYS
        assert (entry["epsilon"], entry["delta"], entry["unit"]) == (7.314, 1e-5, "example")
        assert [7.314, 1e-5] in entry["curve"] and len(entry["curve"]) > 10
        assert entry["mu"] == 1.75


def test_view_without_guarantee_has_a_reason_and_no_number(folders: ModuleType) -> None:
    views = build_receipt(folders.central())["views"]
    assert views["release"]["epsilon"] == 3.2
    for name in ("individual", "aggregate"):
        assert views[name]["epsilon"] is None and len(views[name]["why"]) > 10
        assert numbers(views[name]) == []
        assert set(views[name]) >= VIEW_KEYS


@pytest.mark.parametrize(
    "given",
    [
        ViewFacts(epsilon=None, curve=((1.0, 1e-5),), mu=0.7),
        ViewFacts(epsilon=math.inf, mu=0.7),
        ViewFacts(epsilon=math.nan),
    ],
)
def test_numbers_given_for_a_view_without_epsilon_are_dropped(folders: ModuleType, given: ViewFacts) -> None:
    receipt = build_receipt(folders.facts(views={"release": given}))
    assert numbers(receipt["views"]["release"]) == []
    assert receipt["private"] is False and receipt["per_client_epsilon"] == {}


def test_reproducible_noise_is_not_private(folders: ModuleType) -> None:
    receipt = build_receipt(folders.facts(noise_source="reproducible"))
    assert receipt["private"] is False
    assert receipt["verdict"] == "not private: the noise of this run can be recomputed from its seed"
    assert numbers(receipt["views"]) == [] and receipt["per_client_epsilon"] == {}
    assert receipt["simulated"]["epsilon"]["release"] == 7.314
    assert "guarantees nothing" in receipt["simulated"]["sentence"]


def test_no_privacy_promises_nothing(folders: ModuleType) -> None:
    receipt = build_receipt(replace(folders.no_privacy(), noise_description="Gaussian", noise_multiplier=1.0))
    assert receipt["mechanism"]["noise_description"] == "no noise was added"
    assert receipt["mechanism"]["noise_multiplier"] is None
    assert receipt["private"] is False and receipt["accountant"] is None and "simulated" not in receipt
    assert numbers(receipt["views"]) == []
    assert not any(entry["covered"] for entry in receipt["coverage"].values())


@pytest.mark.parametrize(("epsilon", "large"), [(8.0, False), (8.01, True)])
def test_epsilon_above_eight_is_called_large(folders: ModuleType, epsilon: float, large: bool) -> None:
    view = ViewFacts(epsilon=epsilon)
    hazards = build_receipt(folders.facts(views={"release": view}))["hazards"]
    assert next(h["applies"] for h in hazards if h["name"] == "large_epsilon") is large


@pytest.mark.parametrize(("probability", "status"), [(0.1, "not_met"), (1.0, "met")])
def test_shuffled_batches_break_only_an_amplified_account(folders: ModuleType, probability: float, status: str) -> None:
    event = PrivacyEvent(unit="example", noise_multiplier=1.0, sampling_probability=probability, steps=10)
    receipt = build_receipt(folders.facts(sampling="shuffled", events=(event,)))
    assert receipt["accountant"]["assumptions"][0]["status"] == status


def test_stopped_run_says_so(folders: ModuleType) -> None:
    assert build_receipt(folders.facts(rounds_done=4))["status"] == "stopped"


def test_round_trip(folders: ModuleType, tmp_path: Path) -> None:
    receipt = build_receipt(folders.facts(utility={"accuracy": 0.5, "loss": math.nan}))
    write_receipt(tmp_path / "receipt.json", receipt)
    assert read_receipt(tmp_path / "receipt.json") == receipt
    assert receipt["utility"] == {"accuracy": 0.5}
    assert list(tmp_path.iterdir()) == [tmp_path / "receipt.json"]


def test_failed_write_keeps_the_old_receipt(
    folders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "receipt.json"
    write_receipt(path, build_receipt(folders.facts()))
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_receipt(path, build_receipt(folders.no_privacy()))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "receipt.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "privfed-receipt", "format_version": 1}', "\udcff"])
def test_garbled_receipt_is_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "receipt.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ConfigError):
        read_receipt(tmp_path / "receipt.json")


def test_missing_receipt_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no receipt"):
        read_receipt(tmp_path / "receipt.json")


def test_receipt_of_a_view_missing_is_refused(folders: ModuleType, tmp_path: Path) -> None:
    receipt = build_receipt(folders.facts())
    del receipt["views"]["release"]
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(ConfigError, match="release"):
        read_receipt(tmp_path / "receipt.json")
