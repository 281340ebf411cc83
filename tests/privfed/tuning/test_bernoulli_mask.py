"""Random masks over fixed values: what is drawn, what the scores learn, what is saved.

Shape suffix: D scores.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_bases import base, load, logits, shake, tuned

from privfed.run import train
from privfed.tuning.bernoulli_mask import _masked, drawn
from privfed.tuning.layout import layout_of, trained

DRAWS = 3000


def frequencies(scores, change=1.0):
    """Return how often each place is drawn, over many scores that all but agree."""
    draw = torch.Generator().manual_seed(1)
    found = torch.zeros_like(scores)
    for _ in range(DRAWS):
        found += drawn(scores * change + 1e-4 * torch.randn(scores.shape, generator=draw), 7)
    return found / DRAWS


def z_scores(found, scores):
    chances = torch.sigmoid(scores)
    return (found - chances) / torch.sqrt(chances * (1 - chances) / DRAWS)


def test_each_place_is_drawn_with_the_chance_of_its_score():
    scores = torch.linspace(-3, 3, 400).reshape(20, 20)
    z = z_scores(frequencies(scores), scores)
    assert float(z.abs().max()) < 5 and 0.85 < float(z.std()) < 1.15
    assert float(z_scores(frequencies(scores, 1.2), scores).abs().max()) > 5  # other chances are told apart


def test_places_and_neighbouring_scores_are_drawn_independently():
    scores = torch.zeros(64, 64)
    mask = drawn(scores, 7)
    signs = 2 * mask - 1
    for other in (
        drawn(scores, 8),
        drawn(scores + torch.eye(64) * 1e-7, 7),
        signs.roll(1, 0),
        signs.roll(1, 1),
        mask.T,
    ):
        agreement = float(((2 * (other > 0).float() - 1) * signs).mean())
        assert abs(agreement) < 5 / 64
    moved = scores.clone()
    moved[3, 5] = 1e-30  # the least change of one score draws all places anew
    assert abs(float((2 * drawn(moved, 7) - 1).mul(signs).mean())) < 5 / 64
    assert torch.equal(drawn(scores, 7), mask)


def test_the_gradient_goes_straight_through_the_draw():
    torch.manual_seed(0)
    layer = _masked(torch.zeros(5, 4), 0.3, 2)
    with torch.no_grad():
        layer.scores.normal_()
    x, weight = torch.randn(6, 4), torch.randn(6, 5)
    (layer(x) * weight).sum().backward()
    chances = torch.sigmoid(layer.scores.detach())
    torch.testing.assert_close(layer.scores.grad, (weight.T @ x) * layer.B * chances * (1 - chances))
    assert torch.equal(layer.B.abs(), torch.full((5, 4), 0.3)) and len(layer.B.unique()) == 2
    torch.testing.assert_close(layer(x), x @ (layer.B * drawn(layer.scores, 2)).T)
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (layer.B * (layer.scores > 0)).T)


def test_training_finds_the_mask_that_made_the_data():
    torch.manual_seed(3)
    layer, wanted = _masked(torch.zeros(12, 8), 0.5, 4), torch.rand(12, 8) < 0.5
    optimizer = torch.optim.Adam([layer.scores], lr=0.1)
    assert 0.3 < float((wanted == (layer.scores > 0)).float().mean()) < 0.7
    for _ in range(300):
        x = torch.randn(64, 8)
        optimizer.zero_grad()
        (layer(x) - x @ (layer.B * wanted).T).square().mean().backward()
        optimizer.step()
    assert float((wanted == (layer.scores > 0)).float().mean()) > 0.97


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_scores_are_what_is_trained_and_the_start_is_the_base(family):
    found = tuned("bernoulli_mask", load(family), r=4)
    names = layout_of(found.model).names
    assert all(name.endswith(".scores") or name.startswith(str(found.head)) for name in names)
    assert any(name.endswith(".scores") for name in names)
    torch.testing.assert_close(logits(found.model, family), logits(base(family), family))
    before = [p.detach().clone() for n, p in found.model.named_parameters() if n.endswith(".B")]
    shake(found.model)
    after = [p for n, p in found.model.named_parameters() if n.endswith(".B")]
    assert before and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not {name for name, _ in trained(found.model) if ".lora_A." in name}


@pytest.mark.parametrize("unit", ["example", "none"])
def test_a_masked_run_leaves_an_adapter_of_masked_values(tiny_config, tmp_path, unit):
    """Whole: self-checks, two rounds, an adapter that plain peft loads as it was scored."""
    config = tiny_config(
        tuning={"name": "bernoulli_mask", "r": 4},
        compression={"name": "stochastic_quantizer", "bits": 12, "max_value": 4.0},
        client={"optimizer": "adamw", "learning_rate": 0.1, "head_learning_rate": 0.01},
        privacy={"unit": unit, "target_epsilon": None, "noise_multiplier": 1.0 if unit == "example" else None},
        ledger={"path": str(tmp_path / "holder.sqlite")},
    )
    result = train(config, out=tmp_path / "run")
    assert all(text.startswith("passed: ") for text in result.receipt["sentinels"].values())
    fields = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    from safetensors.numpy import load_file

    weights = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    sparse = [value for name, value in weights.items() if "lora_B" in name]
    assert sparse and not any("scores" in name for name in weights)
    assert all(set(np.unique(np.abs(value))) <= {np.float32(0.0), np.float32(0.1)} for value in sparse)
    assert any(value.any() for value in sparse)
