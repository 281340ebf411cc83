"""The plain step: nothing runs that need not, and every way to save time or memory gives the same gradients."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from privfed.errors import ModelError
from privfed.models import ModelConfig
from privfed.models.examples import TextExamples, losses
from privfed.models.language import LanguageExamples
from privfed.models.loading import find_device, load_model
from privfed.models.prefix import attach, find_prefix
from privfed.models.sequences import from_texts
from privfed.tuning import TUNINGS

FAMILIES = ("bert", "gpt2", "llama")
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
TASKS = [("bert", "sequence_classification")] + [
    (family, task) for family in ("gpt2", "llama") for task in ("sequence_classification", "causal_lm")
]
TEXTS = [
    "cat dog",
    "rain snow wind storm cloud fog hail",
    "piano",
    "violin drum flute song",
    "horse cow sheep goat fox",
]


def tuned_model(folder, family, task, layers=None, **options):
    """Return a LoRA-tuned model off its start, and five examples of different lengths."""
    labels = ("a", "b") if task == "sequence_classification" else ()
    loaded = load_model(ModelConfig(name=str(folder), task=task, **options), label_names=labels, seed=1)
    plugin = TUNINGS.get("lora")
    config = plugin.config(r=2, target_modules=TARGETS[family], layers_to_transform=layers)
    tuned = plugin.apply(loaded, config, 5)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tuned.model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
    if labels:
        examples = TextExamples(TEXTS, np.arange(5) % 2, loaded.tokenizer, 16)
    else:
        examples = LanguageExamples(from_texts(TEXTS, loaded.tokenizer, 16), loaded.tokenizer)
    return tuned, examples


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)


def norm_of(model):
    """Return a norm inside the first block."""
    return next(m for m in blocks_of(model)[0].modules() if "Norm" in type(m).__name__)


def gradient(model, examples, rows=None):
    """Return the gradient of the summed losses of ``rows``, over all trained tensors."""
    model.zero_grad()
    model.train()
    rows = np.arange(len(examples)) if rows is None else rows
    losses(examples, model, examples.batch(rows)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_nothing_is_back_propagated_below_the_first_trained_parameter(tiny_model, family, task):
    tuned, examples = tuned_model(tiny_model(family), family, task, layers=[1])
    differentiable = []
    for block in blocks_of(tuned.model):
        block.register_forward_hook(
            lambda _module, _args, output: differentiable.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    gradient(tuned.model, examples)
    assert differentiable == [False, True]


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_a_frozen_prefix_runs_once_and_gives_the_same_gradient(tiny_model, family, task):
    tuned, examples = tuned_model(tiny_model(family), family, task, layers=[1])
    wanted = gradient(tuned.model, examples)
    inside = []
    prefix = find_prefix(tuned.model, tuned.head)
    assert prefix is not None and prefix.depth == 1
    assert attach(tuned.model, prefix, examples)
    norm_of(tuned.model).register_forward_hook(lambda *_: inside.append(1))
    assert torch.allclose(gradient(tuned.model, examples), wanted, rtol=1e-4, atol=1e-6)
    assert torch.allclose(
        gradient(tuned.model, examples, np.array([3, 0])),
        gradient(tuned.model, examples, np.array([0])) + gradient(tuned.model, examples, np.array([3])),
        rtol=1e-4,
        atol=1e-6,
    )
    assert not inside  # the replayed block never ran again
    examples.use_prefix(None, [])
    gradient(tuned.model, examples)
    assert inside


def test_a_language_model_that_trains_from_the_first_block_has_no_prefix(tiny_gpt2):
    tuned, _ = tuned_model(tiny_gpt2, "gpt2", "causal_lm")
    assert find_prefix(tuned.model, tuned.head) is None


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_checkpointing_gives_the_same_gradients_plain_and_per_example(tiny_model, family, task):
    from privfed.federation.sentinels import check_gradients

    whole, examples = tuned_model(tiny_model(family), family, task)
    wanted = gradient(whole.model, examples)
    saving, examples = tuned_model(tiny_model(family), family, task, gradient_checkpointing=True)
    runs = []
    norm_of(saving.model).register_forward_hook(lambda *_: runs.append(1))
    assert torch.allclose(gradient(saving.model, examples), wanted, rtol=1e-4, atol=1e-6)
    assert len(runs) == 2  # once without keeping anything, once more in the backward pass
    sentence, _ = check_gradients(saving.model, examples, private=True)
    assert "per-example gradients equal autograd's" in sentence


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_autocast_is_near_full_precision_and_leaves_float32_gradients(tiny_model, family, task):
    tuned, examples = tuned_model(tiny_model(family), family, task)
    wanted = gradient(tuned.model, examples)
    kinds = set()
    for module in tuned.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, _args, output: kinds.add(output.dtype))
    examples.autocast = True
    found = gradient(tuned.model, examples)
    assert torch.bfloat16 in kinds
    assert found.dtype == torch.float32 and not torch.equal(found, wanted)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert examples.logits(tuned.model, examples.batch(np.arange(2))).dtype == torch.float32
    assert not examples.probe(2).autocast  # self-checks compare in full precision


def test_why_autocast_is_refused_with_example_level_privacy(tiny_llama):
    """One more example, longer than the rest, changes the padding, the rounding of all others, and so the sum."""
    from privfed.privacy.per_example import PerExampleModel

    tuned, _ = tuned_model(tiny_llama, "llama", "causal_lm")
    texts = [" ".join(TEXTS[i % 4].split()[: 1 + i % 3]) for i in range(40)] + [" ".join(TEXTS)]
    tokenizer = load_model(ModelConfig(name=str(tiny_llama), task="causal_lm"), label_names=(), seed=1).tokenizer
    examples = LanguageExamples(from_texts(texts, tokenizer, 32), tokenizer)
    tuned.model.train()
    shift = {}
    for autocast in (False, True):
        examples.autocast = autocast
        model = PerExampleModel(tuned.model)
        sums = [
            model.clipped_sum(lambda m, b: losses(examples, m, b), examples.batch(np.arange(size)), size, 1e-3).sum_D
            for size in (40, 41)
        ]
        alone = model.clipped_sum(lambda m, b: losses(examples, m, b), examples.batch(np.array([40])), 1, 1e-3).sum_D
        shift[autocast] = float((sums[1] - sums[0] - alone).norm()) / 1e-3
        model.close()
    assert shift[False] < 1e-3 < 1e-2 < shift[True]


def test_devices_that_are_not_there_are_named():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else find_device("auto").type)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r'model.device = "cuda", but torch .* finds no such device here, only'):
            find_device("cuda")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantisation_without_its_library_is_one_sentence(tiny_llama):
    with pytest.raises(ModelError, match="needs the package bitsandbytes, which is not installed"):
        tuned_model(tiny_llama, "llama", "causal_lm", quantization="4bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_trains_float32_adapters(tiny_llama, bits):
    tuned, examples = tuned_model(tiny_llama, "llama", "causal_lm", quantization=bits)
    trained = [p for p in tuned.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    assert any(p.dtype in (torch.uint8, torch.int8) for p in tuned.model.parameters())
    assert bool(torch.isfinite(gradient(tuned.model, examples)).all())
