"""What every tuning promises: a layout that is exact both ways, a frozen rest, an adapter that plain peft loads."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from privfed.errors import ModelError, UnknownNameError
from privfed.models.config import ModelConfig
from privfed.models.examples import TextExamples, losses
from privfed.models.loading import load_model
from privfed.tuning import TUNINGS
from privfed.tuning.layout import layout_of, read_flat, trained, write_flat

LABELS = ("a", "b", "c")
FAMILIES = ("bert", "roberta", "gpt2", "llama")
NAMES = ("bitfit", "dora", "ffa_lora", "full", "head", "ia3", "lora", "rslora")  # test_contract.py has all of them
PAIRS = [(t, f) for t in NAMES for f in FAMILIES if (t, f) != ("bitfit", "llama")]
TEXTS = ("cat dog horse", "piano violin drum flute song melody", "rain", "storm cloud balan")


def load(folder, seed=1):
    return load_model(ModelConfig(name=str(folder)), label_names=LABELS, seed=seed)


def apply(name, loaded, seed=1, **options):
    plugin = TUNINGS.get(name)
    return plugin.apply(loaded, plugin.config(**options), seed)


def shake(module, seed=3):
    """Move every trained value off its start; return the new values."""
    values_D = read_flat(module)
    moved_D = values_D + np.float32(0.1) * np.random.default_rng(seed).standard_normal(len(values_D)).astype(np.float32)
    write_flat(module, moved_D)
    return moved_D


def logits(module, tokenizer):
    data = TextExamples(TEXTS, np.zeros(len(TEXTS), dtype=np.int64), tokenizer, 16)
    module.eval()
    with torch.no_grad():
        return module(**data.batch(np.arange(len(TEXTS))).inputs).logits


def hashes(module):
    return {
        name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for name, p in module.named_parameters()
        if not p.requires_grad
    }


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_contract(tiny_model, name, family):
    loaded = load(tiny_model(family))
    whole = sum(p.numel() for p in loaded.model.parameters())
    tuned = apply(name, loaded)
    parameters = trained(tuned.model)
    layout = layout_of(tuned.model)
    assert layout.size == sum(p.numel() for _, p in parameters) == len(read_flat(tuned.model)) > 0
    assert (layout.size == whole) is (name == "full")
    assert any(n.startswith(tuned.head) for n in layout.names), "the head is trained by every tuning"
    assert isinstance(TUNINGS.get(name).linear, bool)

    # bit for bit both ways, with values that rounding would change
    exact_D = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    exact_D[:5] = [-0.0, 1e-42, np.float32(1 / 3), 3e38, -1e-20]
    write_flat(tuned.model, exact_D)
    assert read_flat(tuned.model).tobytes() == exact_D.tobytes()
    with pytest.raises(ValueError, match="Expected"):
        write_flat(tuned.model, exact_D[1:])
    with pytest.raises(ValueError, match="Expected"):
        write_flat(tuned.model, exact_D.astype(np.float64))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_step_moves_all_that_is_trained_and_nothing_else(tiny_model, name, family):
    loaded = load(tiny_model(family))
    tuned = apply(name, loaded)
    before_D, frozen = shake(tuned.model), hashes(tuned.model)
    data = TextExamples(TEXTS, np.arange(4) % 3, loaded.tokenizer, 16)
    optimizer = torch.optim.SGD([p for _, p in trained(tuned.model)], lr=1.0)
    losses(data, tuned.model, data.batch(np.arange(4))).sum().backward()
    optimizer.step()
    assert hashes(tuned.model) == frozen
    assert not np.array_equal(read_flat(tuned.model), before_D)
    assert all(p.grad is not None for _, p in trained(tuned.model)), "a trained tensor that no example moves"


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_what_is_saved_loads_in_plain_peft_with_the_same_logits(tiny_model, tmp_path, name, family):
    folder = tiny_model(family)
    loaded = load(folder)
    tuned = apply(name, loaded)
    shake(tuned.model)
    wanted = logits(tuned.model, loaded.tokenizer)
    tuned.save(tmp_path)
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt")]  # safetensors only
    if name == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))
        base.config.pad_token_id = loaded.tokenizer.pad_token_id
        assert not torch.allclose(logits(base, loaded.tokenizer), wanted, atol=1e-3)
        model = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(logits(model, loaded.tokenizer), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_all_that_differs(tiny_bert, name):
    first, again, other = (read_flat(apply(name, load(tiny_bert, seed), seed).model) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_adapter_is_the_base_model(tiny_bert, name):
    loaded = load(tiny_bert)
    wanted = logits(loaded.model, loaded.tokenizer)
    assert torch.equal(logits(apply(name, loaded).model, loaded.tokenizer), wanted)


def test_making_a_model_leaves_torchs_own_random_numbers_alone(tiny_bert):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    apply("lora", load(tiny_bert))
    assert torch.equal(torch.rand(3), wanted)


def test_what_each_method_trains(tiny_bert):
    def names(name, **options):
        return set(layout_of(apply(name, load(tiny_bert), **options).model).names)

    lora, ffa, head, bitfit = names("lora"), names("ffa_lora"), names("head"), names("bitfit")
    assert ffa == {n for n in lora if ".lora_A." not in n}
    assert len(lora) - len(ffa) == 2 * 2  # query and value of two layers
    assert len(head) == 2 and all("classifier" in n for n in head)
    assert head < bitfit
    assert all(n.endswith("bias") for n in bitfit - head)
    assert len(names("lora", target_modules=["dense"])) > 2


def test_ffa_lora_keeps_a_frozen_at_its_random_start(tiny_bert):
    model = apply("ffa_lora", load(tiny_bert)).model
    factors = {n: p for n, p in model.named_parameters() if ".lora_A." in n}
    assert len(factors) == 4
    for parameter in factors.values():
        assert not parameter.requires_grad
        assert float(parameter.abs().min()) >= 0 and float(parameter.std()) > 0.01


def test_the_linear_flag_tells_whether_averaging_factors_averages_the_model(tiny_bert):
    """The layer's change W is B A: averaged B with a common A gives the averaged W, averaged A and B do not."""
    for name in ("lora", "ffa_lora"):
        changes, flats = [], []
        for seed in (1, 2):
            model = apply(name, load(tiny_bert)).model
            flats.append(shake(model, seed))
            changes.append(_weight_change(model))
        model = apply(name, load(tiny_bert)).model
        write_flat(model, ((flats[0] + flats[1]) / 2).astype(np.float32))
        averaged = torch.allclose(_weight_change(model), (changes[0] + changes[1]) / 2, atol=1e-5)
        assert averaged is TUNINGS.get(name).linear


