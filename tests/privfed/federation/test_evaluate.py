"""Scores: known answers, and none that depends on how the examples are batched."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from privfed.federation.evaluate import Score, evaluate
from privfed.models import ModelConfig
from privfed.models.examples import FeatureExamples
from privfed.models.language import LanguageExamples
from privfed.models.loading import load_model
from privfed.models.sequences import from_responses

PREDICTED = [0, 0, 1, 1, 1, 0, 1, 0, 1, 1]
TRUTH = [0, 1, 1, 1, 0, 0, 1, 0, 1, 1]


def classes(predicted: list[int], truth: list[int], names: tuple[str, ...]) -> Score:
    """Return the score of a model whose logits are one-hot times ten."""
    width = len(names)
    features = 10 * torch.eye(width)[torch.tensor(predicted)]
    identity = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(width))
    return evaluate(identity, FeatureExamples(features, torch.tensor(truth)), names, size=3)


def test_the_scores_of_classes_are_the_textbooks() -> None:
    score = classes(PREDICTED, TRUTH, ("no", "yes"))
    tp, tn, fp, fn = 5, 3, 1, 1
    assert (score.primary, score.n) == ("accuracy", 10)
    assert score.value == score.metrics["accuracy"] == 0.8
    assert score.metrics["majority"] == 0.6
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score.metrics["matthews"] == pytest.approx(matthews)
    assert score.metrics["macro_f1"] == pytest.approx((2 * 5 / 12 + 2 * 3 / 8) / 2)
    assert [row["support"] for row in score.per_class] == [4, 6]


def test_a_model_that_always_says_the_same_has_matthews_zero() -> None:
    score = classes([1] * 10, TRUTH, ("no", "yes", "never seen"))
    assert score.metrics["matthews"] == 0.0
    assert score.metrics["accuracy"] == score.metrics["majority"]


def test_a_record_is_json_and_says_what_is_compared() -> None:
    record = Score(primary="perplexity", metrics={"perplexity": math.inf, "loss": 800.0}, n=3).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "metric": "perplexity",
        "perplexity": None,
        "loss": 800.0,
        "n": 3,
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_perplexity_weighs_every_token_alike_however_texts_are_batched(family: str, tiny_model: Any) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_model(family)), task="causal_lm"), label_names=(), seed=1)
    prompts = ["cat", "rain snow wind storm", "piano violin"] * 3
    responses = ["dog", "sun", "drum flute song melody rhythm chord"] * 3
    sequences = from_responses(prompts, responses, loaded.tokenizer, 24)
    examples = LanguageExamples(sequences, loaded.tokenizer)
    score = evaluate(loaded.model, examples, (), size=4)
    total, tokens, right = 0.0, 0, 0
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.from_numpy(sequence.ids).unsqueeze(0)
            logs = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
            for place in np.flatnonzero(sequence.learned):
                total -= float(logs[place - 1, ids[0, place]])
                right += int(logs[place - 1].argmax() == ids[0, place])
                tokens += 1
    assert score.metrics["tokens"] == tokens == 3 * (2 + 2 + 7)
    assert score.metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert score.value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert score.metrics["token_accuracy"] == right / tokens


def test_a_loss_beyond_floating_point_is_infinite_and_not_an_error(tiny_gpt2: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_gpt2), task="causal_lm"), label_names=(), seed=1)
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.mul_(1e5)  # type: ignore[operator, union-attr]
    examples = LanguageExamples(from_responses(["cat"], ["dog"], loaded.tokenizer, 8), loaded.tokenizer)
    assert evaluate(loaded.model, examples, ()).value == math.inf
