"""Silent privacy failures that were measured elsewhere, as regression tests: one example moves the sum by <= C.

For each: what stock Opacus or a Hugging Face loss does, shown to be too much, and what this engine does.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from privfed.errors import ClientError, ModelError
from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.models.examples import FeatureExamples
from privfed.privacy.per_example import PerExampleModel, clipped_sum
from privfed.privacy.per_example.coupling import check_independent
from privfed.rng import PrivateStream
from privfed.schedule import ClientConfig
from privfed.tuning.layout import read_flat
from privfed.types import Shard

VOCABULARY, WIDTH = 40, 16
LENGTHS = (3, 11, 5, 8, 4, 10, 6, 7)


def causal_lm(family):
    import transformers as hf

    torch.manual_seed(2)
    if family == "gpt2":
        config = hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def trained_model(family, tuning):
    """Return a causal LM of which a prompt or the position table is trained."""
    from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model

    model = causal_lm(family)
    if tuning == "positions":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("wpe" in name)
        return model.train()
    config = {
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    }[tuning]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config).train()


def sequences(rows):
    random = torch.Generator().manual_seed(7)
    texts = [torch.randint(1, VOCABULARY, (length,), generator=random) for length in LENGTHS]
    width = max(LENGTHS[row] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : LENGTHS[row]], mask[place, : LENGTHS[row]] = texts[row], 1
    return {"input_ids": ids, "attention_mask": mask}


def own_mean(module, batch):
    """Return each sequence's mean loss over its own tokens."""
    each, targets = token_losses(module, batch)
    return each.sum(dim=1) / (targets != -100).sum(dim=1)


def token_losses(module, batch):
    width = batch["input_ids"].shape[1]
    logits = module(**batch).logits[:, -width:-1]
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    return cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100), targets


def batch_mean(module, batch):
    """Return what Hugging Face's ``labels=`` does, split by sequence: tokens are averaged over the whole batch."""
    each, targets = token_losses(module, batch)
    return each.sum(dim=1) / (targets != -100).sum() * len(targets)


def largest_move(total, size):
    """Return how far ``total(rows)`` moves at most when one of ``size`` examples is removed."""
    everyone = total(list(range(size)))
    return max(float((everyone - total([r for r in range(size) if r != out])).norm()) for out in range(size))


def by_opacus(module, loss, rows, bound):
    """Return what is added up with stock Opacus's gradients, and their batch dimensions."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(module, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(wrapped, sequences(rows)).sum().backward()
        gradients = [p.grad_sample for p in module.parameters() if p.requires_grad]
    finally:
        wrapped.to_standard_module()
        for parameter in module.parameters():
            parameter.grad = None
    sizes = {len(g) for g in gradients}
    return clipped_sum(gradients, bound).sum_D, sizes


PAIRS = [("gpt2", "prompt"), ("gpt2", "p-tuning"), ("gpt2", "positions"), ("llama", "prompt"), ("llama", "p-tuning")]


@pytest.mark.parametrize(("family", "tuning"), PAIRS)
def test_prompts_and_positions_of_a_causal_lm_are_clipped_example_by_example(family, tuning):
    module = trained_model(family, tuning)
    size = len(LENGTHS)
    model = PerExampleModel(module)
    norms = model.clipped_sum(own_mean, sequences(range(size)), size, 1.0).norms_B
    bound = 0.5 * float(norms.min())  # every example is clipped

    def total(rows):
        return model.clipped_sum(own_mean, sequences(rows), len(rows), bound).sum_D

    move = largest_move(total, size)
    assert move <= bound
    # all of the bound is used: each example does count as one
    assert move > 0.99 * bound
    model.close()
    # stock Opacus raises nothing and takes the whole batch for one example: eight of them weigh as much as one
    whole, sizes = by_opacus(module, own_mean, list(range(size)), bound)
    assert sizes == {1}
    assert float(whole.norm()) <= bound


@pytest.mark.parametrize(("family", "tuning"), [("gpt2", "prompt"), ("gpt2", "positions"), ("llama", "prompt")])
def test_what_stock_opacus_adds_up_there_moves_by_more_than_the_clip(family, tuning):
    """One example against seven others of the same text turns the whole batch's clipped gradient around."""
    module, bound = trained_model(family, tuning), 1e-3

    def weighted(rows):
        weights = torch.tensor([-20.0 if row == 0 else 1.0 for row in rows])
        return lambda m, batch: own_mean(m, batch) * weights

    def stock(rows):
        return by_opacus(module, weighted(rows), [1] * len(rows), bound)[0]

    assert largest_move(stock, 8) > 1.9 * bound
    model = PerExampleModel(module)

    def ours(rows):
        return model.clipped_sum(weighted(rows), sequences([1] * len(rows)), len(rows), bound).sum_D

    assert largest_move(ours, 8) <= bound


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_loss_averaged_over_the_batch_s_tokens_is_refused(family):
    module = trained_model(family, "prompt")
    wanted = check_independent(module, own_mean, sequences, len(LENGTHS))
    with pytest.raises(ModelError, match=r"loss differs by .* between a batch of 8 and the example alone"):
        check_independent(module, batch_mean, sequences, len(LENGTHS))
    model = PerExampleModel(module)
    found = model.gradients(batch_mean, sequences(range(len(LENGTHS))), len(LENGTHS))
    ratios = found[0].flatten(1).norm(dim=1) / wanted[0].flatten(1).norm(dim=1)
    assert float(ratios.max()) > 1.5  # how wrong they would be: long sequences count more, by their neighbours
    assert float(ratios.min()) < 0.7
    with pytest.raises(ClientError, match="no gradient for each example"):  # the loss as Hugging Face returns it
        model.gradients(lambda m, b: m(**b, labels=b["input_ids"]).loss, sequences(range(4)), 4)