def _weight_change(model):
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    return layer.get_delta_weight("default").detach()


def test_the_digest_of_a_layout_follows_names_and_shapes(tiny_bert, tiny_roberta):
    def digest(name, folder=tiny_bert, **options):
        return layout_of(apply(name, load(folder), **options).model).digest

    found = [
        digest("lora"), digest("ffa_lora"), digest("head"), digest("bitfit"), digest("lora", r=4),
        digest("lora", target_modules=["key"]), digest("lora", tiny_roberta),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert digest("lora") == found[0]


def test_refusals(tiny_llama, tiny_bert):
    with pytest.raises(ModelError, match=r'this model has none: use tuning.name = "ffa_lora"'):
        apply("bitfit", load(tiny_llama))
    with pytest.raises(ModelError, match="to names of its layers") as caught:
        apply("lora", load(tiny_bert), target_modules=["nowhere"])
    assert "['nowhere'] does not fit BertForSequenceClassification" in str(caught.value)
    with pytest.raises(UnknownNameError, match="Did you mean 'ffa_lora'"):
        TUNINGS.get("ffalora")
    model = apply("head", load(tiny_bert)).model
    for _, parameter in trained(model):
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="trains no parameter"):
        layout_of(model)
    half = load(tiny_bert).model.half()
    with pytest.raises(ModelError, match=r"is torch\.float16, expected float32"):
        layout_of(half)
