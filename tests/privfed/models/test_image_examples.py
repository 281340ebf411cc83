"""Images as tensors: they meet what the model's own processor makes of them, one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from privfed.errors import ModelError
from privfed.federation.sentinels import check_gradients, probe_examples
from privfed.models import ModelConfig
from privfed.models.examples import head_features
from privfed.models.image_examples import ImageExamples, ImageFormat, check_channels, image_format, to_pixel_values
from privfed.models.loading import LoadedModel, load_model
from privfed.models.prefix import attach, find_prefix
from privfed.tuning import TUNINGS, TunedModel

LABELS = ("one", "two", "three")
RGB = ImageFormat(height=9, width=9, channels=3, scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GREY = ImageFormat(height=9, width=9, channels=1, scale=1.0, mean=(0.0,), std=(1.0,))


def pictures(count: int, *shape: int, seed: int = 0) -> list[np.ndarray]:
    """Return smooth random images: resizing noise is all edges."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, shape[2]), dtype=np.uint8)
    size = (shape[1], shape[0])
    planes = [
        [np.asarray(Image.fromarray(image[..., c]).resize(size, Image.Resampling.BICUBIC)) for c in range(shape[2])]
        for image in coarse
    ]
    return [np.stack(image, axis=2) for image in planes]


def load(folder: Path) -> LoadedModel:
    config = ModelConfig(name=str(folder), task="image_classification", device="cpu")
    return load_model(config, label_names=LABELS, seed=1)


def examples(loaded: LoadedModel, count: int = 7) -> ImageExamples:
    form = image_format(loaded.model.config, loaded.processor.to_dict())
    return ImageExamples(pictures(count, 8, 8, 1), np.arange(count) % 3, form)


def tuned(loaded: LoadedModel, name: str, **options: Any) -> TunedModel:
    tuning = TUNINGS.get(name)
    return tuning.apply(loaded, tuning.config(**options), 3)


@pytest.mark.parametrize("shape", [(9, 9, 3), (20, 31, 3), (5, 9, 3)])
def test_pixels_are_those_of_the_models_own_processor(shape: tuple[int, int, int]) -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 9, "width": 9}, image_mean=list(RGB.mean), image_std=list(RGB.std))
    images = pictures(5, *shape)
    wanted = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    found = to_pixel_values(images, image_format(type("Config", (), {"image_size": 9}), processor.to_dict()))
    # Pillow rounds to whole grey levels when it resizes, twice (rows, then columns); torch does not
    step = 0.0 if shape[:2] == (9, 9) else 1.6 / 255 / min(RGB.std)
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=step + 1e-6, rtol=0)
    assert not torch.allclose(found, wanted.flip(3), atol=0.3)


def test_channels_become_the_models() -> None:
    colour = pictures(3, 9, 9, 3)
    grey = to_pixel_values(colour, GREY)
    wanted = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    assert np.abs(grey[:, 0].numpy() - wanted).max() <= 1.0
    assert torch.equal(to_pixel_values([image[..., :1] for image in colour], RGB)[:, 0] * 0.2 + 0.5,
                       to_pixel_values(colour, RGB)[:, 0] * 0.2 + 0.5)  # fmt: skip
    alpha = [np.concatenate([image, np.full((9, 9, 1), 7, np.uint8)], axis=2) for image in colour]
    assert torch.equal(to_pixel_values(alpha, RGB), to_pixel_values(colour, RGB))
    assert torch.equal(to_pixel_values([image[..., [0, 3]] for image in alpha], GREY)[:, 0],
                       torch.from_numpy(np.stack(colour)[..., 0]).float())  # fmt: skip
    with pytest.raises(ModelError, match="The images have 3 channels and the model takes 4"):
        check_channels(3, 4)


def test_an_image_does_not_depend_on_its_batch() -> None:
    mixed = [*pictures(2, 9, 9, 3), *pictures(2, 14, 6, 3), *pictures(1, 9, 9, 1)]
    together = to_pixel_values(mixed, RGB)
    for row, image in enumerate(mixed):
        assert torch.equal(to_pixel_values([image], RGB)[0], together[row])


