"""Bottleneck adapters and selections by name: what is trained, what is saved, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_bases import base, load, logits, shake, tuned

from privfed.errors import ModelError
from privfed.tuning import TUNINGS, adapter
from privfed.tuning.layout import layout_of, trained


@pytest.mark.parametrize(
    ("family", "places"),
    [
        ("bert", {"attention.output.dense", "output.dense"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("vit", {"attention.o_proj", "mlp.fc2"}),
    ],
)
def test_adapters_follow_the_last_layer_of_each_part(family, places):
    found = tuned("adapter", load(family), bottleneck=4)
    names = {n.rpartition(".up.")[0] for n, _ in trained(found.model) if ".up.weight" in n}
    assert len(names) == 4
    assert {name.split(".0.", 1)[1] for name in names if ".0." in name} == places
    shapes = {tuple(p.shape) for n, p in trained(found.model) if n.endswith("down.weight")}
    assert shapes == {(4, 32)}


def test_an_adapter_computes_what_the_paper_says():
    model = tuned("adapter", load("bert"), bottleneck=4).model
    shake(model)
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    h = base("bert").get_submodule("bert.encoder.layer.0.output.dense")(x)
    inner = torch.nn.functional.gelu(h @ layer.down.weight.T + layer.down.bias)
    assert torch.allclose(layer(x), h + inner @ layer.up.weight.T + layer.up.bias, atol=1e-6)


def test_an_adapter_is_loaded_by_its_own_function_and_only_where_it_fits(tmp_path):
    found = tuned("adapter", load("bert"), bottleneck=4, target_modules=["intermediate.dense"])
    shake(found.model)
    wanted = logits(found.model, "bert")
    found.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-bert"
    assert torch.equal(logits(adapter.load(base("bert", seed=1), tmp_path / "a"), "bert"), wanted)
    with pytest.raises(ModelError, match=r"needs a layer bert\.encoder"):
        adapter.load(base("gpt2"), tmp_path / "a")
    with pytest.raises(ModelError, match="There is no adapter in"):
        adapter.load(base("bert"), tmp_path / "absent")
    lora = tuned("lora", load("bert"))
    lora.save(tmp_path / "b")
    with pytest.raises(ModelError, match="one of peft's"):
        adapter.load(base("bert"), tmp_path / "b")
    with pytest.raises(ModelError, match="does not fit GPT2LMHeadModel"):
        TUNINGS.get("lora").load(base("gpt2"), tmp_path / "b")


def selected(family, *patterns):
    found = tuned("select", load(family), select=list(patterns))
    head = found.head or "nothing"
    plain = (n.replace(".modules_to_save.default", "") for n in layout_of(found.model).names if not n.startswith(head))
    return {name.removeprefix("base_model.model.") for name in plain}


def test_patterns_name_modules_or_parameters_by_their_ends():
    values = {f"bert.encoder.layer.{i}.attention.self.value.{p}" for i in (0, 1) for p in ("weight", "bias")}
    assert selected("bert", "layer.*.value") == values
    assert selected("bert", "value") == values
    assert selected("bert", "value.bias", "layer.0.*.query.weight") == {
        "bert.encoder.layer.0.attention.self.value.bias",
        "bert.encoder.layer.1.attention.self.value.bias",
        "bert.encoder.layer.0.attention.self.query.weight",
    }
    assert selected("bert", "encoder.layer.[1]") == {
        n for n, _ in base("bert").named_parameters() if n.startswith("bert.encoder.layer.1.")
    }
    assert selected("bert", "classifier") == set()  # the head, which is trained anyway
    assert selected("vit", "cls_token") == {"vit.embeddings.cls_token"}


def test_a_part_of_a_module_leaves_the_rest_of_it_as_it_was(tmp_path):
    found = tuned("select", load("bert"), select="value.bias")
    shake(found.model)
    found.save(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    name = "bert.encoder.layer.0.attention.self.value"
    key = next(k for k in state if k.endswith(f"{name}.weight"))
    assert torch.equal(state[key], base("bert").get_submodule(name).weight)


def test_selections_that_no_adapter_can_hold_are_refused():
    with pytest.raises(ModelError, match=r"also lm_head\.weight's.*would part the two"):
        tuned("select", load("gpt2"), select="wte")
    with pytest.raises(ModelError, match=r"'valu' matches no parameter.*Did you mean"):
        tuned("select", load("bert"), select="valu")
