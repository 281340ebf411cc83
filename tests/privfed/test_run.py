"""Whole runs, from a csv to a run folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.errors import BudgetExceededError, ConfigError, DataError, LedgerError, ResumeError
from privfed.federation.opening import ledger_path
from privfed.run import train

# accounting by moments takes milliseconds where the tighter one takes seconds
NOISE = {"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"}
FILES = {"config.toml", "run.json", "metrics.jsonl", "partition.json", "checkpoint", "adapter", "receipt.json"}
FILES |= {"report.html", "ledger.sqlite"}

Tables = Mapping[str, Mapping[str, Any]]


@pytest.fixture
def own(tiny_config: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return ``own(**tables)``: a tiny run of noise multiplier 1 with a ledger of the test's own."""

    def build(*, privacy: Mapping[str, Any] | None = None, ledger: Mapping[str, Any] | None = None, **more: Any) -> Any:
        own_ledger = {"path": str(tmp_path / "holder.sqlite"), **(ledger or {})}
        return tiny_config(privacy={**NOISE, **(privacy or {})}, ledger=own_ledger, **more)

    return build


@pytest.fixture
def data(text_csv: Path, tmp_path: Path) -> Path:
    """A copy of the rows in a folder of its own, so that the ledger beside it is this test's."""
    copy = tmp_path / "data" / "rows.csv"
    copy.parent.mkdir()
    copy.write_bytes(text_csv.read_bytes())
    return copy


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((folder / "adapter").glob("*.safetensors")))


def _charges(path: Path) -> list[Any]:
    from privfed.privacy.ledger import Ledger

    with Ledger.open(path, create=False) as ledger:
        assert ledger.verify() == []
        return [entry.charge for entry in ledger.entries()]