def test_the_format_is_read_from_config_and_processor() -> None:
    model = type("Config", (), {"image_size": [6, 4], "num_channels": 1, "patch_size": 2})
    form = image_format(model, {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
    assert (form.height, form.width, form.channels, form.tokens) == (6, 4, 1, 7)
    assert (form.mean, form.std, form.scale) == ((0.5,), (0.25,), 1 / 255)
    bare = type("Config", (), {})
    assert image_format(bare, {"size": {"shortest_edge": 12}}).height == 12
    assert image_format(bare, {"size": {"shortest_edge": 12}, "crop_size": {"height": 8, "width": 10}}).width == 10
    raw = image_format(model, {"do_normalize": False, "do_rescale": False})
    assert (raw.mean, raw.std, raw.scale) == ((0.0,), (1.0,), 1.0)
    with pytest.raises(ModelError, match="tells no image size"):
        image_format(bare, {})
    with pytest.raises(ModelError, match="do not give one number"):
        image_format(model, {"image_mean": [0.1, 0.2, 0.3], "image_std": 1.0})
    with pytest.raises(ModelError, match="std above 0"):
        image_format(model, {"image_std": 0.0})


def test_a_probe_holds_nothing_of_the_images(tiny_vit: Path) -> None:
    form = examples(load(tiny_vit)).form
    probes = [
        ImageExamples(pictures(5, 8, 8, 1, seed=seed), np.zeros(5, dtype=np.int64), form).probe(3) for seed in (1, 2)
    ]
    batches = [probe.batch(np.arange(len(probe))) for probe in probes]
    assert torch.equal(batches[0].inputs["pixel_values"], batches[1].inputs["pixel_values"])
    assert batches[0].labels_B is not None
    assert batches[0].labels_B.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["ffa_lora", "lora", "bitfit", "head"])
def test_per_example_gradients_are_exact(tiny_vit: Path, name: str) -> None:
    loaded = load(tiny_vit)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"]} if "lora" in name else {}
    model = tuned(loaded, name, **options).model
    sentence, _ = check_gradients(model, probe_examples(examples(loaded), 3), private=True)
    assert "equal autograd's" in sentence


def test_the_head_gets_one_vector_an_image(tiny_vit: Path) -> None:
    loaded = load(tiny_vit)
    data = examples(loaded)
    head: Any = loaded.model.classifier
    features = head_features(loaded.model, head, data)
    assert features is not None
    rows = np.arange(len(data))
    assert (len(features), features.width) == (7, 16)
    assert torch.allclose(features.logits(head, features.batch(rows)), data.logits(loaded.model, data.batch(rows)))


def test_frozen_first_blocks_run_once(tiny_vit: Path) -> None:
    loaded = load(tiny_vit)
    data = examples(loaded)
    model = tuned(loaded, "ffa_lora", r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    rows = np.arange(len(data))
    with torch.no_grad():
        whole = data.logits(model.model.eval(), data.batch(rows))
    prefix = find_prefix(model.model, model.head)
    assert prefix is not None
    assert prefix.depth == 1
    assert attach(model.model, prefix, data)
    batch = data.batch(rows)
    assert batch.states_BSH is not None
    assert batch.states_BSH.shape == (7, 5, 16)
    with torch.no_grad():
        assert torch.allclose(data.logits(model.model, batch), whole, atol=1e-5)


@pytest.mark.parametrize("old", [3, 4])
def test_the_head_is_new_whatever_the_checkpoint_had(tiny_vit: Path, tmp_path: Path, old: int) -> None:
    from transformers import AutoModelForImageClassification

    folder = shutil.copytree(tiny_vit, tmp_path / "classifier")
    before = AutoModelForImageClassification.from_pretrained(tiny_vit, num_labels=old)
    torch.nn.init.constant_(before.classifier.bias, 5.0)
    before.save_pretrained(folder)
    found: Any = load(folder).model
    assert found.classifier.weight.shape == (3, 16)
    assert not found.classifier.bias.any()
    assert 0 < float(found.classifier.weight.detach().std()) < 0.5
    again: Any = load(folder).model
    assert torch.equal(found.classifier.weight, again.classifier.weight)
    for name, tensor in before.vit.state_dict().items():
        assert torch.equal(found.vit.state_dict()[name], tensor)


def test_weights_that_do_not_fit_the_config_are_refused(tiny_vit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_vit, tmp_path / "other")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "image_size": 16}))
    with pytest.raises(ModelError, match=r"do not fit its config\.json: vit\.embeddings\.position_embeddings"):
        load(folder)
