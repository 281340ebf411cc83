"""Whole runs beyond the classification of single texts: language models by every form of record, and pairs."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.config import parse_config
from privfed.errors import ConfigError, DataError, ModelError
from privfed.federation.progress import Silent
from privfed.run import train
from privfed.tuning import TUNINGS

WORDS = ["cat", "dog", "horse", "cow", "sheep", "goat", "piano", "violin", "drum", "rain", "snow", "wind", "storm"]
CHATML = (
    "{% for m in messages %}balan {{ m.role }} bamor {{ m.content }} banet {% endfor %}"
    "{% if add_generation_prompt %}balan assistant bamor {% endif %}"
)
FORMS: dict[str, dict[str, str]] = {
    "text": {"text": "answer"},
    "prompt_response": {"prompt": "question", "response": "answer"},
    "messages": {"messages": "chat"},
}
scored = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("rouge_score", "sacrebleu")),
    reason="the extra `generation` (rouge-score, sacrebleu) is not installed",
)
STORIES = Path(os.environ.get("PRIVFED_SHARED", Path(__file__).parents[3] / "shared")) / "data/models/stories260k"


def write_rows(path: Path, count: int = 90) -> Path:
    draw = random.Random(4)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            asked = " ".join(draw.sample(WORDS, draw.randint(2, 6)))
            said = " ".join(sorted(asked.split()))  # something to learn
            chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            row = {"question": asked, "answer": f"{said} {WORDS[i % 13]}", "chat": chat, "label": "ab"[i % 2]}
            file.write(json.dumps({**row, "owner": f"o{i % 4}"}) + "\n")
    return path


@pytest.fixture
def chat_gpt2(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """The tiny GPT-2 with a chat template."""
    import shutil

    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_gpt2, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def language(model: Path, data: Path, form: str = "text", /, **tables: dict[str, Any]) -> Any:
    raw: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "task": "causal_lm", "max_length": 24},
        "data": {"path": str(data), "client": "owner", **FORMS[form]},
        "partition": {"name": "by_column"},
        "tuning": {"name": "ffa_lora", "r": 2, "target_modules": ["c_attn"], "layers_to_transform": [1]},
        "client": {"optimizer": "sgd", "learning_rate": 0.5, "sampling_probability": 0.3, "local_steps": 2},
        "server": {"rounds": 2, "evaluate_every": 1},
        "privacy": {"noise_multiplier": 0.6, "l2_clip_norm": 0.5, "target_delta": 1e-4, "reproducible_noise": True},
    }
    for name, table in tables.items():
        raw[name] = {**raw.get(name, {}), **table}
    return parse_config({"seed": 3, **raw}, where="test")


def metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("form", FORMS)
def test_a_language_model_trains_privately_under_masks(form: str, chat_gpt2: Path, tmp_path: Path) -> None:
    config = language(chat_gpt2, write_rows(tmp_path / "rows.jsonl"), form, privacy={"reproducible_noise": False})
    result = train(config, out=tmp_path / "run")
    evals = metrics(result.folder, "eval")
    assert [line["metric"] for line in evals] == ["perplexity"] * 3
    assert all(line["perplexity"] == pytest.approx(np.exp(line["loss"])) for line in evals)
    utility = result.receipt["utility"]
    assert utility["base_perplexity"] == evals[0]["perplexity"]
    assert utility["perplexity"] == evals[-1]["perplexity"]
    assert utility["tokens"] > utility["n_test"] and "accuracy" not in utility
    assert result.receipt["views"]["release"]["epsilon"] > 0
    assert "per-example gradients equal autograd's" in result.receipt["sentinels"]["gradients_train"]
    assert not (result.folder / "adapter" / "label_names.json").exists()
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "Perplexity after each round (lower is better)" in page and "The base model, before tuning" in page
    assert "Right and wrong, by class" not in page and "commonest answer" not in page


def test_plain_peft_loads_the_adapter_of_a_language_model(tiny_gpt2: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = language(tiny_gpt2, write_rows(tmp_path / "rows.jsonl"), privacy={"unit": "none"})
    folder = train(config, out=tmp_path / "run").folder
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM" and not settings["modules_to_save"]
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    ids = torch.tensor([[4, 20, 21, 22]])
    with torch.no_grad():
        before = base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        tuned = PeftModel.from_pretrained(base, str(folder / "adapter"))
        after = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert not torch.allclose(before, after)


def test_without_privacy_it_learns(tiny_gpt2: Path, tmp_path: Path) -> None:
    config = language(
        tiny_gpt2,
        write_rows(tmp_path / "rows.jsonl"),
        tuning={"name": "lora", "layers_to_transform": None, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        privacy={"unit": "none"},
        client={"learning_rate": 0.03, "optimizer": "adamw", "local_steps": 10},
    )
    config = config.model_copy(update={"server": config.server.model_copy(update={"rounds": 4})})
    utility = train(config, out=tmp_path / "run").receipt["utility"]
    assert utility["perplexity"] < 0.9 * utility["base_perplexity"]


def test_a_stopped_run_of_a_language_model_resumes_to_the_same_bits(tiny_gpt2: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    class Stopper(Silent):
        def round_done(self, phase: str, number: int, rounds: int, epsilon: float | None) -> None:
            raise StopError

    config = language(tiny_gpt2, write_rows(tmp_path / "rows.jsonl"), "prompt_response")
    whole = train(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        train(config, out=tmp_path / "stopped", progress=Stopper())
    resumed = train(config, out=tmp_path / "stopped", resume=True)
    assert resumed.receipt["adapter_sha256"] == whole.receipt["adapter_sha256"]
    assert resumed.receipt["utility"] == whole.receipt["utility"]


@scored
def test_what_it_writes_on_test_rows_is_in_the_report_only_where_asked_for(tiny_gpt2: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    config = language(
        tiny_gpt2, data, "prompt_response", evaluate={"generate": 3, "max_new_tokens": 5}, privacy={"unit": "none"}
    )
    folder = train(config, out=tmp_path / "run").folder
    (finish,) = metrics(folder, "finish")
    assert len(finish["samples"]) == 3
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert all(
        any(s["prompt"] == r["question"] and s["reference"] == r["answer"] for r in rows) for s in finish["samples"]
    )
    assert all(len(s["generated"].split()) <= 5 for s in finish["samples"])
    assert set(finish["generation"]) == {"rouge1", "rouge2", "rougeL", "bleu"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What the model writes" in page and finish["samples"][0]["reference"] in page and "ROUGE-L" in page
    plain = train(language(tiny_gpt2, data, "prompt_response", privacy={"unit": "none"}), out=tmp_path / "plain").folder
    assert "samples" not in metrics(plain, "finish")[0]
    assert "What the model writes" not in (plain / "report.html").read_text(encoding="utf-8")


@scored
def test_closeness_is_one_for_the_reference_itself() -> None:
    from privfed.federation.generation import _closeness

    texts = ["the cat sat on the mat today", "rain and snow and wind and storm"]
    same = _closeness([{"reference": text, "generated": text} for text in texts])
    assert same["rouge1"] == same["rougeL"] == 1.0 and same["bleu"] == pytest.approx(100.0)
    other = _closeness([{"reference": text, "generated": "nothing of that kind here"} for text in texts])
    assert other["rouge1"] == 0.0 and other["bleu"] < 5


@pytest.mark.skipif(importlib.util.find_spec("rouge_score") is not None, reason="the extra `generation` is installed")
def test_generation_without_its_packages_is_one_sentence_before_any_data(tiny_gpt2: Path, tmp_path: Path) -> None:
    config = language(tiny_gpt2, tmp_path / "nowhere.jsonl", evaluate={"generate": 2})
    with pytest.raises(ConfigError, match=r"evaluate.generate = 2 needs the packages rouge-score and sacrebleu"):
        train(config, out=tmp_path / "run")


def test_a_missing_chat_template_is_found_before_the_data(tiny_gpt2: Path, tmp_path: Path) -> None:
    config = language(tiny_gpt2, tmp_path / "nowhere.jsonl", "messages")
    with pytest.raises(ModelError, match=r"data\.messages needs a tokenizer with a chat template"):
        train(config, out=tmp_path / "run")
    with pytest.raises(DataError, match="not there"):
        train(language(tiny_gpt2, tmp_path / "nowhere.jsonl"), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "privacy"),
    [
        ({}, {"unit": "example"}),
        ({"gradient_checkpointing": True}, {"unit": "example"}),
        ({"autocast": "bf16", "gradient_checkpointing": True}, {"unit": "none"}),
    ],
)
def test_pairs_are_classified(
    options: dict[str, Any], privacy: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    raw = {
        "model": {"name": str(tiny_bert), "max_length": 32, **options},
        "data": {"path": str(data), "text": "question", "text_pair": "answer"},
        "partition": {"name": "iid", "clients": 3},
        "tuning": {"name": "ffa_lora", "r": 2},
        "client": {"optimizer": "sgd", "learning_rate": 0.5, "sampling_probability": 0.3, "local_steps": 1},
        "server": {"rounds": 2},
        "privacy": {"noise_multiplier": 0.8, "target_delta": 1e-4, **privacy},
    }
    receipt = train(parse_config(raw, where="test"), out=tmp_path / "run").receipt
    assert {"accuracy", "macro_f1", "matthews", "majority"} <= set(receipt["utility"])
    assert -1 <= receipt["utility"]["matthews"] <= 1


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"real weights are not here: {STORIES} (set PRIVFED_SHARED)")
def test_a_real_model_tells_its_story_and_is_surprised_by_noise() -> None:
    import torch

    from privfed.federation.evaluate import evaluate
    from privfed.models import ModelConfig
    from privfed.models.language import LanguageExamples
    from privfed.models.loading import load_model
    from privfed.models.sequences import from_texts

    loaded = load_model(ModelConfig(name=str(STORIES), task="causal_lm"), label_names=(), seed=0)
    start = torch.tensor([[loaded.tokenizer.bos_token_id]])
    written = loaded.model.generate(
        input_ids=start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=24
    )
    assert "Once upon a time, there was a little girl named Lily." in loaded.tokenizer.decode(written[0])

    def perplexity(text: str) -> float:
        examples = LanguageExamples(from_texts([text], loaded.tokenizer, 64), loaded.tokenizer)
        return evaluate(loaded.model, examples, ()).value

    assert (
        perplexity("Once upon a time, there was a little girl named Lily.") < 5 < 30 < perplexity("qzx jjv wwk qqp zzt")
    )


@pytest.mark.parametrize("unit", ["none", "client"])
def test_records_may_share_sequences_without_privacy_of_examples(tiny_gpt2: Path, tmp_path: Path, unit: str) -> None:
    """Packed or not, the same round to rounding: each record counts as much, and none sees another.

    Of the first round: the batches of a later one are drawn by a digest of the broadcast, in which the rounding is.
    """
    data = write_rows(tmp_path / "rows.jsonl")
    found = []
    for packing in (False, True):
        config = language(
            tiny_gpt2,
            data,
            model={"packing": packing},
            client={"sampling_probability": None, "batch_size": 8},
            server={"rounds": 1},
            privacy={"unit": unit} if unit == "client" else {"unit": "none", "noise_multiplier": None},
            ledger={"path": str(tmp_path / f"ledger{packing}.sqlite")},
        )
        result = train(config, out=tmp_path / f"run{packing}")
        evals = metrics(result.folder, "eval")
        assert all(line["clients_metric"] == "perplexity" for line in evals)
        assert all(1 < line["clients_mean"] <= line["clients_worst_tenth"] for line in evals)
        assert packing == any("did not see each other" in note for note in result.receipt["notes"])
        found.append(evals[-1]["perplexity"])
    if unit == "none":
        assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_soft_prompts_do_not_go_with_shared_sequences(tiny_gpt2: Path, tmp_path: Path) -> None:
    config = language(
        tiny_gpt2,
        write_rows(tmp_path / "rows.jsonl"),
        model={"packing": True},
        client={"sampling_probability": None, "batch_size": 8},
        privacy={"unit": "none", "noise_multiplier": None},
        ledger={"path": str(tmp_path / "ledger.sqlite")},
    )
    prompt = config.model_copy(update={"tuning": TUNINGS.get("prompt_tuning").config(num_virtual_tokens=4)})
    with pytest.raises(ModelError, match="soft prompt in front"):
        train(prompt, out=tmp_path / "run")
