"""Whole runs with each aggregation rule: what is saved is what plain peft and transformers load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.federation.personal import folder_name
from privfed.run import train

NOISE = {"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"}
LORA = {"name": "lora", "r": 2}
PLAIN = {"name": "none"}
TEXTS = ["cat dog balan", "piano violin", "rain snow wind storm cloud", "kukil"]

CASES: dict[str, Mapping[str, Any]] = {
    "rolora": {"server": {"aggregation": "rolora", "optimizer": "adam", "learning_rate": 0.05}},
    "rolora client level": {"server": {"aggregation": "rolora"}, "privacy": {"unit": "client"}, "secagg": PLAIN},
    "fedsvd": {"server": {"aggregation": "fedsvd"}},
    "frlora": {"server": {"aggregation": "frlora"}},
    "frlora gpt2": {"server": {"aggregation": "frlora"}, "model": {"name": "gpt2"}},
    "fedex_lora": {"server": {"aggregation": "fedex_lora", "weighting": "examples"}, "secagg": PLAIN},
    "flexlora": {
        "server": {"aggregation": "flexlora"},
        "secagg": PLAIN,
        "compression": {"name": "stochastic_quantizer", "bits": 10, "max_value": 2.0},
    },
    "flora": {"server": {"aggregation": "flora"}, "secagg": PLAIN, "privacy": {"unit": "none"}},
    "krum": {"server": {"aggregation": {"name": "krum", "byzantine": 0}}, "secagg": PLAIN},
    "median, personal head": {"server": {"aggregation": "median", "personal": ["head"]}, "secagg": PLAIN},
    "scaffold": {"server": {"aggregation": "scaffold", "personal": ["head"]}},
    "fedsa_lora": {"server": {"aggregation": "fedsa_lora"}},
    "personal head": {"server": {"personal": ["head"], "optimizer": "fedyogi", "learning_rate": 0.01}},
    "layers": {"server": {"layers": [[0], [0, 1], [0, 1], [1]], "cohort_size": 4}},
    "layers, warm start": {
        "server": {"layers": [[0], [1]]},
        "privacy": {"unit": "client"},
        "secagg": PLAIN,
        "head_warm_start": {"name": "dp_probe", "rounds": 2},
    },
    "warm start": {
        "server": {"aggregation": "fedsa_lora", "personal": ["head"]},
        "head_warm_start": {"name": "dp_probe", "rounds": 2},
    },
}
WHOLE = {"frlora", "frlora gpt2", "fedex_lora", "flora"}


@pytest.fixture
def own(tiny_config: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    """Return ``own(**tables)``: a tiny LoRA run of noise multiplier 1 with a ledger of the test's own."""

    def build(**tables: Any) -> Any:
        given = {"tuning": LORA, **tables, "privacy": {**NOISE, **tables.get("privacy", {})}}
        if "model" in tables:
            given["model"] = {"name": str(tiny_model(tables["model"]["name"]))}
        return tiny_config(ledger={"path": str(tmp_path / "holder.sqlite")}, **given)

    return build


def _logits(model: Any, tokenizer: Any) -> np.ndarray:
    import torch

    model.eval()
    with torch.no_grad():
        return np.asarray(model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits)


def _loaded(config: Any, folder: Path, *, whole: bool) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    if whole:
        return AutoModelForSequenceClassification.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=3)
    return PeftModel.from_pretrained(base, str(folder))


