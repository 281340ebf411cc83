"""The audit of a run, from the command line to its receipt: what holds, and what is contradicted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from privfed.cli import main
from privfed.errors import ConfigError, UnknownNameError
from privfed.federation import canaries
from privfed.federation.local import LocalTrainer
from privfed.report.receipt import read_receipt
from privfed.run import train
from privfed_audits.auditing import accounted_tradeoff, audit, contradiction, lines

M = 1200
KEYS = {
    "attack",
    "bound",
    "empirical_epsilon",
    "interval",
    "ceiling",
    "accounted_epsilon",
    "delta",
    "unit",
    "canaries",
    "auc",
    "tpr_at_fpr",
    "roc",
    "assumptions",
}


def canary_run(tiny_config, *, canary="gradient", count=M, q=1.0, epsilon=8.0, record=True, **tables):
    """Return the configuration of a run of one plain step a round, on all records or a sample, with real noise."""
    own = {
        "tuning": {"name": "full"},
        "client": {"local_steps": 1, "sampling_probability": q, "physical_batch_size": 128},
        "server": {"rounds": 2, "cohort_size": 4, "evaluate_every": 2},
        "privacy": {"target_epsilon": epsilon, "target_delta": 1e-5},
        "secagg": {"name": "none"},
        "audit": {"record": record, "canaries": count, "canary": canary},
    }
    return tiny_config(reproducible_noise=False, **{**own, **tables})


@pytest.fixture(scope="session")
def made():
    """Runs by name: each is made by the first test that asks for it."""
    return {}


@pytest.fixture
def honest(made, tiny_config, tmp_path_factory):
    """Return a recorded run with gradient canaries, audited."""
    if "honest" not in made:
        folder = train(canary_run(tiny_config), out=tmp_path_factory.mktemp("audited") / "run").folder
        made["honest"] = (folder, audit(folder))
    return made["honest"]


def test_an_honest_run_is_bounded_tightly_and_not_contradicted(honest):
    _, found = honest
    assert set(found["views"]) == {"individual", "aggregate", "release"}
    assert found["contradicted"] is False
    assert contradiction(found) is None
    for entry in found["views"].values():
        assert set(entry) >= KEYS
        low, high = entry["interval"]
        assert 0 < low == entry["empirical_epsilon"] < high
        assert low <= entry["accounted_epsilon"]
        assert entry["accounted_epsilon"] == pytest.approx(8, abs=0.1)
        assert entry["above_accounted"] == 0
        assert len(entry["roc"]["fpr"]) <= 200
        low, middle, high = (np.array(entry["roc"][key]) for key in ("low", "tpr", "high"))
        assert (low <= middle).all() and (middle <= high).all()
    own = found["views"]["individual"]
    # one client's update has that client's noise alone: there the bound comes near its ceiling
    assert own["empirical_epsilon"] > 0.6 * own["ceiling"]
    assert own["empirical_epsilon"] > found["views"]["aggregate"]["empirical_epsilon"]
    assert own["canaries"] == M


def test_what_was_proved_is_on_the_receipt(honest):
    folder, found = honest
    receipt = read_receipt(folder / "receipt.json")
    for view, entry in found["views"].items():
        assert receipt["views"][view]["empirical_epsilon"] == entry["empirical_epsilon"]
        assert receipt["views"][view]["canaries"] == M
    assert "at least" in (folder / "report.html").read_text()
    assert json.loads((folder / "audit" / "audit.json").read_text()) == found


def test_the_accounted_curve_is_that_of_the_mechanism(honest):
    from scipy.special import ndtr, ndtri

    folder, _ = honest
    fpr, tpr = accounted_tradeoff(folder, "individual")
    event = read_receipt(folder / "receipt.json")["events"][0]
    mu = np.sqrt(event["steps"]) / event["noise_multiplier"]
    np.testing.assert_allclose(tpr[1:-1], ndtr(ndtri(fpr[1:-1]) + mu), rtol=1e-9)


def test_the_coins_are_opened_by_nobody_but_the_scorer(honest, monkeypatch):
    """All scores can be computed without the coins: they are gone, and only the last step misses them."""
    folder, found = honest
    scores = {p.name: dict(np.load(p)) for p in (folder / "audit" / "scores").glob("*.npz")}
    for path in (folder / "audit" / "scores").glob("*.npz"):
        path.unlink()
    coins = (folder / canaries.COINS).read_bytes()
    opened = []

    def late(folder_):
        opened.append(sorted(p.name for p in (folder / "audit" / "scores").glob("*.npz")))
        return canaries.read_coins(folder_)

    monkeypatch.setattr("privfed_audits.auditing.read_coins", late)
    again = audit(folder)
    assert opened
    assert again["views"] == found["views"]
    assert (folder / canaries.COINS).read_bytes() == coins
    for name, values in scores.items():
        other = np.load(folder / "audit" / "scores" / name)
        for key in set(values) - {"adapter"}:
            np.testing.assert_allclose(other[key], values[key])


def test_an_audit_that_was_stopped_goes_on_with_what_it_has(honest, monkeypatch):
    folder, found = honest

    def fails(*_):
        raise AssertionError("these scores were kept")

    monkeypatch.setattr("privfed_audits.canaries._direct", fails)
    assert audit(folder)["views"] == found["views"]


def test_a_quarter_of_the_noise_is_contradicted_with_exit_code_4(tiny_config, tmp_path, monkeypatch):
    real = LocalTrainer._private_gradient

    def less(self, rows, expected_batch, stream):
        from dataclasses import replace

        before = self.dp
        self.dp = replace(before, noise_multiplier=before.noise_multiplier / 4)
        try:
            real(self, rows, expected_batch, stream)
        finally:
            self.dp = before

    with monkeypatch.context() as patch:
        patch.setattr(LocalTrainer, "_private_gradient", less)
        folder = train(canary_run(tiny_config, epsilon=2.0), out=tmp_path / "run").folder
    result = CliRunner().invoke(main, ["audit", str(folder), "--view", "individual"])
    assert result.exit_code == 4, result.output
    assert "The audit contradicts the receipt: epsilon of the view individual is at least" in result.stderr
    as_json = CliRunner().invoke(main, ["audit", str(folder), "--view", "individual", "--json"])
    assert as_json.exit_code == 4
    assert json.loads(as_json.stdout)["contradicted"] is True
    verified = CliRunner().invoke(main, ["report", str(folder), "--verify"])
    assert verified.exit_code == 4
    assert "an attack proved at least" in verified.stdout


def test_sampling_is_bounded_by_the_accounted_mechanism_itself(tiny_config, tmp_path):
    folder = train(canary_run(tiny_config, q=0.5), out=tmp_path / "run").folder
    found = audit(folder, view="individual")["views"]["individual"]
    assert found["bound"] == "noise_scale"
    assert any("up to the size of its noise" in each for each in found["assumptions"])
    assert 0 < found["empirical_epsilon"] < found["accounted_epsilon"]


@pytest.mark.parametrize("canary", ["mislabelled", "rare_token"])
def test_records_through_the_model_are_bounded_too(tiny_config, tmp_path, canary):
    config = canary_run(tiny_config, canary=canary, count=90, tuning={"name": "lora", "r": 2})
    found = audit(train(config, out=tmp_path / "run").folder)
    assert found["contradicted"] is False
    assert set(found["views"]) == {"individual", "aggregate", "release"}
    assert {"loss", "population", "gradient_dot", "update_cosine"} <= set(found["views"]["release"]["attacks"])
    # how strong is not asked here: to so small a model of random weights one text is much like another
    assert all(0 <= auc <= 1 for auc in found["views"]["individual"]["attacks"].values())


@pytest.mark.parametrize("canary", ["gradient", "random_direction", "optimised_direction"])
def test_clients_as_canaries_under_client_level_privacy(tiny_config, tmp_path, canary):
    config = canary_run(
        tiny_config,
        canary=canary,
        count=60,
        record=False,
        partition={"name": "iid", "clients": 12},
        client={"local_steps": 1, "batch_size": 8, "sampling_probability": None},
        privacy={"unit": "client", "target_epsilon": 50.0, "target_delta": 1e-3, "l2_clip_norm": 0.5},
        server={"rounds": 4, "cohort_size": 10, "evaluate_every": 4},
    )
    found = audit(train(config, out=tmp_path / "run").folder)
    assert set(found["views"]) == {"release"}
    entry = found["views"]["release"]
    assert entry["unit"] == "client"
    assert entry["empirical_epsilon"] <= entry["accounted_epsilon"]
    assert entry["auc"] > 0.55, entry["attacks"]


def test_without_canaries_nothing_is_bounded(tiny_config, tmp_path):
    config = tiny_config(privacy={"unit": "none"}, tuning={"name": "full"}, server={"rounds": 4, "evaluate_every": 4})
    folder = train(config, out=tmp_path / "run").folder
    found = audit(folder)
    entry = found["views"]["release"]
    assert entry["empirical_epsilon"] is None
    assert entry["bound"] == "none"
    assert 0 <= entry["auc"] <= 1
    assert "No bound on epsilon" in "\n".join(lines(found))
    assert "empirical_epsilon" not in read_receipt(folder / "receipt.json")["views"]["release"]
    fpr, tpr = accounted_tradeoff(folder, "release")
    assert (tpr == 1).all()
    assert len(fpr) == len(tpr)


def test_a_language_model_is_asked_about_its_tokens_too(tiny_config, tiny_gpt2, tmp_path):
    config = tiny_config(
        model={"name": str(tiny_gpt2), "task": "causal_lm", "max_length": 16},
        privacy={"unit": "none"},
        tuning={"name": "full"},
        client={"batch_size": 8, "sampling_probability": None},
    )
    folder = train(config, out=tmp_path / "run").folder
    entry = audit(folder)["views"]["release"]
    assert {"loss", "population", "min_k"} <= set(entry["attacks"])
    only = audit(folder, attacks=["min_k"])["views"]["release"]
    assert set(only["attacks"]) == {"min_k"}
    assert only["attacks"]["min_k"] == entry["attacks"]["min_k"]


def test_what_cannot_be_audited_is_said(tiny_config, tmp_path):
    folder = train(canary_run(tiny_config, record=False, count=100), out=tmp_path / "run").folder
    with pytest.raises(ConfigError, match="it has release"):
        audit(folder, view="individual")
    with pytest.raises(UnknownNameError, match="Unknown attack"):
        audit(folder, attacks=["nothing"])
    (folder / canaries.COINS).unlink()
    result = CliRunner().invoke(main, ["audit", str(folder)])
    assert result.exit_code == 2
    assert "coins" in result.stderr
