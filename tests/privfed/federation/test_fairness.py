"""Accuracy by client: by hand, in one pass where nothing is personal, and on own models where parts are."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.federation.fairness import OWN_LABELS, OWN_ROWS, Fairness, make_fairness
from privfed.types import Shard

TEST_LABELS = np.array([0, 0, 0, 0, 1, 1, 2])
RIGHT = np.array([1.0, 1, 1, 0, 1, 0, 0])  # by class: 3/4, 1/2, 0


def _made(**changes: Any) -> Fairness:
    shards = [Shard(client_id=name, indices=rows) for name, rows in (("a", np.arange(4)), ("b", np.arange(4, 6)))]
    given: dict[str, Any] = {
        "train_labels": np.array([0, 0, 0, 1, 2, 1]),
        "test_labels": TEST_LABELS,
        "test_clients": None,
        "classes": 4,
        "most": 100,
        "seed": 0,
    }
    found = make_fairness(shards, **{**given, **changes})
    assert found is not None
    return found


def test_clients_of_the_test_rows_are_scored_on_their_own() -> None:
    fairness = _made(test_clients=["a", "a", "b", "b", "b", "x", "x"])
    scores = fairness.shared(RIGHT)
    assert scores is not None
    assert (scores.mean, scores.worst_tenth, scores.scored) == (pytest.approx((1 + 2 / 3) / 2), pytest.approx(2 / 3), 2)
    assert scores.basis == OWN_ROWS


@pytest.mark.parametrize("clients", [None, ["u"] * 7])
def test_others_are_scored_by_their_own_classes(clients: list[str] | None) -> None:
    scores = _made(test_clients=clients).shared(RIGHT)
    assert scores is not None
    a, b = 0.75 * 3 / 4 + 0.25 * 1 / 2, 0.5 * 1 / 2 + 0.5 * 0
    assert scores.mean == pytest.approx((a + b) / 2)
    assert scores.worst_tenth == pytest.approx(b)
    assert scores.basis == OWN_LABELS
    assert "not part of the release" in str(scores.record()["clients_basis"])


def test_a_class_without_test_rows_is_left_out() -> None:
    labels = np.array([0, 0, 0, 3, 3, 3])  # b has only class 3, of which there is no test row
    scores = _made(train_labels=labels).shared(RIGHT)
    assert scores is not None
    assert (scores.scored, scores.mean) == (1, pytest.approx(0.75))


def test_language_models_are_scored_by_the_perplexity_of_own_rows() -> None:
    """Over all tokens of a client, not a mean of rows; the worst are those with the highest."""
    losses = np.array([[2.0, 1], [6.0, 3], [8.0, 2], [0.0, 0], [1.0, 1], [9.0, 1], [0.0, 0]])
    clients = ["a", "a", "b", "b", "x", "x", "c"]
    fairness = _made(train_labels=None, test_labels=None, test_clients=clients)
    scores = fairness.shared(losses)
    assert scores is not None
    assert (scores.metric, scores.scored, scores.basis) == ("perplexity", 2, OWN_ROWS)
    assert scores.mean == pytest.approx((np.exp(8 / 4) + np.exp(8 / 2)) / 2)
    assert scores.worst_tenth == pytest.approx(np.exp(4.0))
    better = fairness.personal(losses, lambda client, rows: losses[rows] / [2, 1] if client == "b" else None)
    assert better is not None
    assert better.worst_tenth == pytest.approx(np.exp(2.0))
    endless = fairness.shared(losses * [1000, 1])
    assert endless is not None
    assert endless.record()["clients_mean"] is None


@pytest.mark.parametrize("missing", ["train_labels", "test_labels"])
def test_without_classes_nothing_is_said(missing: str) -> None:
    given = {"train_labels": TEST_LABELS, "test_labels": TEST_LABELS, missing: None}
    shards = [Shard(client_id="a", indices=np.arange(4))]
    assert make_fairness(shards, **given, test_clients=None, classes=3, most=9, seed=0) is None


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (40, 4)])
def test_the_worst_tenth_is_rounded_up(clients: int, worst: int) -> None:
    names = [f"c{i:02}" for i in range(clients)]
    right = np.arange(clients) / clients
    fairness = Fairness(
        rows={name: np.array([i]) for i, name in enumerate(names)},
        labels_N=np.zeros(clients, dtype=np.int64),
        shares={},
        most=100,
        seed=0,
    )
    scores = fairness.shared(right)
    assert scores is not None
    assert scores.worst_tenth == pytest.approx(right[:worst].mean())


def test_own_models_count_where_there_are_some_and_at_most_so_many_are_run() -> None:
    asked: list[str] = []

    def own(client: str, rows: np.ndarray) -> np.ndarray | None:
        asked.append(client)
        assert set(TEST_LABELS[rows]) == ({0, 1} if client == "a" else {1, 2})  # only classes that it has
        return np.ones(len(rows)) if client == "a" else None

    scores = _made().personal(RIGHT, own)
    assert scores is not None
    assert scores.mean == pytest.approx((1 + 0.25) / 2)
    assert asked == ["a", "b"]
    asked.clear()
    few = _made(most=1)
    assert few.personal(RIGHT, own) is not None
    assert len(asked) == 1
    assert few.chosen() == few.chosen()


# whole runs

NOISE = {"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward pass of an evaluation."""
    from privfed.federation import evaluate
    from privfed.federation.engines import in_process

    found: list[int] = []
    one, own = evaluate.evaluate, evaluate.scores_by_row

    def counted(module: Any, examples: Any, *rest: Any) -> Any:
        found.append(len(examples))
        return one(module, examples, *rest)

    def counted_own(module: Any, examples: Any, rows: Any) -> Any:
        found.append(-len(rows))
        return own(module, examples, rows)

    monkeypatch.setattr(in_process, "evaluate", counted)
    monkeypatch.setattr(in_process, "scores_by_row", counted_own)
    return found


