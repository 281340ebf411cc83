"""``privfed pretrain``: a small base model from public data, saved as a plain transformers folder.

The data are public by the caller's declaration: they are read whole, without noise, and charged to no budget.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from privfed import __version__
from privfed.config import apply_override
from privfed.data import DataConfig, load_dataset
from privfed.data.images import ImageDataset
from privfed.errors import ConfigError, DataError, nearest
from privfed.files import write_atomic
from privfed.models.recipes import RECIPES, Pretrained, PublicImages, Recipe, Say
from privfed.table import Table

PUBLIC = (
    "The pretraining data are public by declaration: they are not charged to any budget, and the model may reveal "
    "them. Never pretrain on private data."
)


def pretrain(name: str, settings: Sequence[str], *, out: Path, say: Say) -> dict[str, Any]:
    """Train the recipe called ``name`` and save the model to the folder ``out``.

    Args:
        name: A registered recipe.
        settings: ``key=value`` overrides of its options, and of its data by ``data.key=value``.
        out: The folder to make; it must not hold anything yet.
        say: Told how it goes.

    Returns:
        What ``pretraining.json`` in the folder holds, and the folder.

    Raises:
        UnknownNameError: If there is no such recipe.
        ConfigError: If an option or the folder cannot hold.
        DataError: If the data cannot be used.
        ModelError: If the data do not fit the model.
    """
    recipe = RECIPES.get(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is already there and not an empty folder: pass another one with -o.")
    options, table = _tables(name, recipe, settings)
    say(PUBLIC)
    dataset = load_dataset(table, seed=getattr(options, "seed", 0), task="image_classification")
    if not isinstance(dataset, ImageDataset):
        raise DataError(f"The recipe {name!r} pretrains on images, and {dataset.name!r} holds none.")
    say(f"Pretraining {name} on {len(dataset.train)} public images of {len(dataset.label_names)} classes")
    trained = recipe.train(_public(dataset), options, say)
    record = {
        "recipe": name,
        "options": options.model_dump(mode="json"),
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "classes": list(dataset.label_names),
            "digest": dataset.digest,
            "public": PUBLIC,
        },
        **trained.facts,
        "privfed": __version__,
    }
    _save(trained, record, out)
    return {"folder": str(out), **record}


def _tables(name: str, recipe: Recipe, settings: Sequence[str]) -> tuple[Table, DataConfig]:
    raw: dict[str, Any] = {"data": dict(recipe.data)}
    for setting in settings:
        apply_override(raw, setting)
    data = raw.pop("data")
    if not data.keys() & {"name", "path"}:
        raise ConfigError(
            f"The recipe {name!r} has no data of its own: name public images, e.g. "
            "-s data.path=images.safetensors or -s data.name=digits."
        )
    options = _validated(recipe.config, raw, name, "")
    return options, DataConfig.model_validate(_validated(DataConfig, data, name, "data.").model_dump())


def _validated(config: type[Table], raw: Mapping[str, Any], name: str, prefix: str) -> Table:
    try:
        return config.model_validate(dict(raw))
    except ValidationError as error:
        sentences = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                sentences.append(f"Unknown key {prefix + key!r}.{nearest(key, config.model_fields)}")
            else:
                told = f"{prefix}{key} = {problem['input']!r}: " if key else ""
                sentences.append(f"{told}{problem['msg'].removeprefix('Value error, ')}.")
        raise ConfigError(f"{name}: " + " ".join(sentences)) from error


def _public(dataset: ImageDataset) -> PublicImages:
    return PublicImages(
        images=dataset.train.images,
        labels=dataset.train.labels,
        test_images=dataset.test.images,
        test_labels=dataset.test.labels,
        classes=len(dataset.label_names),
    )


def _save(trained: Pretrained, record: Mapping[str, Any], out: Path) -> None:
    """Write the folder so that it is there whole or not at all."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        trained.save(temporary)
        for file, content in (("preprocessor_config.json", trained.preprocessor), ("pretraining.json", record)):
            write_atomic(temporary / file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(f"The folder {out} cannot be written ({error}): pass another one with -o.") from error
