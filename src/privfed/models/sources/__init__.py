"""Where weights come from: built-in names (one file each), local folders, the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from privfed import objects
from privfed.errors import ModelError
from privfed.models.config import ModelConfig
from privfed.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where to load a model from.

    Attributes:
        location: A folder, or a hub name.
        local: True where ``location`` is a folder on this machine.
        origin: One sentence for people: what the weights are and where they come from.
        public_name: What an adapter calls its base model; a path of this machine would tell more than it helps.
    """

    location: str
    local: bool
    origin: str
    public_name: str


MODELS: Registry[Callable[[], ModelSource]] = Registry("model", "privfed.models.sources")


def resolve(config: ModelConfig) -> ModelSource:
    """Return where the model called ``config.name`` is, without loading it.

    A built-in name wins over a folder of the same name; write ``./name`` for the folder.

    Raises:
        ModelError: If a named folder does not hold a model that can be loaded without pickles, or an object that was
            handed over is not here.
    """
    if objects.is_object(config.name):
        return _handed(config.name)
    if config.name in MODELS.names():
        return MODELS.get(config.name)()
    folder = Path(config.name)
    if folder.is_dir():
        _check_folder(folder)
        return ModelSource(
            location=str(folder), local=True, origin=f"the local folder {folder}", public_name=folder.resolve().name
        )
    if config.name.startswith((".", "/")):
        raise ModelError(f"There is no model folder {config.name!r}: pass a folder with config.json and *.safetensors.")
    return ModelSource(
        location=config.name, local=False, origin=f"{config.name} on the Hugging Face hub", public_name=config.name
    )


def _handed(name: str) -> ModelSource:
    source: ModelSource | None = objects.find(name)
    if source is None:
        raise ModelError(
            f"model.name = {objects.short(name)!r}... stands for a model that Python code handed over, and it is not "
            "here: pass the same model= and tokenizer= (or processor=) to privfed.train or privfed.load_run, or set "
            "model.name to a folder."
        )
    return source


def check_sha256(path: Path, expected: str) -> None:
    """Refuse weights that are not the ones this release was tested with.

    Raises:
        ModelError: If the file's SHA-256 is another.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{path} has SHA-256 {found}, expected {expected}: reinstall the package that carries it.")


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"The folder {folder} has no config.json: pass a folder that transformers' save_pretrained wrote."
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"The folder {folder} has no *.safetensors: pickled weights are never loaded; "
            "convert them with save_pretrained(safe_serialization=True)."
        )
