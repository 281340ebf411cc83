"""Attacks on pictures, on clients of a tiny vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privfed.errors import ConfigError
from privfed_attacks.inversion import ATTACKS, Setting
from privfed_attacks.observation import Observation, SideInformation, ThreatModel, split
from privfed_attacks.public_model import PublicModel, rebuild, write_tensors
from privfed_attacks.scoring import Batch, psnr, score_images, ssim
from privfed_attacks.sealed import Sealed

RATE = 0.1
MALICIOUS = ThreatModel(can_modify=frozenset({"broadcast"}))
Play = Callable[..., tuple[list[Observation], PublicModel, Sealed[Batch], Setting]]


@pytest.fixture(scope="module")
def pictures() -> Any:
    """Return 200 of scikit-learn's digits as the tiny model reads them [N, C, H, W]."""
    from sklearn.datasets import load_digits

    return ((load_digits().images[:200, None] / 16 - 0.4) / 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def wide_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random ViT whose states (32 values) are wider than its patches (16 pixels)."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
        num_channels=1,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("wide_vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4], image_std=[0.3])
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def play(tiny_model: Callable[[str], Path], wide_vit: Path, pictures: Any) -> Play:
    """Return ``play(tuning, attack=, threat=, noise=)``: one step on one picture, after the server's broadcast."""
    from privfed.models.config import ModelConfig
    from privfed.schedule import ClientConfig
    from privfed.tuning import TUNINGS
    from privfed.tuning.layout import layout_of, read_flat, trained

    def run(
        tuning: dict[str, Any],
        *,
        attack: str = "pixels",
        threat: ThreatModel = MALICIOUS,
        noise: float = 0.0,
        seed: int = 3,
    ) -> tuple[list[Observation], PublicModel, Sealed[Batch], Setting]:
        side = SideInformation(
            model=ModelConfig(
                name=str(wide_vit if tuning["name"] == "adapter" else tiny_model("vit")), task="image_classification"
            ),
            tuning=TUNINGS.get(tuning["name"]).config.model_validate(tuning),
            init_seed=5,
            client=ClientConfig(optimizer="sgd", learning_rate=RATE, batch_size=1, local_steps=1),
            label_names=("a", "b", "c"),
        )
        model, truth = rebuild(side), pictures[7:8]
        setting = Setting(sequences=1, images=pictures[20:], seed=seed)
        plugin = ATTACKS.get(attack)
        write_tensors(model.module, plugin.broadcast(threat, model, setting, plugin.config()))
        layout, before_D = layout_of(model.module), read_flat(model.module)
        loss = torch.nn.functional.cross_entropy(
            model.module(pixel_values=torch.tensor(truth)).logits, torch.tensor([1])
        )
        found = torch.autograd.grad(loss, [parameter for _, parameter in trained(model.module)])
        after_D = before_D - np.float32(RATE) * np.concatenate([g.flatten().numpy() for g in found])
        delta_D = after_D - before_D + noise * np.random.default_rng(0).standard_normal(len(before_D))
        seen = Observation(
            vantage="individual",
            phase="train",
            round=1,
            source="client",
            contributors=1,
            params=split(before_D, layout),
            payload=split(delta_D.astype(np.float32), layout),
            layout=layout,
            side=side,
        )
        return [seen], model, Sealed(Batch(images=truth, labels=(1,))), setting

    return run


def attacked(name: str, played: Any, **options: Any) -> tuple[Any, dict[str, float]]:
    """Return what an attack finds and its scores."""
    seen, model, truth, setting = played
    plugin = ATTACKS.get(name)
    guess = plugin.run(seen, model, setting, plugin.config.model_validate(options))
    return guess, score_images(guess, truth)


def test_pixels_match_the_gradient_and_not_the_prior(play: Play) -> None:
    played = play({"name": "full"})
    guess, scores = attacked("pixels", played, steps=250, starts=1)
    _, prior = attacked("prior_images", played)
    assert guess.labels == {1: 1}
    assert scores["psnr"] >= prior["psnr"] + 1
    assert scores["ssim"] >= prior["ssim"] + 0.1


def test_pixels_find_nothing_in_noise(play: Play) -> None:
    played = play({"name": "full"}, noise=0.05)
    _, scores = attacked("pixels", played, steps=250, starts=1)
    _, prior = attacked("prior_images", played)
    assert scores["psnr"] <= prior["psnr"] + 1


def test_bins_of_a_malicious_server_show_hidden_states_and_pictures(play: Play) -> None:
    from privfed_attacks.inversion.adapter_bins import _adapters, _read, _sorting, _states
    from privfed_attacks.sealed import unseal

    tuning = {"name": "adapter", "bottleneck": 64}
    rounds = [play(tuning, attack="adapter_bins", seed=seed) for seed in range(8)]
    _, model, truth, setting = rounds[0]
    seen = [each[0][0] for each in rounds]
    images = unseal(truth).images
    assert images is not None
    for each in seen:
        site = _sorting(each, _adapters(model))
        states_Kd, weights_K = _read(each, site)
        model.at(each)
        real_Sd = _states(model, site, images)[0]
        apart_KS = np.linalg.norm(states_Kd[:, None] - real_Sd, axis=2)
        spread = np.linalg.norm(real_Sd - real_Sd.mean(0), axis=1).mean()
        assert apart_KS[np.argmax(weights_K)].min() < 0.1 * spread  # the formula, for a token that is alone in its bin
    played = (seen, model, truth, setting)
    _, scores = attacked("adapter_bins", played, starts=2)
    _, prior = attacked("prior_images", played)
    assert scores["psnr"] >= max(25.0, prior["psnr"] + 10)
    assert scores["ssim"] > 0.9 > prior["ssim"]


def test_one_round_of_bins_under_noise_shows_nothing(play: Play) -> None:
    played = play({"name": "adapter", "bottleneck": 64}, attack="adapter_bins", noise=0.01)
    _, scores = attacked("adapter_bins", played, starts=1)
    _, prior = attacked("prior_images", played)
    assert scores["psnr"] <= prior["psnr"] + 1


def test_a_malicious_server_has_to_be_declared(play: Play) -> None:
    with pytest.raises(ConfigError, match="can_modify"):
        play({"name": "adapter"}, attack="adapter_bins", threat=ThreatModel())
    assert ATTACKS.get("adapter_bins").server == "malicious"
    assert ATTACKS.get("pixels").server == "curious"


def test_bins_say_what_they_need(play: Play) -> None:
    run, options = ATTACKS.get("adapter_bins").run, ATTACKS.get("adapter_bins").config()
    seen, model, _, setting = play({"name": "adapter"})
    with pytest.raises(ConfigError, match="followed the protocol"):
        run(seen, model, setting, options)
    with pytest.raises(ConfigError, match="number"):
        run(seen, model, replace(setting, sequences=None), options)
    seen, model, _, setting = play({"name": "bitfit"})
    with pytest.raises(ConfigError, match="tuning 'adapter'"):
        run(seen, model, setting, options)


def test_structural_similarity_of_pictures_of_one_value() -> None:
    """There variances are 0, and the formula has a closed form (Wang et al. 2004, equation 13)."""
    a, b = np.full((1, 16, 16), 0.25), np.full((1, 16, 16), 0.75)
    c1 = 0.01**2
    assert ssim(a, b, 1.0) == pytest.approx((2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1))
    assert psnr(a, b, 1.0) == pytest.approx(10 * np.log10(1 / 0.25))
