"""What the benchmarks that train many cells share: work on the frozen model, files of data, finished rows, intervals.

A cell is one run of ``privfed train``. What does not depend on the cell (the parsed data, the tokens, the states of
frozen blocks, the features of the frozen model) is made once and handed out again, bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# 97.5 % points of Student's t by degrees of freedom
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_MOST_KEPT = 16
_kept: OrderedDict[str, Any] = OrderedDict()


def read_rows(store: Path) -> list[dict[str, Any]]:
    """Return the finished cells of a store."""
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def append_row(store: Path, row: dict[str, Any]) -> None:
    """Add a finished cell to a store; what is there stays whatever happens next."""
    with store.open("a") as file:
        file.write(json.dumps(row) + "\n")


def find_file(folder: Path, name: str) -> Path:
    """Return the file or folder called ``name`` in or below ``folder``.

    Raises:
        SystemExit: If it is not there.
    """
    found = sorted(folder.rglob(name))
    if not found:
        raise SystemExit(f"There is no {name} in or below {folder}: pass the folder that holds it as --data.")
    return found[0]


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return mean ± half of the 95 % t-interval over seeds, with the number of seeds in brackets."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (1)"
    half = T_QUANTILES[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f} ({len(values)})"


def share_frozen_work(folder: str) -> None:
    """Let the cells of this process, and of others with the same folder, share what does not depend on them."""
    import torch

    from privfed import run

    torch.set_num_threads(1)
    _share_states(Path(folder))
    _share_data()
    vars(run)["write_report"] = lambda folder: folder  # a page that nobody would open


def _once(folder: Path | None, name: str, make: Callable[[], Any]) -> Any:
    """Return what ``make`` makes: from memory, else from the folder, else made and kept in both."""
    import torch

    if name not in _kept:
        path = None if folder is None else folder / f"{name}.pt"
        if path is not None and path.exists():
            _kept[name] = torch.load(path, weights_only=False)
        else:
            _kept[name] = make()
            if path is not None:
                torch.save(_kept[name], path.with_suffix(f".{os.getpid()}"))
                path.with_suffix(f".{os.getpid()}").replace(path)
    _kept.move_to_end(name)
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return _kept[name]


def _share_states(folder: Path) -> None:
    """States of frozen blocks and features of the frozen model: functions of the base model and the records alone."""
    from privfed.federation import workbench
    from privfed.models import prefix
    from privfed.models.examples import FeatureExamples, head_features

    compute, features = prefix.FrozenPrefix.compute, head_features

    def shared_states(self: Any, module: Any, examples: Any, size: int = 64) -> Any:
        name = f"prefix-{self.depth}-{_digest(module, examples)}"
        return _once(folder, name, lambda: compute(self, module, examples, size))

    def shared_features(module: Any, head: Any, examples: Any, size: int = 64) -> Any:
        if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
            return features(module, head, examples, size)  # a fresh prompt changes what the frozen model says

        def make() -> Any:
            found = features(module, head, examples, size)
            return found and (found._features, found.labels)

        tensors = _once(folder, f"features-{_digest(module, examples)}", make)
        return tensors and FeatureExamples(*tensors)

    prefix.FrozenPrefix.compute = shared_states  # type: ignore[method-assign]
    vars(workbench)["head_features"] = shared_features


def _share_data() -> None:
    """Parsed data sets and tokens, in this process."""
    from privfed.data import load_dataset
    from privfed.federation import material, workbench
    from privfed.models.tasks import build_examples

    load, build = load_dataset, build_examples

    def shared_load(config: Any, *, seed: int, task: Any) -> Any:
        drawn = seed if config.limit is not None else 0
        return _once(
            None, f"data-{config.model_dump_json()}-{drawn}-{task}", lambda: load(config, seed=seed, task=task)
        )

    def shared_build(split: Any, kind: str, loaded: Any, config: Any) -> Any:
        name = f"examples-{config.name}-{config.max_length}-{config.autocast}-{id(split)}"
        # the split is kept beside its examples: its id is then no other's
        found = _once(None, name, lambda: (split, build(split, kind, loaded, config)))
        return copy.copy(found[1])  # a run sets the states that its forward passes start from

    vars(material)["load_dataset"] = shared_load
    vars(workbench)["build_examples"] = shared_build


def _digest(module: Any, examples: Any) -> str:
    """Return what names (base model, examples): the first and the last of them stand for all."""
    import numpy as np

    state = hashlib.sha256(str(getattr(module.config, "_name_or_path", "")).encode() + examples.lengths.tobytes())
    count = len(examples)
    rows = np.unique(np.concatenate([np.arange(min(64, count)), np.arange(max(0, count - 64), count)]))
    inputs = examples.unprefixed(rows).inputs
    for key in sorted(inputs):
        state.update(key.encode() + inputs[key].numpy().tobytes())
    return state.hexdigest()[:16]
