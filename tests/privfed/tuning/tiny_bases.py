"""Tiny random base models of each task and family, made in the process; what the tests of tunings share."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from privfed.models.loading import LoadedModel
from privfed.models.sources import ModelSource
from privfed.tuning import TUNINGS
from privfed.tuning.layout import read_flat, trained, write_flat
from privfed.types import Task

VOCAB, HIDDEN, LABELS = 64, 32, 3
_BERT = BertConfig(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64, pad_token_id=0, num_labels=LABELS, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
_GPT2 = GPT2Config(
    vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=64, bos_token_id=4, eos_token_id=4,
    pad_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, num_labels=LABELS,
)  # fmt: skip
_LLAMA = LlamaConfig(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=64, max_position_embeddings=64, bos_token_id=4, eos_token_id=4, pad_token_id=0,
    num_labels=LABELS,
)  # fmt: skip
_VIT = ViTConfig(
    hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4,
    num_channels=1, num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
# name: (class, configuration, task)
BASES: dict[str, tuple[Any, Any, Task]] = {
    "bert": (BertForSequenceClassification, _BERT, "sequence_classification"),
    "gpt2": (GPT2LMHeadModel, _GPT2, "causal_lm"),
    "llama": (LlamaForCausalLM, _LLAMA, "causal_lm"),
    "vit": (ViTForImageClassification, _VIT, "image_classification"),
    "gpt2_classifier": (GPT2ForSequenceClassification, _GPT2, "sequence_classification"),
    "llama_classifier": (LlamaForSequenceClassification, _LLAMA, "sequence_classification"),
}
# what a method needs to be told
OPTIONS: dict[str, dict[str, Any]] = {"trainable_tokens": {"token_indices": [5, 9]}}
SELECTED = {"Bert": ["layer.*.value"], "GPT2": "*.c_attn", "Llama": ["v_proj", "*norm"], "ViT": "*.[qv]_proj.bias"}


def base(family: str, seed: int = 1) -> Any:
    """Return a fresh base model, the same for the same seed."""
    kind, config, _task = BASES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(type(config).from_dict(config.to_dict())).eval()


def load(family: str, seed: int = 1) -> LoadedModel:
    """Return a base model as a run loads it."""
    source = ModelSource(
        location=f"/somewhere/tiny-{family}", local=True, origin="made up", public_name=f"tiny-{family}"
    )
    labels = 0 if BASES[family][2] == "causal_lm" else LABELS
    return LoadedModel(model=base(family, seed), task=BASES[family][2], source=source, num_labels=labels)


def tuned(name: str, loaded: LoadedModel, seed: int = 1, **options: Any) -> Any:
    """Apply a tuning with the options given, else with those it needs."""
    plugin = TUNINGS.get(name)
    if name == "select" and not options:
        options = {"select": next(v for k, v in SELECTED.items() if type(loaded.model).__name__.startswith(k))}
    config = plugin.config(**(options or OPTIONS.get(name, {})))
    return plugin.apply(loaded, config, seed)


def inputs(family: str) -> dict[str, Any]:
    """Return a batch of three examples, one of them padded."""
    source = torch.Generator().manual_seed(5)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=source)}
    ids = torch.randint(5, VOCAB, (3, 7), generator=source)
    ids[0, :2] = torch.tensor([5, 9])  # the rows that trainable tokens train
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, family: str, **more: Any) -> Any:
    """Return the logits of the batch in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(**inputs(family), **more).logits


def shake(module: Any, seed: int = 3, scale: float = 0.1) -> Any:
    """Move every trained value off its start; return the new values."""
    values_D = read_flat(module)
    moved_D = values_D + np.float32(scale) * np.random.default_rng(seed).standard_normal(len(values_D)).astype(
        np.float32
    )
    write_flat(module, moved_D)
    return moved_D


def frozen_digest(module: Any) -> str:
    """Return one digest of every frozen parameter and buffer."""
    state = hashlib.sha256()
    moving = {name for name, _ in trained(module)}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name not in moving:
            state.update(name.encode())
            state.update(tensor.detach().to_dense().contiguous().numpy().tobytes())
    return state.hexdigest()
