"""Per-example gradients: exact for every tuning and architecture, clipped one by one, never silently wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from privfed.compression import CODECS
from privfed.errors import ClientError, ModelError
from privfed.federation.client import Client, Holder
from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.federation.messages import Broadcast
from privfed.federation.sharing import share_out
from privfed.models.config import ModelConfig
from privfed.models.examples import FeatureExamples, TextExamples, losses
from privfed.models.loading import load_model
from privfed.privacy.ledger import Ledger
from privfed.privacy.per_example import PerExampleModel
from privfed.privacy.per_example.sites import EmbeddingSite
from privfed.rng import PrivateStream
from privfed.rules import RULES
from privfed.schedule import ClientConfig
from privfed.tuning import TUNINGS
from privfed.tuning.layout import layout_of, read_flat, trained, write_flat
from privfed.types import PrivacyEvent, Shard

FAMILIES = ("bert", "roberta", "gpt2", "llama")
# the tunings with a file of their own; peft's are in test_every_tuner
OWN = ("adapter", "bernoulli_mask", "bitfit", "fed_sb", "federa", "ffa_lora", "full", "head", "lora")
WITHOUT_BIAS = {("bitfit", "llama")}
TEXTS = (
    "cat dog horse",
    "piano violin drum flute song melody balan banmor bopil baset",
    "rain",
    "storm cloud balan bupil kelan karus",
)


def examples(tokenizer, texts=TEXTS):
    return TextExamples(texts, np.arange(len(texts)) % 3, tokenizer, 16)


def tuned_model(folder, tuning, seed=5):
    """Return (module in train mode with its trained values moved at random, tokenizer)."""
    loaded = load_model(ModelConfig(name=str(folder)), label_names=("a", "b", "c"), seed=seed)
    plugin = TUNINGS.get(tuning)
    module = plugin.apply(loaded, plugin.config(), seed).model
    values_D = read_flat(module)
    noise_D = np.random.default_rng(seed).standard_normal(len(values_D)).astype(np.float32)
    write_flat(module, values_D + np.float32(0.05) * noise_D)
    return module.train(), loaded.tokenizer


def batched_gradients(module, data, rows):
    model = PerExampleModel(module)
    try:
        return model.gradients(lambda m, batch: losses(data, m, batch), data.batch(rows), len(rows))
    finally:
        model.close()


def one_at_a_time(module, data, rows):
    """Return each parameter's gradients [B, ...] by plain autograd, every example alone and without padding."""
    parameters = [p for _, p in trained(module)]
    singles = [
        torch.autograd.grad(losses(data, module, data.batch(np.asarray([row]))).sum(), parameters) for row in rows
    ]
    return [torch.stack(found) for found in zip(*singles, strict=True)]


def worst_error(found, wanted):
    """Return the largest relative error of a tensor, those that are zero up to rounding left out."""
    total = float(torch.stack([g.norm() for g in wanted]).norm())
    errors = []
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        scale, difference = float(want.norm()), float((got - want).norm())
        errors.append(0.0 if difference <= 1e-6 * total and scale <= 1e-5 * total else difference / scale)
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuning", OWN)
def test_gradients_equal_autograd_alone(tiny_model, family, tuning):
    if (tuning, family) in WITHOUT_BIAS:
        with pytest.raises(ModelError, match="has none: use tuning"):
            tuned_model(tiny_model(family), tuning)
        return
    module, tokenizer = tuned_model(tiny_model(family), tuning)
    data, rows = examples(tokenizer), np.arange(len(TEXTS))
    assert len(set(data.lengths)) > 2  # so the batch is padded
    wanted = one_at_a_time(module, data, rows)
    assert worst_error(batched_gradients(module, data, rows), wanted) < 1e-4
    # and the check can tell: one example's gradient in another's place is far off
    assert worst_error([g.roll(1, dims=0) for g in wanted], wanted) > 0.1


