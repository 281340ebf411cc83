"""The command line as a shell sees it: real processes, exit codes, one JSON object on stdout, errors included."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import pytest

from privfed.compression import CODECS
from privfed.config import load_config, presets
from privfed.data import PARTITIONERS
from privfed.privacy.ledger import Charge, Ledger
from privfed.tuning import TUNINGS
from privfed.types import PrivacyEvent

BASE = """
seed = 7
[data]
name = "pydoc"
limit = 600
[partition]
name = "iid"
clients = 4
[client]
sampling_probability = 0.1
local_steps = 2
[server]
rounds = 3
cohort_size = 3
[privacy]
target_epsilon = 8.0
target_delta = 1e-4
accountant = "rdp"
"""


@pytest.fixture
def privfed(tmp_path):
    """Return a function that runs ``privfed`` in an empty folder: (exit code, stdout, stderr)."""

    (tmp_path / "base.toml").write_text(BASE)

    def run(*words):
        done = subprocess.run(
            [sys.executable, "-m", "privfed.cli", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def ledger(tmp_path):
    """Return the path of a ledger with three charges under one cap."""
    path = tmp_path / "ledger.sqlite"
    event = PrivacyEvent(unit="example", noise_multiplier=1.0, sampling_probability=0.1, steps=5)
    with Ledger.open(path) as book:
        for number in range(3):
            book.charge(
                Charge(
                    run_id="run1",
                    data_digest="data1",
                    partition_digest="p",
                    client_id="c",
                    phase="train",
                    round=number,
                    input_digest=f"d{number}",
                    event=event,
                    project="thesis",
                )
            )
        book.set_cap(data_digest="data1", unit="example", epsilon=9.0, delta=1e-5)
    return path


def one_object(text):
    """Return the one JSON object that ``text`` is; NaN and infinity are no JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def failed(result, kind, code):
    status, out, err = result
    error = one_object(out)["error"]
    assert (status, error["exit_code"], error["kind"]) == (code, code, kind)
    assert err == ""
    return error["message"]


# --- help, usage --------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_the_exit_codes(privfed):
    for flag in ("--help", "-h"):
        status, out, err = privfed(flag)
        assert (status, err) == (0, "")
        for word in ("train", "report", "budget", "ledger", "ls", "config", "3 budget exceeded"):
            assert word in out
    status, out, _ = privfed("config", "--help")
    assert status == 0 and all(word in out for word in ("show", "validate", "diff"))


def test_the_version(privfed):
    status, out, _ = privfed("--version")
    assert status == 0 and "0.1.0" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("budgt", "base.toml"), "Did you mean 'budget'?"),
        (("config", "shw", "base.toml"), "Did you mean 'show'?"),
        (("budget",), "Missing argument"),
        (("budget", "base.toml", "--clients", "0"), "--clients"),
        (("ls", "--jsn"), "--jsn"),
    ],
)
def test_usage_errors_end_with_two_in_text_and_in_json(privfed, words, expected):
    status, out, err = privfed(*words)
    assert (status, out) == (2, "")
    assert expected in err
    status, out, err = privfed(*words, "--json")
    error = one_object(out)["error"]
    assert (status, error["exit_code"], err) == (2, 2, "")
    assert expected in error["message"]


# --- ls -----------------------------------------------------------------------------------------------------------


def test_ls_lists_everything_there_is(privfed):
    status, out, err = privfed("ls", "--json")
    assert (status, err) == (0, "")
    found = one_object(out)
    assert list(found["tunings"]) == TUNINGS.names()
    assert list(found["codecs"]) == CODECS.names()
    assert list(found["partitioners"]) == PARTITIONERS.names()
    assert list(found["presets"]) == list(presets())
    assert {"pydoc"} <= found["data"].keys() and {"minilm"} <= found["models"].keys()
    assert {"mechanisms", "accountants"} <= found.keys()
    for kind, entries in found.items():
        assert entries, kind
        assert all(text.strip() and "\n" not in text for text in entries.values()), kind
    status, out, _ = privfed("ls", "codecs")
    assert status == 0 and "stochastic_quantizer" in out and "lora" not in out
    assert "'codecs'" in failed(privfed("ls", "codec", "--json"), "UnknownNameError", 2)


# --- config -------------------------------------------------------------------------------------------------------


