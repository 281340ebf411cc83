"""The ``[model]`` table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from privfed.table import Table
from privfed.types import Task


class ModelConfig(Table):
    """Which base model to fine-tune, and for which task.

    Attributes:
        name: A built-in name (``privfed ls models``), a local folder or a Hugging Face hub name.
        task: ``sequence_classification`` (of texts, or of pairs), ``causal_lm`` (plain language modelling, responses
            to prompts, conversations) or ``image_classification``.
        revision: A hub revision (branch, tag or commit).
        max_length: Longest input in tokens; longer texts are cut.
        dropout: Dropout of the base model while it trains. 0 by default: a tuner's per-example gradient is then
            the same alone as in a batch, and short private runs do not gain from dropout. Refused with
            ``privacy.unit = "example"``.
        device: Where the model runs; ``auto`` takes a GPU where torch finds one (cuda, then mps).
        autocast: ``bf16`` runs forward and backward passes in bfloat16 where torch holds that safe: half the time and
            memory on processors that have it. Weights, clipping and noise stay in float32 and float64. Refused with
            example-level privacy: rounding this coarse lets examples of a batch touch each other.
        gradient_checkpointing: Keep no activations but those between blocks, and compute the others again in the
            backward pass: less memory, about a third more time. Turns the cache of frozen blocks off.
        quantization: Load the frozen base weights in 4 or 8 bits (needs bitsandbytes); adapters stay in float32.
            8 bits are refused with example-level privacy, for the same reason.
        packing: Train a causal language model on sequences of up to ``max_length`` tokens, each of several records of
            one client. Records do not see each other where the model can tell them apart by their positions (it is
            tried, and the receipt says so), and each counts as much as without. Turns the cache of frozen blocks off.
            Refused with example-level privacy.
        cache_frozen_gib: Where the first transformer blocks are frozen, run them once over the data and keep their
            output, if it takes no more than this (4 bytes x hidden width a token); 0 to run them every time.
    """

    name: str = "minilm"
    task: Task = "sequence_classification"
    revision: str | None = None
    max_length: int = Field(default=128, ge=4, le=131072)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    autocast: Literal["none", "bf16"] = "none"
    gradient_checkpointing: bool = False
    quantization: Literal["none", "4bit", "8bit"] = "none"
    packing: bool = False
    cache_frozen_gib: float = Field(default=2.0, ge=0.0)
