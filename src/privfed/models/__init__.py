"""Load a base model with its tokenizer and put a task head on it."""

from privfed.models.config import ModelConfig
from privfed.models.sources import MODELS, ModelSource, resolve

__all__ = ["MODELS", "ModelConfig", "ModelSource", "resolve"]