def _evals(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval"]


@pytest.mark.parametrize("partition", [{"name": "by_column"}, {"name": "iid", "clients": 4}])
def test_without_personal_parts_there_is_one_pass(
    partition: dict[str, Any], passes: list[int], tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    from privfed.run import train

    config = tiny_config(partition=partition, privacy=NOISE, ledger={"path": str(tmp_path / "ledger.sqlite")})
    result = train(config, out=tmp_path / "run")
    evals = _evals(result.folder)
    assert len(passes) == len(evals) == 2
    assert min(passes) > 0
    for line in evals:
        assert 0 <= line["clients_worst_tenth"] <= line["clients_mean"] <= 1
        assert line["clients_basis"].startswith(OWN_ROWS if partition["name"] == "by_column" else OWN_LABELS)
    assert result.receipt["utility"]["clients_mean"] == evals[-1]["clients_mean"]
    assert any("clients_mean" in note and "not part of the release" in note for note in result.receipt["notes"])


def test_personal_parts_are_scored_on_each_clients_own_model(
    passes: list[int], tiny_config: Callable[..., Any], text_csv: Path, tmp_path: Path
) -> None:
    """Clients of one class each, with heads of their own: each one's model knows that class, the server's does not."""
    from privfed.run import train

    path = tmp_path / "rows.csv"
    with text_csv.open(encoding="utf-8") as old, path.open("w", encoding="utf-8", newline="") as new:
        rows = csv.writer(new)
        rows.writerow(["text", "label", "client"])
        rows.writerows([row["text"], row["label"], f"of {row['label']}"] for row in csv.DictReader(old))
    config = tiny_config(
        data={"path": str(path)},
        partition={"name": "by_column"},
        privacy={"unit": "none", "target_epsilon": None},
        server={"personal": ["head"], "rounds": 2, "cohort_size": 3},
        client={"learning_rate": 0.5, "local_steps": 4},
        ledger={"path": str(tmp_path / "ledger.sqlite")},
    )
    result = train(config, out=tmp_path / "run")
    first, last = _evals(result.folder)
    assert last["clients_mean"] > 0.95
    assert last["accuracy"] < 0.7
    assert first["clients_scored"] == last["clients_scored"] == 3
    assert sum(rows < 0 for rows in passes) == 3  # only once they have models of their own, on their own rows
    assert sum(-rows for rows in passes if rows < 0) == last["n"]