@pytest.mark.parametrize(
    ("family", "table"),
    [
        ("bert", "position_embeddings"),
        ("bert", "token_type_embeddings"),
        ("gpt2", "wpe"),
        ("roberta", "position_embeddings"),
    ],
)
def test_tables_that_are_looked_up_once_for_the_whole_batch(tiny_model, family, table):
    module, tokenizer = tuned_model(tiny_model(family), "full")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(table in name)
    assert len(trained(module)) == 1
    data, rows = examples(tokenizer), np.arange(len(TEXTS))
    found = batched_gradients(module, data, rows)
    wanted = one_at_a_time(module, data, rows)
    assert worst_error(found, wanted) < 1e-4
    assert float((wanted[0][0] - wanted[0][1]).norm()) > 1e-3  # examples do differ there


def test_a_batch_dimension_of_one_is_refused_and_not_taken_for_one_example(tiny_gpt2, monkeypatch):
    module, tokenizer = tuned_model(tiny_gpt2, "full")
    data, rows = examples(tokenizer), np.arange(len(TEXTS))
    model = PerExampleModel(module)
    monkeypatch.setattr(EmbeddingSite, "_expand", lambda *_: None)  # as stock Opacus has it
    with pytest.raises(ClientError, match="cannot be trained privately"):
        model.gradients(lambda m, batch: losses(data, m, batch), data.batch(rows), len(rows))
    model.close()


class RawParameter(nn.Module):
    """A trained tensor that belongs to no layer Opacus knows; some adapters are made like this."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.linear(x * self.scale)


class Coupled(nn.Module):
    """Examples see each other through the batch's mean."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) * (1 + x.mean())


def features(count=5):
    random = torch.Generator().manual_seed(1)
    return FeatureExamples(torch.randn(count, 4, generator=random), torch.arange(count) % 3)


def test_a_tensor_outside_every_layer_is_exact():
    module, data, rows = RawParameter(), features(), np.arange(5)
    found = batched_gradients(module, data, rows)
    assert worst_error(found, one_at_a_time(module, data, rows)) < 1e-4


def test_examples_that_see_each_other_are_found_out():
    """The batch's gradients still add up there: only the comparison with examples alone shows the coupling."""
    module, data, rows = Coupled(), features(), np.arange(5)
    found = batched_gradients(module, data, rows)
    whole = torch.autograd.grad(losses(data, module, data.batch(rows)).sum(), list(module.parameters()))
    for got, want in zip(found, whole, strict=True):
        torch.testing.assert_close(got.sum(0), want)
    assert worst_error(found, one_at_a_time(module, data, rows)) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_an_example_does_not_depend_on_its_neighbours(tiny_model, family):
    module, tokenizer = tuned_model(tiny_model(family), "head")
    data = examples(tokenizer)
    with torch.no_grad():
        together = losses(data, module, data.batch(np.arange(len(TEXTS))))
        alone = torch.cat([losses(data, module, data.batch(np.asarray([row]))) for row in range(len(TEXTS))])
    assert float((together - alone).abs().max()) < 1e-5
    if family == "bert":  # an encoder without the mask does let padding show: the comparison can tell
        unmasked = data.batch(np.arange(len(TEXTS)))
        unmasked.inputs.pop("attention_mask")
        with torch.no_grad():
            wrong = losses(data, module, unmasked)
        assert float((wrong - alone).abs().max()) > 1e-5


def test_closing_takes_every_hook_off(tiny_bert):
    module, tokenizer = tuned_model(tiny_bert, "full")
    data = examples(tokenizer)
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in module.named_modules()}
    batched_gradients(module, data, np.arange(3))
    after = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in module.named_modules()}
    assert after == before
    losses(data, module, data.batch(np.arange(3))).sum().backward()
    assert not any(hasattr(p, "grad_sample") and p.grad_sample is not None for p in module.parameters())


# --- the DP-SGD step ----------------------------------------------------------------------------------------------