def test_config_show_states_the_cost_of_a_masked_sum(privfed):
    status, out, _ = privfed("config", "show", "base.toml", "--cost", "--length", 1000, "--json")
    found = json.loads(out)
    assert status == 0 and found["clients"] == 3 and found["values"] == 1000 and found["ring_bits"] == 32
    client = found["nobody_dropped"]["client"]
    assert client["keystream_bytes"] == 4 * 1000 * 3 and 4000 < client["bytes_up"] < 5000
    assert [one["clients"] for one in found["in_groups"]][-1] == 1_000_000
    status, out, _ = privfed("config", "show", "base.toml", "--cost", "--length", 1000, "-s", "secagg.ring_bits=24")
    assert status == 0 and "3 clients a round, 1,000 values in a ring of 24 bits" in out and "1,000,000 clients" in out
    status, _, err = privfed("config", "show", "base.toml", "--cost", "-s", "secagg.name=none")
    assert status == 2 and 'set secagg.name = "masked"' in err


def test_config_show_prints_what_can_be_read_again(privfed, tmp_path):
    status, out, _ = privfed("config", "show", "base.toml", "-s", "tuning.name=lora")
    assert status == 0
    (tmp_path / "again.toml").write_text(out)
    assert load_config(str(tmp_path / "again.toml")) == load_config(str(tmp_path / "base.toml"), ["tuning.name=lora"])
    status, out, _ = privfed("config", "show", "again.toml", "--json")
    tuning = one_object(out)["tuning"]
    assert {key: tuning[key] for key in ("name", "r", "lora_alpha", "use_dora")} == {
        "name": "lora", "r": 8, "lora_alpha": 16.0, "use_dora": False,
    }  # fmt: skip


def test_config_validate(privfed, tmp_path):
    status, out, _ = privfed("config", "validate", "base.toml", "--json")
    assert (status, one_object(out)) == (
        0,
        {"valid": True, "digest": load_config(str(tmp_path / "base.toml")).digest(), "model_checked": True},
    )
    wrong = ("-s", 'tuning.target_modules=["qurey"]')
    failed(privfed("config", "validate", "base.toml", *wrong, "--json"), "ModelError", 2)
    status, out, _ = privfed("config", "validate", "base.toml", *wrong, "-s", "model.name=not/here")
    assert status == 0 and "its model is not here" in out
    status, out, err = privfed("config", "validate", "base.toml", "-s", "privacy.target_epsilon=0")
    assert (status, out) == (2, "") and err.startswith("Error: base.toml: privacy: target_epsilon is 0.0")
    failed(privfed("config", "validate", "base.toml", "-s", "privacy.target_epsilon=0", "--json"), "ConfigError", 2)
    failed(privfed("config", "validate", "nowhere.toml", "--json"), "ConfigError", 2)


def test_config_diff(privfed, tmp_path):
    (tmp_path / "other.toml").write_text(load_config(str(tmp_path / "base.toml"), ["server.rounds=4"]).to_toml())
    status, out, _ = privfed("config", "diff", "base.toml", "other.toml")
    assert (status, out) == (0, "server.rounds: 3 -> 4\n")
    status, out, _ = privfed("config", "diff", "base.toml", "base.toml", "--json")
    assert (status, one_object(out)) == (0, {"differences": []})


# --- budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ("privacy.target_epsilon=3",),
        ("privacy.noise_multiplier=1.2", "privacy.target_epsilon=unset"),
        ("privacy.noise_multiplier=1.2", "privacy.target_epsilon=3"),
    ],
)
def test_budget_answers_each_of_the_three_questions(privfed, given):
    words = [word for setting in given for word in ("-s", setting)]
    status, out, err = privfed("budget", "base.toml", *words, "--json")
    assert (status, err) == (0, "")
    found = one_object(out)
    keys = {"epsilon", "delta", "noise_multiplier", "rounds", "accountant"}
    assert keys <= found.keys()
    assert set(found["views"]) == {"individual", "aggregate", "release"}
    for view in found["views"].values():
        assert keys <= view.keys()
        assert view["epsilon"] == found["epsilon"]
    if "privacy.target_epsilon=3" in given:
        assert 0 < found["epsilon"] <= 3
    if "privacy.noise_multiplier=1.2" in given:
        assert found["noise_multiplier"] == 1.2
    assert (found["rounds"] == 3) is (len(given) == 1 or "unset" in given[1])


