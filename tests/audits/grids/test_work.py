"""One cell, really trained and attacked: what its record says, also of what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privfed.federation.shared import SharedWork
from privfed.run_config import RunConfig
from privfed_audits.grids.cells import Cell, cells
from privfed_audits.grids.grid import load_grid
from privfed_audits.grids.measures import points
from privfed_audits.grids.work import run_cell, thinned

AUDITED = ["audit.record=true", "audit.canaries=32", "privacy.reproducible_noise=true"]


def config_of(path: Path, tuning: str = "LoRA", privacy: str = "epsilon 8") -> tuple[Cell, RunConfig]:
    for cell in cells(load_grid(str(path))):
        if (cell.tuning, cell.privacy) == (tuning, privacy) and cell.config is not None:
            return cell, cell.config
    raise LookupError(tuning)


def test_a_cell_is_trained_attacked_and_measured(small_grid: Callable[..., Path], tmp_path: Path) -> None:
    cell, config = config_of(small_grid(settings=AUDITED))
    record = run_cell(config, tmp_path / "run", SharedWork())
    assert record["state"] == "done", record
    release = record["promises"]["release"]
    assert record["simulated"] and release["epsilon"] <= 8.0 and release["unit"] == "example"
    assert 0 < record["bytes_round"] < record["bytes_run"] and record["trained"] > 0
    views = record["audit"]["views"]
    assert {"aggregate", "release"} <= set(views)
    for entry in views.values():
        roc = entry["roc"]
        assert entry["accounted_epsilon"] == pytest.approx(release["epsilon"]) and entry["ceiling"] is not None
        assert len(roc["fpr"]) == len(roc["allowed"]) and max(roc["allowed"]) <= 1
        assert all(allowed >= fpr for allowed, fpr in zip(roc["allowed"], roc["fpr"], strict=True))
    (point,) = points([cell], {cell.key: record})
    assert point.epsilon == release["epsilon"] and point.leak() is not None
    again = run_cell(config, tmp_path / "again", SharedWork())
    for name in ("utility", "promises", "audit", "bytes_run"):
        drop = {"run_id"}
        left, right = record[name], again[name]
        if isinstance(left, dict):
            left, right = ({k: v for k, v in each.items() if k not in drop} for each in (left, right))
        assert left == right, name


def test_what_cannot_be_is_refused_and_what_breaks_has_failed(
    small_grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, too_large = config_of(small_grid(settings=["client.sampling_probability=unset", "client.batch_size=1000"]))
    record = run_cell(too_large, tmp_path / "a", SharedWork())
    assert record["state"] == "refused" and "larger than the shard" in record["reason"]

    _, config = config_of(small_grid())

    def broken(*_args: Any, **_options: Any) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("privfed.run.train", broken)
    record = run_cell(config, tmp_path / "b", SharedWork())
    assert record["state"] == "failed" and record["reason"].startswith("ZeroDivisionError: a fault (test_work.py, line")
    assert record["wall_seconds"] >= 0


def test_a_run_that_cannot_be_audited_still_counts(small_grid: Callable[..., Path], tmp_path: Path) -> None:
    _, config = config_of(small_grid(), tuning="head", privacy="none")
    record = run_cell(config, tmp_path / "run", SharedWork(), attacks=["no_such_attack"])
    assert record["state"] == "done" and "no_such_attack" in record["audit"]["failed"]


def test_each_cell_has_a_ledger_of_its_own(small_grid: Callable[..., Path], text_csv: Path, tmp_path: Path) -> None:
    _, config = config_of(small_grid(), tuning="head")
    assert run_cell(config, tmp_path / "run", SharedWork(), audit=False)["state"] == "done"
    assert (tmp_path / "run" / "ledger.sqlite").is_file()
    assert not text_csv.with_name(f"{text_csv.name}.privfed-ledger.sqlite").exists()


def test_a_thinned_curve_keeps_its_ends_and_its_shape() -> None:
    fpr = [i / 1000 for i in range(1001)]
    roc = {"fpr": fpr, "tpr": [x**0.5 for x in fpr]}
    found = thinned(roc, most=30)
    assert 15 < len(found["fpr"]) <= 31 and found["fpr"][0] == 0.0 and found["fpr"][-1] == 1.0
    assert all(t == pytest.approx(f**0.5) for f, t in zip(found["fpr"], found["tpr"], strict=True))
    assert sum(f < 0.01 for f in found["fpr"]) >= 5
    assert thinned(found, most=40) == found
    # a ROC whose first point is above 0 starts there, not at its end
    above = thinned({"fpr": fpr[8:], "tpr": [x**0.5 for x in fpr[8:]]}, most=30)
    assert above["fpr"] == sorted(above["fpr"]) and above["fpr"][0] == 0.008 and above["fpr"][-1] == 1.0
