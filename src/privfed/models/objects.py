"""Models and tokenizers that Python code hands over: written to a temporary folder, and loaded from it like any other.

So the caller's model is never changed, and what is trained is what a folder of the same weights would give.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from privfed import objects
from privfed.errors import ModelError
from privfed.models.loading import quiet_transformers
from privfed.models.sources import ModelSource
from privfed.models.tasks import TASKS
from privfed.types import Task

# what a configuration says of where and with what it was written, not of the model
_INCIDENTAL = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


def hand_over(model: Any, part: Any, task: Task) -> objects.Handed:
    """Take a model over, with its tokenizer or image processor; it is found as long as the result is held.

    Args:
        model: A transformers model, with a head or without; a classifier's head is made new in any case.
        part: The tokenizer, or for images the image processor.
        task: The task of the model.

    Raises:
        ModelError: If the model is not one of transformers, is quantised or wrapped, or ``part`` is missing.
    """
    reads = TASKS[task].reads
    if part is None:
        raise ModelError(
            f"model= was given without {reads}=, which makes its inputs for the task {task!r}: pass "
            f"{reads}={'AutoTokenizer' if reads == 'tokenizer' else 'AutoImageProcessor'}.from_pretrained(...) as well."
        )
    _check(model)
    folder = Path(tempfile.mkdtemp(prefix="privfed-model-"))
    try:
        part.save_pretrained(folder)
        digest = content_digest(model, folder)
        known = objects.find(objects.PREFIX + digest)
        if known is None:
            with quiet_transformers():
                model.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if known is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return objects.hand_over(digest, known)
    handed = objects.hand_over(digest, _source(model, folder, digest))
    weakref.finalize(handed, shutil.rmtree, folder, ignore_errors=True)
    return handed


def content_digest(model: Any, folder: Path) -> str:
    """Return the SHA-256 of a model's settings and weights, and of the tokenizer's or processor's files."""
    state = hashlib.sha256(_settings(model.config.to_dict()))
    for name, tensor in sorted(model.state_dict().items()):
        import torch

        array = tensor.detach().cpu().contiguous()
        state.update(f"{name}\x1f{array.dtype}{tuple(array.shape)}".encode())
        state.update(array.reshape(-1).view(torch.uint8).numpy())
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        state.update(path.name.encode() + b"\x1f")
        state.update(_settings(json.loads(content)) if path.name.endswith("_config.json") else content)
    return state.hexdigest()


def _settings(values: dict[str, Any]) -> bytes:
    kept = {key: value for key, value in values.items() if key not in _INCIDENTAL}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def _check(model: Any) -> None:
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        way = (
            "merge the adapter first with model.merge_and_unload()"
            if hasattr(model, "peft_config")
            else "pass a transformers model, or set model.name to a name or a folder"
        )
        raise ModelError(f"model= is a {kind}, expected a transformers PreTrainedModel: {way}.")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"model= is a quantised {kind}, expected plain weights: set model.quantization instead.")
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ModelError(f"model= is a {kind} without values (device 'meta'), expected weights: load them first.")


def _source(model: Any, folder: Path, digest: str) -> ModelSource:
    known = str(getattr(model, "name_or_path", "") or "")
    named = f" made from {Path(known).name if Path(known).is_dir() else known}" if known else ""
    public = (Path(known).resolve().name if Path(known).is_dir() else known) if known else "object"
    return ModelSource(
        location=str(folder),
        local=True,
        origin=f"a {type(model).__name__}{named} that was handed over (SHA-256 {digest[:12]})",
        public_name=public,
    )
