"""Trackers, with the real libraries: the values of metrics.jsonl, those that may be told, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import privfed
from privfed import tracking
from privfed.errors import ConfigError
from privfed.federation.follow import flat, following
from privfed.federation.progress import Progress
from privfed.table import Table
from privfed.tracking import PUBLIC, SCORES, TRACKERS, TrackedRun, TrackerPlugin, public_values

NOISE = {"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"}


@pytest.fixture
def config(tiny_config: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return ``config(**tracking)``: a run of seconds."""
    return lambda **table: tiny_config(privacy=NOISE, ledger={"path": str(tmp_path / "l.sqlite")}, tracking=table)


def expected(run: privfed.Run) -> dict[str, list[tuple[int, float]]]:
    """Return what a tracker should have of a run, by name: (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run.metrics:
        keys = {"eval": SCORES, "round": PUBLIC["round"]}.get(row["kind"], ())
        for key in keys:
            if row.get(key) is not None:
                found.setdefault(f"{row['phase']}/{key}", []).append((row["round"], row[key]))
    return found


class StoppedError(Exception):
    """Raised to stop a run after its first round."""


class Stopper(Progress):
    def round_done(self, phase: str, number: int, rounds: int, epsilon: float | None) -> None:
        raise StoppedError


def test_tensorboard_has_the_figures_of_the_run_once_after_a_resume(config: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class StopAfterTwo(Progress):
        def round_started(self, phase: str, number: int, rounds: int, cohort: int) -> None:
            if number == 2:
                raise StoppedError

    out, own = tmp_path / "run", config(name="tensorboard")
    with pytest.raises(StoppedError):
        privfed.train(own, out=out, progress=StopAfterTwo())
    run = privfed.train(own, out=out, resume=True)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    wanted = expected(run)
    assert set(scalars) == set(wanted) and {"train/accuracy", "train/loss", "train/bytes_up"} <= set(wanted)
    for tag, points in wanted.items():
        assert scalars[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], tag
    written = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert b"client.learning_rate = 0.5" in written
    assert str(own.data.path).encode() not in written and b"owner" not in written


def test_mlflow_has_one_run_with_the_figures_also_after_a_resume(config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    out, own = tmp_path / "run", config(name="mlflow", uri=uri, experiment="trial")
    with pytest.raises(StoppedError):
        privfed.train(own, out=out, progress=Stopper())
    run = privfed.train(own, out=out, resume=True)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("trial")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.tags["privfed.run_id"] == json.loads((out / "run.json").read_text())["run_id"]
    assert found.data.params["server.rounds"] == "2" and "data.path" not in found.data.params
    wanted = expected(run)
    assert set(found.data.metrics) == set(wanted)
    for tag, points in wanted.items():
        history = client.get_metric_history(found.info.run_id, tag)
        assert sorted((metric.step, metric.value) for metric in history) == sorted(points)


def test_only_what_may_be_told_is_told() -> None:
    line = {
        "kind": "round", "phase": "train", "round": 3, "epsilon": 1.5, "survivors": 4, "cohort": 5, "bytes_up": 10,
        "bytes_down": 20, "update_norm": 0.1, "saturated": 2, "dropped": [{"client_id": "c"}], "seconds": {"all": 1.0},
    }  # fmt: skip
    assert public_values(line, unit="example") == (
        {"train/epsilon": 1.5, "train/survivors": 4, "train/cohort": 5, "train/bytes_up": 10, "train/bytes_down": 20},
        3,
    )
    # where whole clients are protected, how many were drawn is part of the protection
    assert public_values(line, unit="client") == ({"train/epsilon": 1.5}, 3)
    score = {"kind": "eval", "phase": "train", "round": 1, "accuracy": 0.5, "clients_mean": 0.4, "clients_scored": 3}
    assert public_values(score, unit="example") == ({"train/accuracy": 0.5}, 1)
    for kind in ("simulation", "finish", "start", "anything new"):
        assert public_values({"kind": kind, "round": 1, "accuracy": 1.0, "samples": ["text"]}, unit="example")[0] == {}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a tracker that fails on its second message, and return its name."""

    class FailingConfig(Table):
        name: str = "failing"

    class Failing:
        calls = 0

        def log(self, values: Mapping[str, float], step: int) -> None:
            Failing.calls += 1
            if Failing.calls > 1:
                raise OSError("no route to host")

        def close(self, *, finished: bool) -> None:
            raise AssertionError("a tracker that is off is left alone")

    def start(config: Table, run: TrackedRun) -> Failing:
        return Failing()

    TRACKERS.names()  # loads the others first
    monkeypatch.setitem(TRACKERS._entries, "failing", TrackerPlugin(config=FailingConfig, build=start))
    return "failing"


def test_a_tracker_that_fails_is_turned_off_and_the_run_goes_on(failing: str, config: Any, tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(Progress):
        def message(self, text: str) -> None:
            said.append(text)

    run = privfed.train(config(name=failing), out=tmp_path / "run", progress=Listener())
    assert run.finished
    (sentence,) = [text for text in said if "tracker" in text]
    assert sentence.startswith("Warning: the tracker 'failing' failed and is off from here on (no route to host)")


def test_a_tracker_whose_package_is_not_there_is_refused_before_anything_runs(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    own = config(name="mlflow")
    with pytest.raises(ConfigError, match=r"pip install 'privfed\[mlflow\]'"), following(own, tmp_path, None):
        pass


def test_the_configuration_that_is_sent_has_no_path_of_this_machine(config: Any) -> None:
    own = config()
    values = flat(own)
    assert values["tuning.r"] == 2 and values["tracking.name"] == "none"
    assert not {"data.path", "ledger.path"} & values.keys() and own.data.path not in values.values()
