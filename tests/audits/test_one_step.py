"""One step of the shipped DP-SGD has the AUC of its noise multiplier, neither more nor less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privfed.errors import ConfigError
from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.models.examples import LabelledExamples, padded
from privfed.models.loading import LoadedModel
from privfed.models.sources import ModelSource
from privfed.schedule import ClientConfig
from privfed.tuning import TUNINGS
from privfed.tuning.layout import read_flat
from privfed.types import PrivacyEvent, Shard
from privfed_attacks.membership.gradient_dot import theoretical_auc
from privfed_attacks.roc import accounted, lower_band, roc
from privfed_audits.one_step import one_step_trials

EXAMPLES, VOCABULARY, KEY = 16, 60, bytes(range(32))  # 900 steps of 16 examples: a standard error of .005 in the AUC
CLIP = 0.05


class Tokens(LabelledExamples):
    """Random token sequences with a class each."""

    def __init__(self, count, seed):
        draw = np.random.default_rng(seed)
        self.lengths = draw.integers(3, 9, count)
        self.rows = [draw.integers(1, VOCABULARY, length) for length in self.lengths]
        self.labels = torch.arange(count) % EXAMPLES  # gradients of different classes are nearly orthogonal

    def unprefixed(self, rows):
        return self.labelled(rows, padded([self.rows[row] for row in rows], 0))

    def probe(self, classes):
        return Tokens(3, 0)


@pytest.fixture(scope="module")
def lora():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=EXAMPLES,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    source = ModelSource(location="random", local=True, origin="random", public_name="random")
    loaded = LoadedModel(model=BertForSequenceClassification(config), source=source, num_labels=EXAMPLES)
    tuning = TUNINGS.get("lora")
    return tuning.apply(loaded, tuning.config(r=2, target_modules=["query", "value"]), 5).model


def trainer(module, noise_multiplier, **client):
    client = {"optimizer": "sgd", "learning_rate": 0.1, "sampling_probability": 0.5, "local_steps": 1, **client}
    dp = ExampleDp(l2_clip_norm=CLIP, noise_multiplier=noise_multiplier)
    return LocalTrainer(module, "base_model.model.classifier", Tokens(EXAMPLES, 1), ClientConfig(**client), dp)


def trials(module, noise_multiplier, steps):
    shard = Shard(client_id="a", indices=np.arange(EXAMPLES))
    own = trainer(module, noise_multiplier)
    params_D = read_flat(module)
    try:
        return one_step_trials(own, params_D, shard, key=KEY, steps=steps)
    finally:
        own.close()


@pytest.mark.slow
@pytest.mark.parametrize("z", [0.5, 1.0, 2.0, 4.0])
def test_the_auc_of_a_step_is_that_of_its_noise_multiplier(lora, z):
    found = trials(lora, z, steps=900)
    area = roc(found.scores_N, found.members_N).auc
    assert area == pytest.approx(theoretical_auc(z), abs=0.01)
    # scores are N(0, z) and N(1, z): in units of the clip, one example moves the sum by exactly 1
    assert found.scores_N[found.members_N].mean() == pytest.approx(1.0, abs=0.06 * z)
    assert found.scores_N[~found.members_N].mean() == pytest.approx(0.0, abs=0.06 * z)
    # what the ledger would charge is not contradicted
    claim = accounted([PrivacyEvent(unit="example", noise_multiplier=z, sampling_probability=1.0, steps=1)])
    assert not lower_band(found.scores_N, found.members_N).above(claim).size


@pytest.mark.slow
def test_fifteen_percent_too_little_noise_is_rejected(lora):
    found = trials(lora, 0.85, steps=900)
    area = roc(found.scores_N, found.members_N).auc
    assert area - theoretical_auc(1.0) > 0.02  # twice the tolerance of the test above


@pytest.mark.slow
def test_half_the_noise_rises_above_the_accounted_curve(lora):
    found = trials(lora, 0.5, steps=400)
    claim = accounted([PrivacyEvent(unit="example", noise_multiplier=1.0, sampling_probability=1.0, steps=1)])
    assert lower_band(found.scores_N, found.members_N).above(claim).size


def test_the_theoretical_values():
    found = [round(theoretical_auc(z), 3) for z in (0.5, 1.0, 2.0, 4.0)]
    assert found == [0.921, 0.760, 0.638, 0.570]


def test_trainers_that_the_closed_form_does_not_describe_are_refused(lora):
    shard = Shard(client_id="a", indices=np.arange(EXAMPLES))
    for change in ({"local_steps": 2}, {"optimizer": "adamw"}, {"sampling_probability": 1.0}):
        with pytest.raises(ConfigError, match="one plain step"):
            one_step_trials(trainer(lora, 1.0, **change), read_flat(lora), shard, key=KEY, steps=1)
    generous = trainer(lora, 1.0)
    generous.dp = ExampleDp(l2_clip_norm=100.0, noise_multiplier=1.0)
    with pytest.raises(ConfigError, match="below the clip of 100"):
        one_step_trials(generous, read_flat(lora), shard, key=KEY, steps=1)
