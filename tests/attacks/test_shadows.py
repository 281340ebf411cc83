"""Shadow models side by side are the models that training one after the other gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from privfed.errors import ConfigError, ModelError
from privfed.federation.local import LocalTrainer
from privfed.models.examples import FeatureExamples, LabelledExamples, padded
from privfed.models.loading import LoadedModel
from privfed.models.prefix import attach, find_prefix
from privfed.models.sources import ModelSource
from privfed.rng import PrivateStream
from privfed.schedule import ClientConfig
from privfed.tuning import TUNINGS
from privfed.tuning.layout import read_flat, write_flat
from privfed.types import Shard
from privfed_attacks.first_token import first_token_only
from privfed_attacks.shadows import Shadows, in_out_matrix, train_side_by_side

KEY = bytes(range(32))
VOCABULARY, CLASSES = 60, 3
MODELS, EXAMPLES = 4, 30
LAST_BLOCK = {"r": 2, "target_modules": ["query", "value"], "layers_to_transform": [1]}


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


def one_after_the_other(module, examples, members_KQ, config, head):
    """Return each model's trained values [K, D] by the clients' own trainer, and leave the module as it was."""
    start_D = read_flat(module)
    trainer = LocalTrainer(module, head, examples, config, None)
    ends = []
    for k, bits in enumerate(members_KQ):
        shard = Shard(client_id=str(k), indices=np.flatnonzero(bits))
        ends.append(start_D + trainer.run(start_D, shard, PrivateStream(KEY, k), lambda *_: None))
    write_flat(module, start_D)
    return np.stack(ends)


def streams(count):
    return [PrivateStream(KEY, k).generator() for k in range(count)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("name", "options", "cached"),
    [
        ("lora", LAST_BLOCK, False),
        ("lora", LAST_BLOCK, True),
        ("bitfit", {}, False),
        ("adapter", {"bottleneck": 3}, False),
        ("prompt_tuning", {"num_virtual_tokens": 3}, False),
    ],
)
def test_every_tuning_ends_where_training_alone_does(tuned, tokens, name, options, cached, optimizer):
    model, examples = tuned(name, **options), tokens(EXAMPLES)
    module, head = model.model, model.head
    if cached:
        assert attach(module, find_prefix(module, head), examples)
    config = ClientConfig(
        optimizer=optimizer,
        learning_rate=2e-2,
        head_learning_rate=5e-2,
        batch_size=7,
        local_steps=5,
        weight_decay=0.01,
        momentum=0.0 if optimizer == "adamw" else 0.5,
    )
    members_KQ = in_out_matrix(MODELS, EXAMPLES, np.random.default_rng(0))
    members_KQ[0, 5:] = False  # fewer members than a batch has rows
    wanted_KD = one_after_the_other(module, examples, members_KQ, config, head)
    before_D = read_flat(module)
    found = train_side_by_side(module, examples, members_KQ, config, streams(MODELS), head_prefix=head)
    moved = np.abs(wanted_KD - before_D).max(axis=1)
    assert (np.abs(found.flat() - wanted_KD).max(axis=1) < 2e-3 * moved).all()
    assert np.abs(wanted_KD[1] - wanted_KD[2]).max() > 0.1 * moved.max()  # the models do differ
    np.testing.assert_array_equal(read_flat(module), before_D)  # and the module is left as it came
    module.eval()
    for k in (0, 3):
        write_flat(module, wanted_KD[k])
        with torch.no_grad():
            alone = examples.losses(module, examples.batch(np.arange(EXAMPLES))).numpy()
        np.testing.assert_allclose(found.losses(examples, size=8)[k], alone, rtol=5e-3, atol=5e-4)


def test_a_head_on_features_and_groups_of_models():
    draw = torch.Generator().manual_seed(1)
    examples = FeatureExamples(torch.randn(60, 8, generator=draw), torch.arange(60) % 3)
    torch.manual_seed(0)
    head = nn.Linear(8, 3)
    config = ClientConfig(optimizer="adamw", learning_rate=5e-2, batch_size=16, local_steps=12)
    members_KQ = in_out_matrix(6, 60, np.random.default_rng(0))
    wanted_KD = one_after_the_other(head, examples, members_KQ, config, "")
    found = train_side_by_side(head, examples, members_KQ, config, streams(6), head_prefix="")
    np.testing.assert_allclose(found.flat(), wanted_KD, atol=2e-5)
    apart = train_side_by_side(head, examples, members_KQ, config, streams(6), head_prefix="", group=4)
    np.testing.assert_allclose(apart.flat(), wanted_KD, atol=2e-5)


def test_losses_of_sure_models_are_not_rounded_to_zero():
    features = torch.tensor([[60.0], [-60.0]])
    examples = FeatureExamples(features, torch.tensor([0, 0]))
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.5], [-0.5]]))
    found = Shadows(
        module=head, stacked={"weight": head.weight.detach()[None]}, members_KQ=np.ones((1, 2), dtype=bool)
    ).losses(examples)
    np.testing.assert_allclose(found, [[np.exp(-60.0), 60.0]], rtol=1e-9)


def test_each_example_is_in_exactly_half_of_the_models():
    bits_KQ = in_out_matrix(8, 500, np.random.default_rng(0))
    assert (bits_KQ.sum(axis=0) == 4).all()
    assert len(np.unique(bits_KQ, axis=1).T) == 70  # every choice of 4 of 8 comes up
    assert abs(np.corrcoef(bits_KQ)[0, 1] + 1 / 7) < 0.1
    with pytest.raises(ConfigError, match="even number"):
        in_out_matrix(5, 10, np.random.default_rng(0))


def test_the_last_block_is_cut_where_the_head_reads_the_first_token(tuned, tokens):
    model, examples = tuned("lora", r=2, target_modules=["query", "value"]), tokens(20)
    rows = np.arange(20)
    module = model.model.eval()
    with torch.no_grad():
        whole = examples.logits(module, examples.batch(rows))
        widths = []
        dense = module.base_model.model.bert.encoder.layer[-1].output.dense
        handle = dense.register_forward_hook(lambda _m, args, _out: widths.append(args[0].shape[1]))
        with first_token_only(module, examples) as cut:
            assert cut
            part = examples.logits(module, examples.batch(rows))
            asking = module.base_model.model.bert.encoder.layer[-1].attention.self.config._attn_implementation
            assert asking == "privfed_first_token"
        assert module.base_model.model.bert.encoder.layer[-1].attention.self.config is module.base_model.model.config
        assert widths[-1] == 1
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)
        examples.logits(module, examples.batch(rows))
        assert widths[-1] > 1  # and whole again
        handle.remove()


def test_the_last_block_is_left_alone_where_the_head_reads_every_token(tuned, tokens):
    model, examples = tuned("lora", r=2, target_modules=["query", "value"]), tokens(20)
    module = model.model.eval()

    class MeanPooler(nn.Module):
        def forward(self, hidden):
            return hidden.mean(dim=1)

    module.base_model.model.bert.pooler = MeanPooler()
    with torch.no_grad():
        whole = examples.logits(module, examples.batch(np.arange(20)))
        with first_token_only(module, examples) as cut:
            assert not cut
            torch.testing.assert_close(examples.logits(module, examples.batch(np.arange(20))), whole)


def test_what_cannot_be_stacked_is_refused(tuned, tokens):
    examples = tokens(10)
    members_KQ = in_out_matrix(2, 10, np.random.default_rng(0))
    config = ClientConfig(batch_size=4, local_steps=1)
    with pytest.raises(ModelError, match=r"dropout .*model\.dropout = 0"):
        train_side_by_side(tuned("bitfit", dropout=0.1).model, examples, members_KQ, config, streams(2))
    module = tuned("bitfit").model
    with pytest.raises(ConfigError, match="stream for each of 2"):
        train_side_by_side(module, examples, members_KQ, config, streams(3))
    with pytest.raises(ConfigError, match="no example to train on"):
        train_side_by_side(module, examples, np.zeros((2, 10), dtype=bool), config, streams(2))
    with pytest.raises(ConfigError, match="proximal"):
        proximal = ClientConfig(batch_size=4, local_steps=1, proximal_mu=0.1)
        train_side_by_side(module, examples, members_KQ, proximal, streams(2))
