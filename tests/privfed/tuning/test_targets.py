"""Which layers are adapted: peft's table, all linear layers of the blocks elsewhere, and nothing that is not there."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny_bases import base, load, logits, shake, tuned

from privfed.errors import ModelError
from privfed.tuning.layout import trained
from privfed.tuning.targets import blocks, matched


def adapted(model):
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_the_default_is_pefts_table_or_all_linear_layers_of_the_blocks():
    assert adapted(tuned("lora", load("bert")).model) == {
        f"bert.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")
    }
    parts = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    assert adapted(tuned("lora", load("vit")).model) == {f"vit.layers.{i}.{n}" for i in (0, 1) for n in parts}


def test_all_linear_leaves_the_head_alone():
    for family in ("bert", "vit", "gpt2"):
        found = tuned("lora", load(family), target_modules="all-linear")
        assert not any("classifier" in n or "lm_head" in n for n in adapted(found.model))
        assert len(adapted(found.model)) >= 8


def test_ia3_scales_keys_values_and_the_feed_forward_part_of_a_model_peft_does_not_know():
    names = {n for n, _ in trained(tuned("ia3", load("vit")).model) if "ia3_l" in n}
    assert {n.split(".ia3_l")[0].rpartition("layers.0.")[2] for n in names if "layers.0" in n} == {
        "attention.k_proj", "attention.v_proj", "mlp.fc2",
    }  # fmt: skip


def test_ln_tuning_takes_every_normalisation_layer_of_a_model_peft_does_not_know():
    names = [n for n, _ in trained(tuned("ln_tuning", load("vit")).model) if "classifier" not in n]
    assert len(names) == 2 * 5  # two a block, one at the end; weight and bias each


def test_blocks_are_the_lists_of_alike_modules():
    for family, count in {"bert": 2, "gpt2": 2, "llama": 2, "vit": 2}.items():
        assert len(blocks(base(family))) == count


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("lora", {"target_modules": ["nowhere"]}, ["['nowhere'] does not fit", "names of its layers"]),
        ("lora", {"target_modules": ["query", "valeu"]}, ["'valeu' is the name of none", "Did you mean 'value'"]),
        ("lora", {"target_modules": "nowhere.*"}, ["'nowhere.*' does not fit"]),
        ("lora", {"target_modules": "("}, ["no regular expression"]),
        ("ia3", {"target_modules": ["valu"]}, ["Did you mean 'value'"]),
        ("lora", {"r": 33}, ["tuning.r = 33", "smaller side (32)", "at most 32"]),
        ("rslora", {"r": 33}, ["tuning.r = 33"]),
        ("fed_sb", {"r": 33}, ["tuning.r = 33"]),
        ("federa", {"r": 33}, ["tuning.r = 33"]),
        ("loha", {"r": 64}, ["tuning.r = 64"]),
        ("adalora", {"init_r": 64}, ["tuning.init_r = 64"]),
        ("lora", {"layers_to_transform": [1, 2]}, ["block 2", "blocks 0 to 1"]),
        ("vera", {"layers_to_transform": 5}, ["block 5"]),
        ("adapter", {"target_modules": ["nowhere"]}, ["does not fit"]),
        ("adapter", {"target_modules": ["LayerNorm"]}, ["no linear layer"]),
        ("select", {"select": "layer.*.valu"}, ["'layer.*.valu' matches no parameter"]),
        ("lora", {"target_modules": ["LayerNorm"]}, ["does not fit BertForSequenceClassification", "not supported"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_one_sentence(name, options, parts):
    with pytest.raises(ModelError) as caught:
        tuned(name, load("bert"), **options)
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text and text.endswith(".")


def test_a_default_of_peft_that_cannot_fit_gives_way_and_a_choice_does_not():
    tuned("c3a", load("bert"))  # peft's block_size of 256 divides no layer of width 32
    with pytest.raises(ModelError, match="does not fit BertForSequenceClassification with these options"):
        tuned("c3a", load("bert"), block_size=256)


def test_options_reach_peft():
    model = tuned("lora", load("bert"), r=4, use_rslora=True, rank_pattern={"value": 2}, lora_bias=True).model
    ranks = {n.rpartition(".")[2]: m.r["default"] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert ranks == {"query": 4, "value": 2}
    assert model.peft_config["default"].use_rslora
    assert any(n.endswith("lora_B.default.bias") for n, _ in trained(model))
    last = tuned("vera", load("bert"), layers_to_transform=[1]).model
    assert not any("layer.0." in n for n, _ in trained(last))
    text = tuned("lora", load("bert"), modules_to_save=["pooler.dense"]).model
    assert any("pooler.dense.modules_to_save" in n for n, _ in trained(text))


def test_a_target_is_an_end_of_a_name():
    model = base("bert")
    names = {id(m): n for n, m in model.named_modules()}
    found = {names[id(m)] for m in matched(model, ["output.dense"])}
    assert found == {f"bert.encoder.layer.{i}.{n}" for i in (0, 1) for n in ("attention.output.dense", "output.dense")}


def test_making_a_model_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    for name in ("vera", "adapter", "prompt_tuning", "fed_sb"):
        shake(tuned(name, load("bert")).model)
    assert torch.equal(torch.rand(3), wanted)


def test_a_prompt_of_a_language_model_has_one_row_of_logits_a_token():
    found = tuned("prompt_tuning", load("gpt2"), num_virtual_tokens=5)
    assert logits(found.model, "gpt2").shape == logits(base("gpt2"), "gpt2").shape
