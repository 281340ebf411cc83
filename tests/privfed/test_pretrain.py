"""``privfed pretrain``: a plain transformers folder from public images, equal for equal seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from privfed.cli import main
from privfed.config import parse_config
from privfed.errors import ConfigError, DataError, UnknownNameError
from privfed.models.recipes import RECIPES
from privfed.pretrain import PUBLIC, pretrain

SMALL = ["hidden_size=16", "layers=2", "heads=2", "epochs=1", "batch_size=32"]


def run(name: str, out: Path, *settings: str) -> dict[str, Any]:
    return pretrain(name, [*SMALL, *settings], out=out, say=lambda _line: None)


def test_the_folder_is_plain_transformers_and_says_what_it_was_made_of(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    said: list[str] = []
    found = pretrain("digits_vit", SMALL, out=tmp_path / "vit", say=said.append)
    record = json.loads((tmp_path / "vit" / "pretraining.json").read_text())
    assert {**record, "folder": str(tmp_path / "vit")} == found
    assert record["data"]["classes"] == ["0", "1", "2", "3", "4"]
    assert record["images"] + record["held_out_images"] == 901  # of 1,797
    assert said[0] == record["data"]["public"] == PUBLIC
    assert "not charged" in PUBLIC
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit", num_labels=7)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    inputs = processor(np.zeros((30, 20, 1), dtype=np.uint8), return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 7)


def test_equal_seeds_give_equal_weights_and_others_do_not(tmp_path: Path) -> None:
    weights: dict[str, Any] = {}
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(weights))  # the recipe's seed alone counts
        run("digits_vit", tmp_path / place, f"seed={seed}")
        weights[place] = load_file(tmp_path / place / "model.safetensors")
    for key, tensor in weights["a"].items():
        assert np.array_equal(weights["b"][key], tensor), key
    assert any(not np.array_equal(weights["c"][key], tensor) for key, tensor in weights["a"].items())


def test_training_learns_its_classes(tmp_path: Path) -> None:
    untrained = run("digits_vit", tmp_path / "a", "hidden_size=32", "epochs=1", "learning_rate=1e-9")
    trained = run(
        "digits_vit", tmp_path / "b", "hidden_size=32", "epochs=12", "learning_rate=0.003", "reconstruction=1"
    )
    assert untrained["held_out_accuracy"] < 0.45
    assert trained["held_out_accuracy"] > 0.6


def test_another_public_source_and_size(image_file: Path, tmp_path: Path) -> None:
    settings = [f"data.path={image_file}", "image_size=12", "patch_size=3", "shift=0", "reconstruction=0"]
    found = run("small_vit", tmp_path / "vit", *settings)
    assert found["data"]["classes"] == ["above", "below"]
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["image_size"] == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["hiden_size=3"], r"Unknown key 'hiden_size'\. Did you mean 'hidden_size'"),
        (["data.clases=[1]"], r"Unknown key 'data\.clases'\. Did you mean 'classes'"),
        (["patch_size=3"], "patch_size = 3 with image_size = 8: expected a smaller size that divides it"),
        (["heads=3"], "heads = 3 with hidden_size = 16: expected a divisor"),
        (["shift=8"], "shift = 8 moves whole images"),
        (["epochs=0"], "epochs = 0: Input should be greater than or equal to 1"),
        (["batch_size=4096"], "images are fewer than batch_size = 4096"),
        (["data.name=pydoc", "data.classes=unset"], "'pydoc' holds no images"),
    ],
)
def test_what_cannot_hold_is_one_sentence(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        run("digits_vit", tmp_path / "vit", *settings)
    assert not list(tmp_path.iterdir())


def test_names_and_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'digits_vit'"):
        run("digit_vit", tmp_path / "vit")
    with pytest.raises(ConfigError, match=r"small_vit' has no data of its own: name public images"):
        run("small_vit", tmp_path / "vit")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already there and not an empty folder"):
        run("digits_vit", kept)
    assert (kept / "thesis.txt").read_text() == "mine"


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    options = [part for setting in SMALL for part in ("-s", setting)]
    done = runner.invoke(main, ["pretrain", "digits_vit", *options, "-o", str(tmp_path / "vit"), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["recipe"] == "digits_vit"
    assert PUBLIC in done.stderr
    assert "recipes:" in runner.invoke(main, ["ls", "recipes"]).stdout
    assert runner.invoke(main, ["pretrain", "nothing", "-o", str(tmp_path / "x")]).exit_code == 2


@pytest.mark.parametrize("name", RECIPES.names())
def test_every_recipe_has_a_seed_and_a_page_of_documentation(name: str) -> None:
    recipe = RECIPES.get(name)
    assert "seed" in recipe.config.model_fields
    assert recipe.train.__module__ == f"privfed.models.recipes.{name}"


def test_the_model_fits_a_run(tmp_path: Path, image_file: Path) -> None:
    run("digits_vit", tmp_path / "vit")
    raw = {"model": {"name": str(tmp_path / "vit"), "task": "image_classification"}, "data": {"path": str(image_file)}}
    assert parse_config(raw, where="test").model.task == "image_classification"
