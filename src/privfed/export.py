"""``privfed export``: a run's result for use elsewhere, as an adapter or merged into a whole model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfed.config import RunConfig, parse_config
from privfed.errors import ConfigError, ModelError
from privfed.rules import RULES
from privfed.tuning import TUNINGS

if TYPE_CHECKING:
    from torch import nn

    from privfed.models.loading import LoadedModel

# largest difference of a logit that float32 sums in another order explain, as a share of the largest logit
TOLERANCE = 1e-4
LABELS = "label_names.json"


def export(run: Path, out: Path, *, merge: bool = False) -> dict[str, Any]:
    """Write what a run trained to a folder of its own.

    Args:
        run: A finished run's folder.
        out: The folder to write, new or empty.
        merge: Write the base model with the adapter merged in, in transformers' own format with its tokenizer,
            instead of the adapter; what was written is loaded and compared with the adapter on the base.

    Returns:
        ``{"folder", "merged", "tuning", "largest_difference"}``; the last is None where nothing was merged.

    Raises:
        ConfigError: If ``run`` holds no result, or ``out`` is not empty.
        ModelError: If the method cannot be merged, or merging would change the logits.
    """
    config = _config(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there and not an empty folder: pass another with -o.")
    name = str(getattr(config.tuning, "name", ""))
    difference = None
    if merge and RULES.get(config.server.rule).changes_base:
        _copy_whole(config, run / "adapter", out)
    elif merge:
        difference = _merged(name, run / "adapter", out)
    else:
        shutil.copytree(run / "adapter", out, dirs_exist_ok=True)
    return {"folder": str(out), "merged": merge, "tuning": name, "largest_difference": difference}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the result as text."""
    if found["largest_difference"] is None:
        return [f"{found['folder']} ({found['tuning']})"]
    return [f"{found['folder']} (merged; logits differ by at most {found['largest_difference']:.1e})"]


def load_trained(run: Path) -> LoadedModel:
    """Return what a run trained, in evaluation mode, with what makes its inputs.

    Raises:
        ConfigError: If ``run`` holds no result.
        ModelError: If its base model is not here.
    """
    import transformers

    from privfed.models.loading import load_model
    from privfed.models.tasks import TASKS

    config, adapter = _config(run), run / "adapter"
    loaded = load_model(config.model, label_names=_labels(adapter), seed=0)
    if RULES.get(config.server.rule).changes_base:
        model = getattr(transformers, TASKS[config.model.task].auto_class).from_pretrained(str(adapter))
        tuned: nn.Module = model.to(next(loaded.model.parameters()).device)
    else:
        tuned = TUNINGS.get(str(getattr(config.tuning, "name", ""))).load(loaded.model, adapter)
    return dataclasses.replace(loaded, model=tuned.eval())


def merged_model(name: str, tuned: nn.Module) -> nn.Module:
    """Return a tuned model as the plain base model with its weights changed.

    Args:
        name: The tuning's name, for messages.
        tuned: The base model with the adapter on it; it is taken apart.

    Raises:
        ModelError: If the method is more than a change of weights.
    """
    from privfed.tuning.adapters import quiet

    if name == "full":
        return tuned
    config = getattr(tuned, "peft_config", {}).get("default")
    unload = getattr(getattr(tuned, "base_model", None), "merge_and_unload", None)
    if config is None or config.is_prompt_learning or unload is None:
        raise _unmergeable(name, "it adds to the model, rather than changing its weights")
    try:
        with quiet():
            model: nn.Module = unload(safe_merge=True)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or ["peft has no merging for it"])[0].split(". ")[0].rstrip(".")
        raise _unmergeable(name, reason) from error
    _unwrap(model)
    return model


def _unwrap(model: nn.Module) -> None:
    """Put trained copies of whole modules in their places; peft's LN tuning leaves them wrapped."""
    from peft.utils import ModulesToSaveWrapper

    wrappers = [(name, module) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name, wrapper in wrappers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper.modules_to_save["default"])


def _config(run: Path) -> RunConfig:
    try:
        raw = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"There is no run in {run}: pass a folder that `privfed train` wrote.") from error
    if not (run / "adapter").is_dir():
        raise ConfigError(f"The run in {run} has no result yet: finish it with `privfed train --resume`.")
    return parse_config(raw, where=str(run / "config.toml"))


def _merged(name: str, adapter: Path, out: Path) -> float:
    """Write the merged model; return the largest difference of its logits."""
    import torch

    from privfed.tuning.adapters import quiet

    names = adapter / LABELS
    loaded = load_trained(adapter.parent)
    tuned = loaded.model
    inputs = _probe(loaded)
    with torch.no_grad(), quiet():
        wanted = tuned(**inputs).logits
        model: Any = merged_model(name, tuned)
        temporary = out.with_name(f"{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(str(temporary))
        found = type(model).from_pretrained(str(temporary)).to(wanted.device).eval()(**inputs).logits
    difference = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        shutil.rmtree(temporary)
        raise _unmergeable(name, f"the merged model's logits differ by {difference:.1e}")
    _save_parts(loaded, temporary)
    if names.exists():
        shutil.copy(names, temporary / LABELS)
    if out.exists():
        out.rmdir()
    temporary.replace(out)
    return difference


def _copy_whole(config: RunConfig, model: Path, out: Path) -> None:
    """Write a result that is a whole model already (a rule that changes base weights), with its tokenizer."""
    from privfed.models.loading import load_model

    loaded = load_model(config.model, label_names=_labels(model), seed=0)
    shutil.copytree(model, out, dirs_exist_ok=True)
    _save_parts(loaded, out)


def _labels(folder: Path) -> tuple[str, ...]:
    names = folder / LABELS
    return tuple(json.loads(names.read_text(encoding="utf-8"))) if names.exists() else ()


def _save_parts(loaded: LoadedModel, folder: Path) -> None:
    for part in (loaded.tokenizer, loaded.processor):
        if part is not None:
            part.save_pretrained(str(folder))


def _probe(loaded: LoadedModel) -> dict[str, Any]:
    """Return made-up inputs of the model, the same each time."""
    import torch

    model: Any = loaded.model
    config, device = model.config, model.device
    source = torch.Generator().manual_seed(0)
    if loaded.task == "image_classification":
        side = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        pixels = torch.randn(2, config.num_channels, *side, generator=source)
        return {"pixel_values": pixels.to(device)}
    ids = torch.randint(int(config.vocab_size), (2, 8), generator=source).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _unmergeable(name: str, reason: str) -> ModelError:
    return ModelError(f"The tuning {name!r} cannot be merged into the base ({reason}): export without --merge.")