@pytest.mark.parametrize("name", list(CASES))
def test_a_run_leaves_what_others_can_load(
    name: str, own: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.federation import workbench

    kept: list[Any] = []
    build = workbench.build
    monkeypatch.setattr(workbench, "build", lambda *args: (kept.append(build(*args)), kept[-1])[1])
    config = own(**CASES[name])
    result = train(config, out=tmp_path / "run")
    tokenizer = kept[0].loaded.tokenizer
    model = _loaded(config, result.folder / "adapter", whole=name in WHOLE)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    found = _logits(model, tokenizer)
    np.testing.assert_allclose(found, _logits(kept[0].tuned.model, tokenizer), atol=2e-6)
    assert all(text.startswith("passed: ") for text in result.receipt["sentinels"].values())
    notes = " ".join(result.receipt["notes"])
    assert ("whole model" in notes) == (name in WHOLE)
    assert ("shared parts only" in notes) == (result.folder / "clients").exists()
    for path in result.folder.rglob("*"):
        assert not path.name.endswith(".tmp")


def test_each_client_ends_with_a_model_of_its_own(own: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config = own(server={"aggregation": "fedsa_lora", "personal": ["head"], "cohort_size": 3})
    folder = train(config, out=tmp_path / "run").folder
    index = json.loads((folder / "clients" / "index.json").read_text(encoding="utf-8"))
    ids = {line["client_id"] for line in json.loads((folder / "partition.json").read_text())["clients"]}
    assert set(index.values()) == ids  # two rounds of three out of four
    shared = load_file(folder / "adapter" / "adapter_model.safetensors")
    models = {each: load_file(folder / "clients" / name / "adapter_model.safetensors") for name, each in index.items()}
    for tensor, value in shared.items():
        different = [not np.array_equal(model[tensor], value) for model in models.values()]
        assert all(different) if "lora_B" in tensor or "classifier" in tensor else not any(different), tensor
    first, second = sorted(models)[:2]
    assert any(not np.array_equal(models[first][tensor], models[second][tensor]) for tensor in shared)
    some = folder / "clients" / folder_name(first)
    _loaded(config, some, whole=False)


def test_a_stopped_run_of_personal_parts_goes_on_to_the_same_bits(
    own: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.federation.engines import in_process

    config = own(server={"aggregation": "fedsa_lora", "rounds": 4, "evaluate_every": 4})
    whole = train(config, out=tmp_path / "whole").folder
    log = in_process._round_record
    calls: list[int] = []

    def stop(report: Any, epsilon: Any) -> Any:
        calls.append(report.round)
        if calls in ([1, 2, 3], [1, 2, 3, 3, 4]):  # after the clients wrote, before the checkpoint
            raise KeyboardInterrupt
        return log(report, epsilon)

    with monkeypatch.context() as patch:
        patch.setattr(in_process, "_round_record", stop)
        for resume in (False, True):
            with pytest.raises(KeyboardInterrupt):
                train(config, out=tmp_path / "stopped", resume=resume)
        stopped = train(config, out=tmp_path / "stopped", resume=True).folder
    assert calls == [1, 2, 3, 3, 4, 4]
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors") if "checkpoint" not in path.parts)
    assert len(files) == 5  # the shared one and four clients'
    for path in files:
        assert (whole / path).read_bytes() == (stopped / path).read_bytes()
    assert _charged(tmp_path) == 2 * _rounds(whole)


def test_a_stopped_run_of_some_layers_goes_on_to_the_same_bits(
    own: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.federation.engines import in_process

    # masked rounds of three of four clients, so that each round divides by other counts
    server = {"layers": [[0], [0, 1], [0, 1], [1]], "cohort_size": 3, "optimizer": "fedadam", "rounds": 3}
    config = own(server=server, secagg={"name": "masked", "corrupt": 0.0})
    whole = train(config, out=tmp_path / "whole").folder
    log = in_process._round_record

    def stop(report: Any, epsilon: Any) -> Any:
        if report.round == 2:
            raise KeyboardInterrupt
        return log(report, epsilon)

    with monkeypatch.context() as patch:
        patch.setattr(in_process, "_round_record", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, out=tmp_path / "stopped")
    stopped = train(config, out=tmp_path / "stopped", resume=True).folder
    name = "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    assert _charged(tmp_path) == 2 * _rounds(whole) == 2 * 9


def _rounds(folder: Path) -> int:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sum(line["cohort"] for line in lines if line["kind"] == "round")


def _charged(folder: Path) -> int:
    from privfed.privacy.ledger import Ledger

    with Ledger.open(folder / "holder.sqlite", create=False) as ledger:
        assert ledger.verify() == []
        return len(ledger.entries())
