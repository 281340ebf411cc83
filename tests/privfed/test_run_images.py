"""A whole run on images: masked, private, with receipt, report and an adapter that plain peft loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from privfed.config import load_config
from privfed.data import load_dataset
from privfed.data.images import ImageDataset
from privfed.errors import ConfigError, DataError, ModelError
from privfed.run import train


@pytest.fixture
def image_config(tiny_config: Callable[..., Any], tiny_vit: Path, image_file: Path) -> Callable[..., Any]:
    """Return ``image_config(**tables)``: a run of seconds on ``tiny_vit`` and ``image_file``."""

    def build(**tables: Any) -> Any:
        base: dict[str, Any] = {
            "model": {"name": str(tiny_vit), "task": "image_classification"},
            "data": {"path": str(image_file), "client": None},
            "partition": {"name": "by_column"},
            "tuning": {"name": "ffa_lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
            "head_warm_start": {
                "name": "dp_probe",
                "rounds": 10,
                "learning_rate": 1.0,
                "server_optimizer": "adam",
                "server_learning_rate": 0.1,
                "sampling_probability": 1.0,
            },
        }
        for name, table in tables.items():
            base[name] = {**base.get(name, {}), **table}
        return tiny_config(**base)

    return build


def test_a_private_masked_run_on_images(image_config: Callable[..., Any], tiny_vit: Path, tmp_path: Path) -> None:
    config = image_config()
    result = train(config, out=tmp_path / "run")
    assert "per-example gradients equal autograd" in json.dumps(result.receipt)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for word in ("above", "below"):
        assert word in page
    said = re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)  # all but the configuration, which has every key
    for word in ("texts", "tokens"):
        assert word not in said
    assert json.loads((tmp_path / "run" / "adapter" / "label_names.json").read_text()) == ["above", "below"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] > 0.7  # two halves of an image, at epsilon 8: far from guessing one of two
    # Pillow rounds to whole grey levels where it resizes: an image at the border of two classes may fall otherwise
    plain = _with_plain_peft(tiny_vit, tmp_path / "run" / "adapter", config)
    assert plain == pytest.approx(lines[-1]["accuracy"], abs=0.03)


def _with_plain_peft(base: Path, adapter: Path, config: Any) -> float:
    """Return the accuracy that plain transformers and peft find with their own image processor."""
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    dataset = load_dataset(config.data, seed=config.seed, task="image_classification")
    assert isinstance(dataset, ImageDataset)
    split = dataset.test
    model = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(base, num_labels=2), str(adapter)
    ).eval()
    processor = AutoImageProcessor.from_pretrained(base)
    inputs = processor(list(split.images), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        found = model(**inputs).logits.argmax(dim=1).numpy()
    return float((found == split.labels).mean())


def test_a_reproducible_run_repeats_to_the_bit(image_config: Callable[..., Any], tmp_path: Path) -> None:
    weights = []
    for place in ("a", "b"):
        train(image_config(model={"cache_frozen_gib": 0.0}), out=tmp_path / place)
        weights.append(load_file(tmp_path / place / "adapter" / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_text_model_and_a_text_file_are_refused(
    image_config: Callable[..., Any], tiny_bert: Path, text_csv: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"expected a \.safetensors file of images"):
        train(image_config(data={"path": str(text_csv)}), out=tmp_path / "text")
    with pytest.raises(ModelError, match="could not be loaded"):
        train(image_config(model={"name": str(tiny_bert)}), out=tmp_path / "bert")
    with pytest.raises(DataError, match="no tensor 'site'"):
        train(image_config(data={"client": "site"}), out=tmp_path / "site")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["digits", "pneumonia"])
def test_the_presets_hold(preset: str) -> None:
    config = load_config(preset)
    assert config.model.task == "image_classification"
    assert config.privacy.target_epsilon == 8.0
    assert config.secagg.name == "masked"
