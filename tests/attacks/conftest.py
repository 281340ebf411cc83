"""A tiny random classifier with an adapter, and random token sequences, for tests of attacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privfed.models.examples import LabelledExamples, padded
from privfed.models.loading import LoadedModel
from privfed.models.sources import ModelSource
from privfed.tuning import TUNINGS

VOCABULARY, CLASSES = 60, 3


class Tokens(LabelledExamples):
    """Random token sequences of 3 to 11 tokens with random classes."""

    def __init__(self, count, seed):
        draw = np.random.default_rng(seed)
        self.lengths = draw.integers(3, 12, count)
        self.rows = [draw.integers(1, VOCABULARY, length) for length in self.lengths]
        self.labels = torch.from_numpy(draw.integers(0, CLASSES, count))

    def unprefixed(self, rows):
        return self.labelled(rows, padded([self.rows[row] for row in rows], 0))

    def probe(self, classes):
        return Tokens(3, 0)


def tiny_bert(dropout=0.0):
    """Return a random BERT classifier of two layers."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=CLASSES,
        pad_token_id=0,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


@pytest.fixture
def tokens():
    """Return a function from a count to random examples."""
    return lambda count, seed=1: Tokens(count, seed)


@pytest.fixture
def tuned():
    """Return a function from a tuning and its options to the tuned tiny model."""

    def build(name, dropout=0.0, **options):
        source = ModelSource(location="random", local=True, origin="random", public_name="random")
        loaded = LoadedModel(model=tiny_bert(dropout), source=source, num_labels=CLASSES)
        tuning = TUNINGS.get(name)
        return tuning.apply(loaded, tuning.config(**options), 5)

    return build