def test_budget_in_words_and_refused(privfed):
    status, out, _ = privfed("budget", "base.toml")
    assert status == 0 and "epsilon 7." in out and "at delta 0.0001 per example (rdp" in out
    refused = ("budget", "base.toml", "-s", "client.local_steps=1000000", "-s", "privacy.target_epsilon=0.01", "--json")
    assert "budget that no noise reaches" in failed(privfed(*refused), "ConfigError", 2)
    assert "no budget to compute" in failed(
        privfed("budget", "base.toml", "-s", "privacy.unit=none", "--json"), "ConfigError", 2
    )


# --- ledger -------------------------------------------------------------------------------------------------------


def test_ledger_lists_and_sums(privfed, ledger, tmp_path):
    status, out, _ = privfed("ledger", ledger, "--json")
    found = one_object(out)
    assert status == 0 and found["entries"] == 3
    (data,) = found["data"]
    assert (data["cap"], data["unit"], data["delta"]) == (9.0, "example", 1e-5)
    assert 0 < data["epsilon"] < 9 and data["left"] == pytest.approx(9 - data["epsilon"])
    (run,) = data["runs"]
    assert (run["charges"], run["clients"], run["project"]) == (3, 1, "thesis")
    status, out, _ = privfed("ledger", tmp_path)  # a folder that holds one
    assert status == 0 and "3 charges" in out and "cap 9, " in out and "left at least" in out
    status, out, _ = privfed("ledger", ledger, "--set-cap", "4.5", "--json")
    assert one_object(out)["data"][0]["cap"] == 4.5


def test_a_tampered_ledger_ends_with_one_and_a_sound_one_with_zero(privfed, ledger):
    status, out, _ = privfed("ledger", ledger, "--verify", "--json")
    assert status == 0 and one_object(out)["verified"] is True
    with sqlite3.connect(ledger) as file:
        for (trigger,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            file.execute(f"DROP TRIGGER {trigger}")
        file.execute("UPDATE chain SET noise_multiplier = 50.0 WHERE sequence = 2")
    file.close()
    status, out, _ = privfed("ledger", ledger, "--verify", "--json")
    found = one_object(out)
    assert status == 1
    assert found["verified"] is False and found["problems"]
    status, out, _ = privfed("ledger", ledger, "--verify")
    assert status == 1 and "hash chain: BROKEN" in out
    failed(privfed("ledger", ledger, "--json"), "LedgerError", 1)  # nor is it added up without being asked


def test_no_ledger_there(privfed, tmp_path):
    assert "There is no ledger at" in failed(privfed("ledger", tmp_path / "none", "--json"), "ConfigError", 2)
    (tmp_path / "text.sqlite").write_text("not a database, certainly not one of ours")
    failed(privfed("ledger", tmp_path / "text.sqlite", "--json"), "LedgerError", 1)


# --- train and report ---------------------------------------------------------------------------------------------


def test_a_run_above_the_cap_ends_with_three_and_leaves_no_run_folder(privfed, tiny_config, tmp_path):
    config = tiny_config(reproducible_noise=False, ledger={"path": str(tmp_path / "book.sqlite"), "epsilon_cap": 1.0})
    (tmp_path / "run.toml").write_text(config.to_toml())
    message = failed(privfed_quietly(privfed("train", "run.toml", "-o", "out", "--json")), "BudgetExceededError", 3)
    assert "1" in message
    assert not (tmp_path / "out" / "adapter").exists()


def privfed_quietly(result):
    """Drop progress and logs, which go to stderr, from a result."""
    return result[0], result[1], ""


def test_errors_before_training(privfed, tmp_path):
    train = ("train", "base.toml", "-o", "out", "--json")
    assert "no model folder" in failed(privfed_quietly(privfed(*train, "-s", "model.name=./no")), "ModelError", 2)
    assert not (tmp_path / "out").exists()
    failed(privfed_quietly(privfed(*train, "-s", "tuning.rank=4")), "ConfigError", 2)
    status, out, _ = privfed("report", "out", "--json")
    assert status in (1, 2) and one_object(out)["error"]["exit_code"] == status
