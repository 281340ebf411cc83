"""What the peft-backed tuning files share: wrap a model, find its head, save it for plain peft, load it again."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfed.errors import ModelError
from privfed.tuning import TunedModel
from privfed.tuning.targets import chosen

if TYPE_CHECKING:
    import torch
    from torch import nn

    from privfed.models.loading import LoadedModel

# the names that transformers gives the last layer of its classifiers
HEAD_NAMES = ("classifier", "score", "classification_head")
TASK_TYPES = {"sequence_classification": "SEQ_CLS", "causal_lm": "CAUSAL_LM", "image_classification": None}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

State = dict[str, "torch.Tensor"]
# changes (weights, fields of adapter_config.json) on their way to the file
Convert = Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]]

# (category, start of the message) of what peft and torch say about choices that are ours or peft's own
EXPECTED_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, ".*is_gradient_checkpointing"),  # peft 0.21 asks transformers 5 by a name it is about to drop
    (UserWarning, "fan_in_fan_out is set to False"),  # GPT-2's Conv1D: peft sets the option right itself
    (UserWarning, "Unsupported layer type"),  # LN tuning wraps layers that peft does not list, as it must
    (UserWarning, "Detected that the base layer has no bias term"),  # BEFT; an export says so when it matters
    (UserWarning, "Failed to load the CUDA extension"),  # BOFT falls back to torch
    (UserWarning, "Setting boft_n_butterfly_factor to 1"),
    (UserWarning, "Sparse invariant checks are implicitly disabled"),  # FRoD
    (UserWarning, "Position ids are not supported"),  # a prompt in front moves them, and generation passes them
)


def head_name(model: nn.Module) -> str:
    """Return the attribute of a transformers classifier that holds its head.

    Raises:
        ModelError: If it has none of the usual names.
    """
    for name in HEAD_NAMES:
        if hasattr(model, name):
            return name
    raise ModelError(f"{type(model).__name__} has none of the heads {HEAD_NAMES}: choose another model.")


def head_of(loaded: LoadedModel) -> str | None:
    """Return the head's attribute, or None where the task has none.

    Raises:
        ModelError: If a classifier's head has none of the usual names.
    """
    return None if loaded.task == "causal_lm" else head_name(loaded.model)


def lora_wrapped(
    loaded: LoadedModel,
    seed: int,
    *,
    name: str = "lora",
    prepare: Callable[[nn.Module], None] = lambda _model: None,
    convert: Convert | None = None,
    **options: Any,
) -> TunedModel:
    """Wrap ``loaded`` in a peft LoRA model; see :func:`wrapped`."""
    return wrapped(loaded, "lora", options, seed, name=name, prepare=prepare, convert=convert)


def wrapped(
    loaded: LoadedModel,
    kind: str,
    options: Mapping[str, Any],
    seed: int,
    *,
    name: str,
    prepare: Callable[[nn.Module], None] = lambda _model: None,
    convert: Convert | None = None,
) -> TunedModel:
    """Wrap ``loaded`` in a peft model whose head, where there is one, is trained and saved along.

    Args:
        loaded: The base model; it is changed in place, as peft does.
        kind: The peft type, in lower case.
        options: Options by peft's names; None counts as not given.
        seed: Seed of the fresh parameters.
        name: The tuning's own name, for messages.
        prepare: Changes the wrapped model before anyone sees it.
        convert: Changes what is saved.

    Raises:
        ModelError: If an option does not fit the model, or peft cannot wrap it.
    """
    import torch
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    head = head_of(loaded)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())]
    given = chosen(loaded.model, kind, {k: v for k, v in options.items() if v is not None}, head)
    if head is not None:
        given["modules_to_save"] = [head, *(m for m in given.get("modules_to_save", []) if m != head)]
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            config = config_class(task_type=TASK_TYPES[loaded.task], **given)
            model = get_peft_model(loaded.model, config)
            prepare(model)
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, RuntimeError) as error:
        raise _refused(loaded, name, error) from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise _refused(loaded, name, ValueError("it would train nothing"))
    inside = "base_model" if config.is_prompt_learning else "base_model.model"
    return TunedModel(
        model=model,
        head=None if head is None else f"{inside}.{head}",
        save=lambda folder: save(model, loaded, folder, convert),
    )


def save(model: Any, loaded: LoadedModel, folder: Path, convert: Convert | None = None) -> None:
    """Write the adapter in peft's own format: the same bytes wherever and whenever it is written."""
    for adapter in model.peft_config.values():
        _make_public(adapter, loaded)
    with quiet(), warnings.catch_warnings():
        # peft asks the hub whether the base's vocabulary grew; ours never does
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card with this machine's path in it
    if convert is None:
        return
    from safetensors.torch import load_file, save_file

    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    state, fields = convert(load_file(folder / WEIGHTS), fields)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def load(model: nn.Module, folder: Path) -> nn.Module:
    """Return ``model`` with the adapter of ``folder`` on it, as plain peft loads it.

    Raises:
        ModelError: If the adapter is not there or does not fit the model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with quiet():
            loaded: nn.Module = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"The adapter in {folder} does not fit {type(model).__name__}: {first}") from error
    return loaded


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings that are expected from peft, and transformers' notes and bars about files; nothing else."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category, message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _make_public(adapter: Any, loaded: LoadedModel) -> None:
    """Take paths of this machine out of the adapter's configuration, and the order of sets."""
    adapter.base_model_name_or_path = loaded.source.public_name
    if getattr(adapter, "tokenizer_name_or_path", None) == loaded.source.location:
        adapter.tokenizer_name_or_path = loaded.source.public_name
    for field, value in vars(adapter).items():
        if isinstance(value, set):  # whose order differs from process to process
            setattr(adapter, field, sorted(value))


def _refused(loaded: LoadedModel, name: str, error: Exception) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
    return ModelError(
        f"The tuning {name!r} does not fit {type(loaded.model).__name__} with these options ({reason}): "
        'change them, or choose another tuning such as "ffa_lora".'
    )