WIDTH, CLASSES, ROWS = 400, 50, 40


class Recorded(FeatureExamples):
    """Wide features, and the rows of every microbatch that was asked for."""

    def __init__(self):
        features_NF = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
        super().__init__(features_NF, torch.arange(ROWS) % CLASSES)
        self.asked = []

    def batch(self, rows):
        self.asked.append(np.array(rows))
        return super().batch(rows)


class Untouchable(nn.Linear):
    """A layer that must not be called."""

    def forward(self, x):
        raise AssertionError("an empty batch reached the model")


def step(*, names=("step",), module=None, data=None, rows=ROWS, dp=None, on_step=lambda *_: None, **client):
    """Return a client's update from zero parameters."""
    data = data or Recorded()
    module = module or nn.Linear(WIDTH, CLASSES)
    settings_ = {"optimizer": "sgd", "learning_rate": 1.0, "local_steps": 1, **client}
    trainer = LocalTrainer(module, "head", data, ClientConfig(**settings_), dp)
    shard = Shard(client_id="c", indices=np.arange(rows, dtype=np.int64))
    try:
        return trainer.run(np.zeros_like(read_flat(module)), shard, PrivateStream(bytes(32), *names), on_step)
    finally:
        trainer.close()


def scale_is_plausible(draws, sigma):
    statistic = float(np.sum((draws / sigma) ** 2))
    law = stats.chi2(len(draws))
    return min(law.cdf(statistic), law.sf(statistic)) > 1e-6


@pytest.mark.parametrize(
    ("clip", "sigma", "probability", "steps"), [(1.0, 1.0, 0.1, 1), (0.2, 4.0, 0.3, 1), (3.0, 2.0, 0.05, 4)]
)
def test_the_noise_of_a_step_has_the_right_scale(clip, sigma, probability, steps):
    dp = ExampleDp(l2_clip_norm=clip, noise_multiplier=sigma)
    delta_D = step(dp=dp, names=("scale", clip), sampling_probability=probability, local_steps=steps)
    right = sigma * clip / (probability * ROWS) * np.sqrt(steps)
    assert scale_is_plausible(delta_D, right)
    for wrong in (2 / 3, 3 / 2):
        assert not scale_is_plausible(delta_D, right * wrong)


