"""What several runs need not do twice: parsed data, the loaded model, tokens, states of frozen blocks, features.

A run is handed a :class:`SharedWork`; the default, :data:`NOTHING`, keeps nothing. Every value is kept under a digest
of all that it is computed from, so a run finds the same bits as it would have made itself. A grid of runs hands one
object to all of them; processes with the same folder share what takes long to compute as well.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from privfed.data import AnySplit, Dataset, Split, load_dataset
from privfed.models.config import ModelConfig
from privfed.run_config import RunConfig

# imports of torch are left to where it is needed: what a run costs is asked without it
T = TypeVar("T")
MOST_KEPT = 4


class SharedWork:
    """Keeps results by the digest of what they are computed from.

    Args:
        folder: Where results that take long are kept for other processes; None keeps them in this process only.
        keep: How many results of each kind stay in memory; the one that was not used for longest goes first.
    """

    def __init__(self, folder: Path | None = None, *, keep: int = MOST_KEPT) -> None:
        self._folder = folder
        self._keep = keep
        self._kept: dict[str, OrderedDict[str, Any]] = {}
        self.made: dict[str, int] = {}
        self.found: dict[str, int] = {}

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self._keep > 0

    def once(self, kind: str, key: Callable[[], str], make: Callable[[], T], *, durable: bool = False) -> T:
        """Return what ``make`` makes: as it was made before under this key, else made now and kept.

        Args:
            kind: What it is; each kind has its own share of memory.
            key: Names all that the result is computed from; only asked where results are kept. The result must not
                be changed by whoever gets it.
            make: Computes it.
            durable: Whether to keep it in the folder too: for tensors, lists, tuples and None.
        """
        if not self.on:
            return make()
        name = hashlib.sha256(f"{_versions()}\x1f{key()}".encode()).hexdigest()[:32]
        kept = self._kept.setdefault(kind, OrderedDict())
        if name in kept:
            self.found[kind] = self.found.get(kind, 0) + 1
        else:
            path = None if self._folder is None or not durable else self._folder / f"{kind}-{name}.pt"
            kept[name] = self._loaded(kind, path, make)
        kept.move_to_end(name)
        while len(kept) > self._keep:
            kept.popitem(last=False)
        found: T = kept[name]
        return found

    def _loaded(self, kind: str, path: Path | None, make: Callable[[], Any]) -> Any:
        if path is not None and (stored := _read(path)) is not None:
            self.found[kind] = self.found.get(kind, 0) + 1
            return stored[0]
        value = make()
        self.made[kind] = self.made.get(kind, 0) + 1
        if path is not None:
            _write(path, value)
        return value

    def dataset(self, config: RunConfig) -> Dataset:
        """Return the run's data set, as :func:`privfed.data.load_dataset` does."""
        data, task = config.data, config.model.task

        def key() -> str:
            files = [Path(path) for path in (data.path, data.test_path) if path is not None]
            stamps = [(str(p.resolve()), p.stat().st_mtime_ns, p.stat().st_size) if p.exists() else () for p in files]
            drawn = None if data.limit is None else config.seed  # the seed draws the rows of a limit, nothing else
            return json.dumps([data.model_dump(mode="json"), drawn, task, stamps])

        return self.once("data", key, lambda: load_dataset(data, seed=config.seed, task=task))

    def model(self, config: ModelConfig, label_names: tuple[str, ...], seed: int) -> Any:
        """Return a fresh copy of the loaded model, as :func:`privfed.models.loading.load_model` does."""
        from privfed.models.loading import load_model

        def make() -> Any:
            return load_model(config, label_names=label_names, seed=seed)

        if not self.on or config.quantization != "none":
            return make()
        key = json.dumps([config.model_dump(mode="json"), label_names, seed])
        loaded = self.once("model", lambda: key, make)
        return replace(loaded, model=copy.deepcopy(loaded.model))

    def examples(self, split: AnySplit, kind: str, loaded: Any, config: ModelConfig) -> Any:
        """Return the split as examples for this model, as :func:`privfed.models.tasks.build_examples` does."""
        from privfed.models.tasks import build_examples

        content = _split_digest(split) if self.on else None
        if content is None:
            return build_examples(split, kind, loaded, config)
        key = json.dumps([content, kind, config.name, config.revision, config.max_length, config.autocast])
        found = self.once("examples", lambda: key, lambda: build_examples(split, kind, loaded, config))
        return copy.copy(found)  # a run sets the states that its forward passes start from

    def states(self, prefix: Any, module: Any, examples: Any, head: str | None) -> Any:
        """Return the states of frozen blocks, as ``FrozenPrefix.compute`` does."""

        def key() -> str:
            return f"{tensors_digest(module, prefix.read(module, head))} {prefix.depth} {examples_digest(examples)}"

        return self.once("states", key, lambda: prefix.compute(module, examples), durable=True)

    def features(self, module: Any, head_name: str, examples: Any) -> Any:
        """Return the inputs of a head for every example, as :func:`privfed.models.examples.head_features` does."""
        from privfed.models.examples import FeatureExamples, head_features

        def make() -> Any:
            found = head_features(module, module.get_submodule(head_name), examples)
            return None if found is None else found.features_NF

        def key() -> str:
            body = (tensor for name, tensor in module.state_dict().items() if not name.startswith(f"{head_name}."))
            depth = examples.prefix_depth
            return f"{tensors_digest(module, body)} {examples_digest(examples)} {depth} {examples.autocast}"

        features_NF = self.once("features", key, make, durable=True)
        return None if features_NF is None else FeatureExamples(features_NF, examples.labels)


NOTHING = SharedWork(keep=0)


def tensors_digest(module: Any, tensors: Iterable[Any]) -> str:
    """Return the SHA-256 of a model's shape and of these tensors of it, in order."""
    config: Any = getattr(module, "config", None)
    described = config.to_json_string() if hasattr(config, "to_json_string") else repr(config)
    state = hashlib.sha256(described.encode())
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        state.update(f"{array.dtype}{tuple(array.shape)}".encode())
        state.update(array.view(_byte_type()).numpy() if array.dim() else array.numpy().tobytes())
    return state.hexdigest()


def examples_digest(examples: Any) -> str:
    """Return the SHA-256 of the inputs of all examples; labels change nothing that is computed from frozen parts."""
    import numpy as np

    state = hashlib.sha256(examples.lengths.tobytes())
    for start in range(0, len(examples), 256):
        inputs = examples.unprefixed(np.arange(start, min(start + 256, len(examples)))).inputs
        for key in sorted(inputs):
            state.update(key.encode())
            state.update(inputs[key].numpy().tobytes())
    return state.hexdigest()


def _split_digest(split: AnySplit) -> str | None:
    """Return the SHA-256 of a text split's content; None for another kind, whose records are not small."""
    if not isinstance(split, Split):
        return None
    state = hashlib.sha256(json.dumps([split.texts, {k: list(v) for k, v in split.parts.items()}]).encode())
    state.update(b"" if split.labels is None else split.labels.tobytes())
    return state.hexdigest()


def _byte_type() -> Any:
    import torch

    return torch.uint8


def _versions() -> str:
    from importlib import metadata

    return " ".join(metadata.version(name) for name in ("torch", "transformers", "peft"))


def _read(path: Path) -> tuple[Any] | None:
    """Return (value,) of a file, or None where there is none that can be read: it is computed again then."""
    import torch

    if not path.exists():
        return None
    try:
        return (torch.load(path, weights_only=True),)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None


def _write(path: Path, value: Any) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(value, temporary)
    temporary.replace(path)
