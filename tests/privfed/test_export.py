"""``privfed export``: a run's result as an adapter, or merged into a whole model that transformers loads alone."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from privfed.cli import main
from privfed.errors import ConfigError, ModelError
from privfed.export import export
from privfed.models.loading import load_model
from privfed.run import train
from privfed.tuning import TUNINGS
from privfed.tuning.adapters import quiet

TEXTS = ["cat dog horse", "piano violin drum flute song melody", "rain"]


@pytest.fixture
def run_of(tiny_config, tmp_path):
    """Return a function from a tuning's table to the folder of a finished run of one round."""

    def run(**tuning):
        config = tiny_config(
            tuning=tuning,
            privacy={"unit": "none", "target_epsilon": None},
            server={"rounds": 1},
            client={"optimizer": "adamw", "learning_rate": 0.01},
        )
        return train(config, out=tmp_path / f"run-{tuning['name']}").folder, config

    return run


def logits(model, tokenizer):
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def tuned_logits(folder, config):
    names = tuple(json.loads((folder / "adapter" / "label_names.json").read_text()))
    loaded = load_model(config.model, label_names=names, seed=0)
    model = TUNINGS.get(config.tuning.name).load(loaded.model, folder / "adapter")
    return logits(model, loaded.tokenizer)


def test_a_run_that_changed_base_weights_is_a_whole_model_already(tiny_config, tmp_path):
    config = tiny_config(
        tuning={"name": "lora", "r": 2},
        privacy={"unit": "none", "target_epsilon": None},
        server={"rounds": 1, "aggregation": "frlora"},
        client={"optimizer": "adamw", "learning_rate": 0.01},
    )
    run = train(config, out=tmp_path / "run").folder
    export(run, tmp_path / "whole", merge=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    trained = AutoModelForSequenceClassification.from_pretrained(run / "adapter")
    assert torch.equal(logits(whole, tokenizer), logits(trained, tokenizer))


@pytest.mark.parametrize(
    "tuning",
    [
        {"name": "dora", "r": 2},
        {"name": "rslora", "r": 2},
        {"name": "bitfit"},
        {"name": "ln_tuning"},
        {"name": "fed_sb", "r": 2},
        {"name": "federa", "r": 2},
        {"name": "select", "select": "value"},
        {"name": "full"},
    ],
    ids=lambda tuning: tuning["name"],
)
def test_a_merged_run_is_a_whole_model_with_the_same_logits(run_of, tmp_path, tuning):
    folder, config = run_of(**tuning)
    found = export(folder, tmp_path / "out", merge=True)
    assert found["merged"] and found["largest_difference"] < 1e-5
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(model, tokenizer), tuned_logits(folder, config), atol=1e-5)
    assert model.config.id2label == {0: "animals", 1: "music", 2: "weather"}
    assert not list((tmp_path / "out").glob("adapter_*"))
    assert not (tmp_path / "out.tmp").exists()


def test_without_merge_the_adapter_is_copied(run_of, tmp_path, tiny_bert):
    folder, config = run_of(name="lora", r=2)
    found = export(folder, tmp_path / "out")
    assert found == {"folder": str(tmp_path / "out"), "merged": False, "tuning": "lora", "largest_difference": None}
    with quiet():
        base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
        model = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    assert torch.allclose(logits(model, tokenizer), tuned_logits(folder, config), atol=1e-5)


@pytest.mark.parametrize("name", ["prompt_tuning", "adapter"])
def test_what_adds_to_the_model_cannot_be_merged(run_of, tmp_path, name):
    folder, _ = run_of(name=name)
    with pytest.raises(ModelError, match="cannot be merged into the base"):
        export(folder, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    export(folder, tmp_path / "out")


def test_refusals(run_of, tmp_path):
    with pytest.raises(ConfigError, match="There is no run in"):
        export(tmp_path / "absent", tmp_path / "out")
    folder, _ = run_of(name="head")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(folder, tmp_path / "full")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.toml").write_text((folder / "config.toml").read_text())
    with pytest.raises(ConfigError, match="no result yet"):
        export(tmp_path / "half", tmp_path / "out")


def test_the_command_prints_one_line_or_one_object(run_of, tmp_path):
    folder, _ = run_of(name="head")
    shown = CliRunner().invoke(main, ["export", str(folder), "-o", str(tmp_path / "a"), "--merge"])
    assert shown.exit_code == 0 and "merged; logits differ by at most" in shown.output
    told = CliRunner().invoke(main, ["export", str(folder), "-o", str(tmp_path / "b"), "--json"])
    assert json.loads(told.stdout)["tuning"] == "head"
    again = CliRunner().invoke(main, ["export", str(folder), "-o", str(tmp_path / "b")])
    assert again.exit_code == 2 and "not an empty folder" in again.stderr