def test_an_empty_batch_takes_no_example_in_its_place():
    """Sampling someone at random instead would double what one example can move."""
    asked = []

    class Watched(FeatureExamples):
        def batch(self, rows):
            asked.append(rows)
            return super().batch(rows)

    data = Watched(torch.randn(6, 4), torch.arange(6) % 3)
    module = torch.nn.Linear(4, 3)
    bound, noise = 0.3, 1e-6
    config = ClientConfig(optimizer="sgd", learning_rate=1.0, local_steps=5, sampling_probability=1e-9)
    trainer = LocalTrainer(module, "head", data, config, ExampleDp(l2_clip_norm=bound, noise_multiplier=noise))
    shard = Shard(client_id="c", indices=np.arange(6, dtype=np.int64))
    delta_D = trainer.run(np.zeros_like(read_flat(module)), shard, PrivateStream(bytes(32), "empty"), lambda *_: None)
    assert asked == []
    # the sum is noise alone: what an example adds is what it adds to nothing
    assert float(np.abs(delta_D).max()) * config.expected_batch(6) < 1e-4 * bound
    nothing = clipped_sum([torch.zeros(0, 3, 4)], bound)
    assert float(nothing.sum_D.norm()) == 0.0
    one = clipped_sum([torch.full((1, 3, 4), 9.0)], bound)
    assert float((one.sum_D - nothing.sum_D).norm()) <= bound


@pytest.mark.parametrize(("family", "tuning"), PAIRS)
def test_gradients_that_add_up_to_the_batch_s_are_not_enough(family, tuning):
    """With a batch dimension of 1 the sum is right and no example is clipped: shapes and examples are compared."""
    module = trained_model(family, tuning)
    size = len(LENGTHS)
    whole = torch.autograd.grad(
        own_mean(module, sequences(range(size))).sum(), [p for p in module.parameters() if p.requires_grad]
    )
    added, sizes = by_opacus(module, own_mean, list(range(size)), 1e9)
    torch.testing.assert_close(added.float(), torch.cat([g.flatten() for g in whole]), rtol=1e-3, atol=1e-5)
    assert sizes == {1}
    wanted = check_independent(module, own_mean, sequences, size)
    model = PerExampleModel(module)
    model.prove(own_mean, sequences(range(size)), size, wanted)
    for got, want in zip(model.gradients(own_mean, sequences(range(size)), size), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