def _logits(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    import torch

    model.eval()
    with torch.no_grad():
        return np.asarray(model(**tokenizer(texts, return_tensors="pt", padding=True)).logits)


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every leaf of a JSON value."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _walk(each, f"{path}.{key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _walk(each, f"{path}.{number}")
    else:
        yield path, value


# every tuning, unit, codec and link

CASES: dict[str, Tables] = {
    "lora": {"tuning": {"name": "lora", "r": 2}, "secagg": {"name": "none"}},
    "ffa_lora": {
        "privacy": {"accountant": "pld"},
        "compression": {"name": "stochastic_quantizer", "bits": 8, "max_value": 4.0},
    },
    "bitfit": {"tuning": {"name": "bitfit"}, "privacy": {"unit": "none"}},
    "head": {
        "tuning": {"name": "head"},
        "server": {"weighting": "examples", "optimizer": "adam", "learning_rate": 0.1},
    },
    "full": {
        "tuning": {"name": "full"},
        "privacy": {"unit": "client", "l2_clip_norm": 0.5},
        "secagg": {"name": "none"},
        "compression": {"name": "stochastic_quantizer", "bits": 10, "max_value": 0.01},
    },
    "client masked": {"privacy": {"unit": "client", "accountant": "pld"}, "server": {"cohort_size": 4}},
    "none plain": {
        "privacy": {"unit": "none"},
        "secagg": {"name": "none"},
        "compression": {"name": "stochastic_quantizer", "bits": 6, "max_value": 0.5},
        "client": {"optimizer": "adamw", "learning_rate": 0.05},
    },
    "warm start": {
        "head_warm_start": {"name": "dp_probe", "rounds": 2, "noise_scale": 2.0},
        "partition": {"name": "by_column"},
        "server": {"cohort_size": 3, "optimizer": "adam", "learning_rate": 0.05},
    },
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_run_leaves_a_whole_folder(
    name: str, own: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.federation import workbench

    kept: list[Any] = []
    build = workbench.build
    monkeypatch.setattr(workbench, "build", lambda *args: (kept.append(build(*args)), kept[-1])[1])
    config = own(reproducible_noise=False, **CASES[name])
    result = train(config, out=tmp_path / "run")
    folder, unit = result.folder, config.privacy.unit
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["state.safetensors"]
    receipt = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
    assert receipt == result.receipt

    # config.toml is the resolved run
    from privfed.config import load_config

    assert load_config(str(folder / "config.toml")) == config
    assert receipt["config_digest"] == config.digest()

    _check_adapter(config, folder, kept[0], receipt)
    _check_ledger(config, folder, receipt, tmp_path / "holder.sqlite")
    _check_metrics(config, folder, receipt)
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.lower().startswith("<!doctype html>")
    assert not re.search(r"(src|href)=[\"']https?://", report)
    if unit == "none":
        assert not receipt["private"]


def _check_adapter(config: Any, folder: Path, bench: Any, receipt: Mapping[str, Any]) -> None:
    """Plain transformers and peft, knowing nothing of us, give the trained model's logits."""
    import hashlib

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert receipt["adapter_sha256"] == hashlib.sha256(_weights(folder)).hexdigest()
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    texts = ["cat dog balan", "piano violin", "rain snow wind storm cloud", "kukil"]
    wanted = _logits(bench.tuned.model, tokenizer, texts)
    if config.tuning.name == "full":
        fresh = AutoModelForSequenceClassification.from_pretrained(folder / "adapter")
    else:
        from peft import PeftModel

        base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=3)
        fresh = PeftModel.from_pretrained(base, str(folder / "adapter"))
    np.testing.assert_allclose(_logits(fresh, tokenizer, texts), wanted, atol=1e-6)


def _check_ledger(config: Any, folder: Path, receipt: Mapping[str, Any], path: Path) -> None:
    """The receipt's epsilon is what the ledger's events cost, and there is one event a participation."""
    from privfed.privacy.accountant import epsilon, merged

    charges = _charges(path)
    assert (folder / "ledger.sqlite").resolve() == path.resolve()
    rounds = [line for line in _metrics(folder) if line["kind"] == "round"]
    if config.privacy.unit == "none":
        assert charges == []
        assert all(view["epsilon"] is None for view in receipt["views"].values())
        assert all(line["epsilon"] is None for line in rounds)
        return
    if config.privacy.unit == "client":
        assert [charge.client_id for charge in charges] == ["*"] * len(rounds)
    else:
        assert len(charges) == sum(line["cohort"] for line in rounds)
        assert len({(charge.phase, charge.round, charge.client_id) for charge in charges}) == len(charges)
    by_client: dict[str, list[Any]] = {}
    for charge in charges:
        by_client.setdefault(charge.client_id, []).append(charge.event)
    accountant = config.privacy.accountant
    spent = {
        client: epsilon(merged(events), 1e-4, accountant=accountant, fine=True) for client, events in by_client.items()
    }
    with_a_promise = {name for name, view in receipt["views"].items() if view["epsilon"] is not None}
    assert with_a_promise == (
        {"release"} if config.privacy.unit == "client" else {"individual", "aggregate", "release"}
    )
    lost = receipt["views"]["release"]
    assert lost["epsilon"] == pytest.approx(max(spent.values()), rel=1e-9)
    for view in receipt["views"].values():
        if view["epsilon"] is None:
            assert view["why"]
            assert {key for key, value in view.items() if isinstance(value, float) and value is not None} == set()
            assert view["delta"] is view["mu"] is view["attack_bound"] is None
            assert view["curve"] == []
        else:
            assert (view["delta"], view["unit"]) == (1e-4, config.privacy.unit)
    if config.privacy.unit == "example":
        assert receipt["per_client_epsilon"] == pytest.approx(spent)
    last = [line for line in rounds if line["phase"] == "train"][-1]
    assert last["epsilon"] >= max(spent.values()) * (1 - 1e-3)  # never shown too low


def _check_metrics(config: Any, folder: Path, receipt: Mapping[str, Any]) -> None:
    lines = _metrics(folder)
    kinds = Counter(line["kind"] for line in lines)
    warm = config.head_warm_start.rounds if config.head_warm_start.name != "none" else 0
    assert lines[0]["kind"] == "start"
    assert lines[-1]["kind"] == "finish"
    assert (kinds["start"], kinds["finish"], kinds["round"]) == (1, 1, config.server.rounds + warm)
    for phase, rounds in (("warm_start", warm), ("train", config.server.rounds)):
        assert [li["round"] for li in lines if li["kind"] == "round" and li["phase"] == phase] == [
            *range(1, rounds + 1)
        ]
    for line in lines:
        if line["kind"] == "round":
            assert line["dropped"] == []
            assert line["survivors"] == line["cohort"]
            assert line["bytes_up"] > 0 or line["cohort"] == 0
            assert line["lost"] is None
    assert lines[-1]["adapter_sha256"] == receipt["adapter_sha256"]
    assert lines[-1]["bytes_up"] == sum(line["bytes_up"] for line in lines if line["kind"] == "round")
    assert receipt["status"] == "finished"
    assert receipt["sentinels"].keys() >= {"gradients_train", "frozen", "moved"}
    assert all(result.startswith("passed: ") for result in receipt["sentinels"].values())
    _check_nothing_of_the_training_data(config, folder)


def _check_nothing_of_the_training_data(config: Any, folder: Path) -> None:
    """No training loss, no label counts, no rows: those are the clients' own, and nobody noised them."""
    partition = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
    counts = [tuple(client["label_counts"]) for client in partition["clients"]]
    texts = [line.split(",")[0] for line in Path(config.data.path).read_text().splitlines()[1:]]
    for name in ("metrics.jsonl", "receipt.json"):
        raw = (folder / name).read_text(encoding="utf-8")
        assert not any(text in raw for text in texts)
        values = [json.loads(line) for line in raw.splitlines()] if name.endswith("l") else [json.loads(raw)]
        for value in values:
            for key, _ in _walk(value):
                assert not re.search(r"label_count|train(ing)?_(loss|accuracy)|grad(ient)?_norm", key), key
                assert not (key.endswith("loss") and value.get("kind") != "eval"), key
            for found in _lists(value):
                assert tuple(found) not in counts


def _lists(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, list):
        yield [each for each in value if not isinstance(each, (dict, list))]
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _lists(each)


# what is the same and what is not


def test_a_reproducible_run_repeats_to_the_bit_and_says_it_is_not_private(
    own: Callable[..., Any], tmp_path: Path
) -> None:
    config = own(reproducible_noise=True)
    first, second = (train(config, out=tmp_path / name) for name in ("a", "b"))
    assert _weights(first.folder) == _weights(second.folder)
    assert first.receipt["run_id"] != second.receipt["run_id"]
    assert not first.receipt["private"]
    assert "not private" in first.receipt["verdict"].lower()
    assert all(view["epsilon"] is None for view in first.receipt["views"].values())
    assert first.receipt["simulated"]["epsilon"]["release"] > 0


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_private_run_differs_each_time_and_erases_its_key(unit: str, own: Callable[..., Any], tmp_path: Path) -> None:
    from privfed.privacy.ledger import Ledger
    from privfed.rng import reproducible_key

    made: list[bytes] = []
    plain = Ledger.run_key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "run_key", lambda *args: (made.append(plain(*args)), made[-1])[1])
        config = own(reproducible_noise=False, privacy={"unit": unit}, secagg={"name": "none"})
        first, second = (train(config, out=tmp_path / name) for name in ("a", "b"))
    assert _weights(first.folder) != _weights(second.folder)
    assert len(set(made)) == 2
    assert reproducible_key(config.seed) not in made
    with Ledger.open(tmp_path / "holder.sqlite") as ledger:
        for result in (first, second):
            with pytest.raises(LedgerError, match="erased"):
                ledger.run_key(result.receipt["run_id"])
    for path in tmp_path.rglob("*"):  # nor is it in the file, its log, or the run folder
        if path.is_file():
            assert not any(key in path.read_bytes() for key in made), path


def test_masking_does_not_change_a_round_beyond_rounding(own: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    found = []
    for name in ("masked", "none"):
        folder = train(own(secagg={"name": name}, server={"rounds": 1}), out=tmp_path / name).folder
        found.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(np.allclose(found[0][key], found[1][key], atol=1e-4) for key in found[0])


# the ledger over runs


def test_runs_accumulate_beside_the_data_until_the_cap_refuses(
    tiny_config: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    from privfed.privacy.ledger import Ledger

    privacy = {**NOISE, "accountant": "pld"}  # as the ledger counts
    config = tiny_config(data={"path": str(data)}, privacy=privacy, reproducible_noise=False)
    path = ledger_path(config, tmp_path / "one")
    assert path == data.with_name("rows.csv.privfed-ledger.sqlite")
    first = train(config, out=tmp_path / "one")
    charges = _charges(path)
    digest, one = charges[0].data_digest, first.receipt["views"]["release"]["epsilon"]
    with Ledger.open(path) as ledger:
        ledger.set_cap(data_digest=digest, unit="example", epsilon=one * 1.2, delta=1e-4)
        head = ledger.head()
    with pytest.raises(BudgetExceededError, match=r"is spent and .* is left") as caught:
        train(config, out=tmp_path / "two")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "two").exists()
    with Ledger.open(path) as ledger:
        assert ledger.head() == head  # nothing charged
        ledger.set_cap(data_digest=digest, unit="example", epsilon=one * 4, delta=1e-4)
    second = train(config, out=tmp_path / "two")
    assert second.receipt["views"]["release"]["epsilon"] == pytest.approx(one, rel=0.5)  # its own, not the sum
    assert len(_charges(path)) == 2 * len(charges)
    with Ledger.open(path) as ledger:
        assert ledger.spent(data_digest=digest, unit="example", delta=1e-4) > 1.2 * one
    # another division of the same rows spends the same budget
    other = tiny_config(
        data={"path": str(data)},
        partition={"name": "iid", "clients": 5},
        privacy=privacy,
        ledger={"epsilon_cap": one * 1.5},
    )
    with pytest.raises(BudgetExceededError):
        train(other, out=tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_a_cap_in_the_configuration_refuses_before_training(own: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(BudgetExceededError, match=r"the cap is 0\.1"):
        train(own(ledger={"epsilon_cap": 0.1}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert _charges(tmp_path / "holder.sqlite") == []


def test_a_run_without_privacy_is_refused_where_there_is_a_cap(own: Callable[..., Any], tmp_path: Path) -> None:
    train(own(ledger={"epsilon_cap": 100.0}), out=tmp_path / "one")
    with pytest.raises(BudgetExceededError, match=r'privacy\.unit = "none"') as caught:
        train(own(privacy={"unit": "none"}), out=tmp_path / "two")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "two").exists()


# folders


def test_a_folder_that_holds_something_is_refused_and_kept(own: Callable[..., Any], tmp_path: Path) -> None:
    config = own()
    folder = train(config, out=tmp_path / "run").folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match="holds another run"):
        train(config, out=folder)
    with pytest.raises(ResumeError, match=r"server\.rounds: 2 -> 5.*resume with the same") as caught:
        train(own(server={"rounds": 5}), out=folder, resume=True)
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    with pytest.raises(ResumeError, match="not empty"):
        train(config, out=other)
    with pytest.raises(ResumeError, match="is a file"):
        train(config, out=other / "mine.txt")
    assert (other / "mine.txt").read_text() == "keep"
    with pytest.raises(ResumeError, match="no run to resume"):
        train(config, out=other, resume=True)
    with pytest.raises(ResumeError, match="no run to resume"):
        train(config, out=tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_a_crash_left_before_its_configuration_can_be_used(
    own: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"run_id": "x", "created": "y"}')
    (folder / "config.toml.tmp").write_text("[mod")
    assert train(own(), out=folder).receipt["status"] == "finished"


def test_resuming_a_finished_run_gives_its_receipt_again(own: Callable[..., Any], tmp_path: Path) -> None:
    config = own(reproducible_noise=False)  # whose key is gone by then
    first = train(config, out=tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()  # as if the crash had come just before
    lines, weights = _metrics(first.folder), _weights(first.folder)
    again = train(config, out=tmp_path / "run", resume=True)
    assert again.receipt == first.receipt
    assert (_metrics(first.folder), _weights(first.folder)) == (lines, weights)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_ledger_inside_the_run_folder_by_another_name_for_it(
    own: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = own(ledger={"path": str(tmp_path / "run" / "ledger.sqlite")}, privacy={"unit": "none"})
    result = train(config, out=Path("run"))
    assert not (result.folder / "ledger.sqlite").is_symlink()


@pytest.mark.parametrize("fault", ["garbled", "of another model"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_lost(
    fault: str, own: Callable[..., Any], tmp_path: Path
) -> None:
    config = own()
    folder = tmp_path / "run"
    _stop_after(1, config, folder)
    path = folder / "checkpoint" / "state.safetensors"
    path.write_bytes(b"garbled" if fault == "garbled" else path.read_bytes()[:100])
    before = path.read_bytes()
    with pytest.raises(ResumeError, match="not a checkpoint"):
        train(config, out=folder, resume=True)
    assert path.read_bytes() == before


class _Stop(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def _stop_after(rounds: int, config: Any, folder: Path, *, resume: bool = False) -> None:
    from privfed.federation.progress import Silent

    class Stopper(Silent):
        def round_done(self, phase: str, number: int, total: int, epsilon: float | None) -> None:
            if phase == "train" and number == rounds:
                raise _Stop

    with pytest.raises(_Stop):
        train(config, out=folder, resume=resume, progress=Stopper())


@pytest.mark.parametrize("reproducible", [True, False])
def test_a_stopped_run_resumes_without_charging_twice(
    reproducible: bool, own: Callable[..., Any], tmp_path: Path
) -> None:
    tables: dict[str, Any] = {
        "server": {"rounds": 3, "optimizer": "adam", "learning_rate": 0.05, "evaluate_every": 1},
        "head_warm_start": {"name": "dp_probe", "rounds": 1},
        "reproducible_noise": reproducible,
    }
    whole = train(own(**tables, ledger={"path": str(tmp_path / "whole.sqlite")}), out=tmp_path / "whole")
    config, folder = own(**tables), tmp_path / "run"
    _stop_after(1, config, folder)
    _stop_after(2, config, folder, resume=True)
    result = train(config, out=folder, resume=True)
    mine, wholes = _charges(tmp_path / "holder.sqlite"), _charges(tmp_path / "whole.sqlite")
    assert [(c.client_id, c.phase, c.round) for c in mine] == [(c.client_id, c.phase, c.round) for c in wholes]
    assert {c.run_id for c in mine} == {result.receipt["run_id"]}
    assert (_weights(folder) == _weights(whole.folder)) == reproducible
    times = {"seconds", "time", "epsilon", "adapter_sha256"}
    if reproducible:
        assert [_without(line, times) for line in _metrics(folder)] == [
            _without(line, times) for line in _metrics(whole.folder)
        ]


def test_a_run_that_is_stopped_before_a_phases_first_round_scores_its_start_once(
    own: Callable[..., Any], tmp_path: Path
) -> None:
    from privfed.federation.progress import Silent

    class Stopper(Silent):
        def __init__(self, phase: str) -> None:
            self.phase = phase

        def round_started(self, phase: str, number: int, rounds: int, cohort: int) -> None:
            if (phase, number) == (self.phase, 1):
                raise _Stop

    config = own(server={"rounds": 1}, head_warm_start={"name": "dp_probe", "rounds": 1})
    for resume, phase in ((False, "warm_start"), (True, "warm_start"), (True, "train"), (True, "train")):
        with pytest.raises(_Stop):
            train(config, out=tmp_path / "run", resume=resume, progress=Stopper(phase))
    train(config, out=tmp_path / "run", resume=True)
    scored = [(line["phase"], line["round"]) for line in _metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert scored == [("warm_start", 0), ("warm_start", 1), ("train", 0), ("train", 1)]


def _without(line: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in keys}


# bad input


@pytest.mark.parametrize(
    ("tables", "error", "text"),
    [
        (
            {"client": {"sampling_probability": None, "batch_size": 500}},
            DataError,
            r"client\.batch_size = 500 is larger than the shard",
        ),
        ({"server": {"cohort_size": 40}}, ConfigError, r"server\.cohort_size = 40, but the partition has 4"),
        ({"partition": {"name": "iid", "clients": 1}, "server": {"cohort_size": None}}, ConfigError, "two clients"),
        ({"data": {"label": "labbel"}}, DataError, "labbel"),
        (
            {"tuning": {"name": "head"}, "head_warm_start": {"name": "dp_probe"}},
            ConfigError,
            "trains the head twice",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    tables: Tables, error: type[Exception], text: str, own: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        train(own(**tables), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_large_batch_without_privacy_is_the_shard(own: Callable[..., Any], tmp_path: Path) -> None:
    config = own(privacy={"unit": "none"}, client={"sampling_probability": None, "batch_size": 500})
    assert train(config, out=tmp_path / "run").receipt["status"] == "finished"
