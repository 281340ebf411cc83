"""Fed-SB and FeDeRA (PiSSA): what is fixed, what is trained, and what the papers promise of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny_bases import base, load, logits, shake, tuned

from privfed.tuning.fed_sb import factors
from privfed.tuning.layout import layout_of, read_flat, trained, write_flat


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_factors_are_the_singular_vectors_with_a_sign_of_their_own():
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    B, A = factors(weight, 3)
    assert torch.allclose(B.T @ B, torch.eye(3), atol=1e-6) and torch.allclose(A @ A.T, torch.eye(3), atol=1e-6)
    core = B.T @ weight @ A.T
    wanted = torch.linalg.svdvals(weight)[:3]
    assert torch.allclose(core, torch.diag(wanted), atol=1e-5), "B^T W A^T is diagonal, largest first"
    assert bool((B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all())
    for mirrored in factors(-weight, 3), factors(weight.flip(0).flip(0), 3):
        assert torch.allclose(mirrored[0], B, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_fed_sb_trains_r_squared_values_a_layer_between_fixed_factors(family):
    model = tuned("fed_sb", load(family), r=4).model
    cores = [p for n, p in trained(model) if ".lora_B.default.R." in n]
    assert len(cores) == len(layers(model)) > 0
    assert all(p.shape == (4, 4) and not p.any() for p in cores)
    assert {n.rpartition(".")[2] for n, _ in trained(model) if "lora" in n} == {"weight"}
    for layer in layers(model).values():
        weight = layer.get_base_layer().weight
        B, A = factors(weight.T if layer.fan_in_fan_out else weight, 4)
        assert torch.equal(layer.lora_A["default"].weight, A) and torch.equal(layer.lora_B["default"].B, B)


def test_the_average_of_fed_sb_is_the_average_of_its_changes():
    """Exact aggregation at r^2 values a layer, whatever the clients' cores."""
    deltas, flats = [], []
    for seed in (1, 2, 3):
        model = tuned("fed_sb", load("bert"), r=4).model
        flats.append(shake(model, seed))
        deltas.append({n: m.get_delta_weight("default").detach() for n, m in layers(model).items()})
    model = tuned("fed_sb", load("bert"), r=4).model
    write_flat(model, np.mean(flats, axis=0, dtype=np.float64).astype(np.float32))
    for name, layer in layers(model).items():
        assert torch.allclose(layer.get_delta_weight("default"), sum(d[name] for d in deltas) / 3, atol=1e-6)


def test_fed_sb_is_saved_as_a_plain_lora_of_the_same_scale(tmp_path):
    found = tuned("fed_sb", load("bert"), r=4, lora_alpha=6.0)
    shake(found.model)
    found.save(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 4, 6.0)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition("lora_")[2] for key in state if "lora" in key} == {"A.weight", "B.weight"}
    before = read_flat(found.model)
    found.save(tmp_path / "again")
    assert np.array_equal(read_flat(found.model), before), "saving changes nothing"


@pytest.mark.parametrize(
    ("name", "options"), [("federa", {"r": 4}), ("pissa", {"r": 4}), ("federa", {"r": 4, "svd_iterations": 16})]
)
def test_an_svd_start_holds_the_largest_directions_and_leaves_the_rest_frozen(name, options):
    model = tuned(name, load("bert"), **options).model
    originals = dict(base("bert").named_modules())
    for path, layer in layers(model).items():
        original = originals[path.removeprefix("base_model.model.")].weight.detach()
        start = layer.get_delta_weight("default").detach()
        rest = layer.get_base_layer().weight.detach()
        assert torch.allclose(rest + start, original, atol=1e-5)
        U, S, V = torch.linalg.svd(original)
        if "svd_iterations" in options:  # a randomised decomposition comes near
            assert 0.9 < float(start.square().sum() / S[:4].square().sum()) < 1.001
            continue
        assert torch.allclose(start, U[:, :4] * S[:4] @ V[:4], atol=1e-3)
        assert not layer.get_base_layer().weight.requires_grad


def test_an_svd_start_is_saved_for_the_original_base_at_twice_the_rank(tmp_path):
    for name, options in {
        "federa": {"r": 4, "lora_alpha": 6.0},
        "pissa": {"r": 4, "lora_alpha": 6.0, "use_rslora": True},
        "lora": {"r": 4, "init_lora_weights": "olora"},
        "ffa_lora": {"r": 4, "init_lora_weights": "pissa"},
    }.items():
        from peft import PeftModel

        found = tuned(name, load("bert"), **options)
        shake(found.model)
        wanted = logits(found.model, "bert")
        found.save(tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 8
        from privfed.tuning.adapters import quiet

        with quiet():
            model = PeftModel.from_pretrained(base("bert"), str(tmp_path / name))
        assert torch.allclose(logits(model, "bert"), wanted, atol=1e-5), name


def test_what_ffa_lora_trains_of_an_svd_start_is_b_alone():
    names = layout_of(tuned("ffa_lora", load("bert"), init_lora_weights="pissa").model).names
    assert not any(".lora_A." in n for n in names) and any(".lora_B." in n for n in names)
