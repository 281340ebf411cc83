"""What a task needs of a model: a new task is one entry here, and one in ``data/load.py`` for its data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from privfed.types import Task

if TYPE_CHECKING:
    from privfed.models.config import ModelConfig
    from privfed.models.examples import ModelExamples
    from privfed.models.loading import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What a task needs of a model.

    Attributes:
        auto_class: The transformers class that loads the model with the task's head.
        reads: Whether the model's inputs are made by a tokenizer or an image processor.
        examples: ``module:function`` from (split, kind of its records, loaded model, ``[model]`` table) to examples.
    """

    auto_class: str
    reads: Literal["tokenizer", "processor"]
    examples: str


TASKS: dict[Task, TaskSpec] = {
    "sequence_classification": TaskSpec(
        auto_class="AutoModelForSequenceClassification",
        reads="tokenizer",
        examples="privfed.models.tasks:text_examples",
    ),
    "causal_lm": TaskSpec(
        auto_class="AutoModelForCausalLM", reads="tokenizer", examples="privfed.models.tasks:language_examples"
    ),
    "image_classification": TaskSpec(
        auto_class="AutoModelForImageClassification",
        reads="processor",
        examples="privfed.models.image_examples:image_examples",
    ),
}


def build_examples(split: Any, kind: str, loaded: LoadedModel, config: ModelConfig) -> ModelExamples:
    """Return one side of a data set as examples for this model.

    Args:
        split: A split of :mod:`privfed.data`.
        kind: What one of its records is.
        loaded: The model, with its tokenizer or processor.
        config: The ``[model]`` table.
    """
    module, _, function = TASKS[loaded.task].examples.partition(":")
    build: Callable[..., ModelExamples] = getattr(importlib.import_module(module), function)
    examples = build(split, kind, loaded, config)
    examples.autocast = config.autocast == "bf16"
    return examples


def text_examples(split: Any, kind: str, loaded: LoadedModel, config: ModelConfig) -> ModelExamples:
    """Return labelled texts, or pairs."""
    from privfed.models.examples import TextExamples

    if kind == "text":
        return TextExamples(split.texts, split.labels, loaded.tokenizer, config.max_length)
    pairs = split.parts["text_pair"]
    return TextExamples(split.parts["text"], split.labels, loaded.tokenizer, config.max_length, pairs)


def language_examples(split: Any, kind: str, loaded: LoadedModel, config: ModelConfig) -> ModelExamples:
    """Return texts, responses to prompts or conversations of a language model."""
    from privfed.models import sequences
    from privfed.models.language import LanguageExamples

    tokenizer, longest = loaded.tokenizer, config.max_length
    if kind == "messages":
        found = sequences.from_conversations(split.parts["messages"], tokenizer, longest)
    elif kind == "prompt_response":
        found = sequences.from_responses(split.parts["prompt"], split.parts["response"], tokenizer, longest)
    else:
        found = sequences.from_texts(split.texts, tokenizer, longest)
    return LanguageExamples(found, tokenizer)