def test_an_empty_batch_is_noise_alone_and_counts_and_never_calls_the_model():
    done = []
    probability, sigma = 1e-7, 2.0
    delta_D = step(
        module=Untouchable(WIDTH, CLASSES),
        dp=ExampleDp(l2_clip_norm=1.0, noise_multiplier=sigma),
        sampling_probability=probability,
        local_steps=3,
        on_step=lambda number, of: done.append((number, of)),
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert scale_is_plausible(delta_D, sigma / (probability * ROWS) * np.sqrt(3))


def test_a_layer_that_must_not_be_called_is_called_by_other_batches():
    with pytest.raises(AssertionError, match="reached the model"):
        step(
            module=Untouchable(WIDTH, CLASSES),
            dp=ExampleDp(l2_clip_norm=1.0, noise_multiplier=1.0),
            sampling_probability=1.0,
        )


def test_poisson_sampling_takes_each_row_with_the_given_probability():
    data, steps, probability, rows = Recorded(), 250, 0.13, ROWS - 5
    step(
        data=data,
        rows=rows,
        dp=ExampleDp(l2_clip_norm=1.0, noise_multiplier=1.0),
        sampling_probability=probability,
        local_steps=steps,
        physical_batch_size=ROWS,
    )
    taken = np.concatenate(data.asked)
    assert taken.max() < rows  # the shard's rows only
    assert all(len(set(batch)) == len(batch) for batch in data.asked)
    trials = steps * rows
    assert stats.binomtest(len(taken), trials, probability).pvalue > 1e-6
    for wrong in (1.25, 0.8):
        assert stats.binomtest(len(taken), trials, probability * wrong).pvalue < 1e-6
    counts = np.bincount(taken, minlength=rows)
    assert stats.chisquare(counts).pvalue > 1e-6
    sizes = np.array([len(batch) for batch in data.asked] + [0] * (steps - len(data.asked)))
    spread = float(np.sum((sizes - probability * rows) ** 2)) / (rows * probability * (1 - probability))
    assert 0.6 * steps < spread < 1.5 * steps  # a batch of fixed size would have none


def test_a_shard_below_the_batch_is_sampled_at_its_own_rate():
    config = ClientConfig(batch_size=8)
    assert config.probability(40) == 0.2
    assert config.expected_batch(40) == 8


def test_equal_streams_give_equal_bits_and_others_other_noise():
    dp = ExampleDp(l2_clip_norm=1.0, noise_multiplier=1.0)

    def run(*names):
        return step(names=names, dp=dp, sampling_probability=0.2, local_steps=2)

    assert np.array_equal(run("round", 1), run("round", 1))
    correlation = np.corrcoef(run("round", 1), run("round", 2))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(WIDTH * CLASSES)


def test_microbatches_change_memory_and_not_the_result():
    dp = ExampleDp(l2_clip_norm=1.0, noise_multiplier=0.5)
    small, large = (step(dp=dp, sampling_probability=0.5, physical_batch_size=size) for size in (3, ROWS))
    np.testing.assert_allclose(small, large, atol=2 * 0.5 * 2.0**-12 / 20)  # the noise's grid


def test_without_privacy_a_step_is_the_mean_gradient():
    data = Recorded()
    module = nn.Linear(WIDTH, CLASSES)
    delta_D = step(module=module, data=data, batch_size=ROWS, physical_batch_size=7)
    assert sorted(np.concatenate(data.asked)) == list(range(ROWS))
    write_flat(module, np.zeros_like(delta_D))
    module.zero_grad()
    losses(data, module, data.batch(np.arange(ROWS))).mean().backward()
    want = -np.concatenate([p.grad.numpy().ravel() for p in module.parameters()])
    np.testing.assert_allclose(delta_D, want, atol=1e-6)


def test_another_broadcast_meets_other_noise_and_the_same_one_the_same(tmp_path):
    module = nn.Linear(WIDTH, CLASSES)
    layout = layout_of(module)
    dp = ExampleDp(l2_clip_norm=1.0, noise_multiplier=1.0)
    config = ClientConfig(optimizer="sgd", sampling_probability=1e-6, local_steps=1, learning_rate=1e-6)
    event = PrivacyEvent(unit="example", noise_multiplier=1.0, sampling_probability=1e-6, steps=1)
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        holder = Holder(
            ledger=ledger,
            key=bytes(32),
            run_id="run",
            ledger_run_id="run",
            data_digest="d",
            partition_digest="p",
            project="default",
        )
        client = Client(
            shard=Shard(client_id="c", indices=np.arange(ROWS, dtype=np.int64)),
            trainer=LocalTrainer(module, "head", Recorded(), config, dp),
            codec=CODECS.get("identity").build(CODECS.get("identity").config(), None),
            holder=holder,
            sharing=share_out(RULES.get("fedavg")(), layout, (), patterns=(), head="head"),
            store=None,
            event=event,
            mechanism=None,
            weight=1.0,
        )

        def respond(first_value, round_number=1):
            params_D = np.zeros(layout.size, dtype=np.float32)
            params_D[0] = first_value
            sent = Broadcast(
                run_id="run", phase="train", round=round_number, layout_digest=layout.digest, params_D=params_D
            )
            return client.respond(sent.to_bytes(), lambda *_: None).encoded.values_M

        first = respond(0.0)
        assert np.array_equal(first, respond(0.0))
        assert len(ledger.entries()) == 1  # the same release is charged once
        others = [respond(1e-6), respond(0.0, round_number=2)]
        assert len(ledger.entries()) == 3
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(layout.size)
