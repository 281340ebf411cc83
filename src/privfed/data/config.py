"""The ``[data]`` table: which data set, and which of its columns."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from privfed.errors import ConfigError
from privfed.table import Table


class DataConfig(Table):
    """Where the examples come from; exactly one of ``name`` and ``path``. Files are UTF-8.

    Attributes:
        name: A built-in data set such as ``"pydoc"``, or one of the Hugging Face hub.
        subset: The configuration of a hub data set that has several, e.g. ``"sst2"`` of ``"nyu-mll/glue"``.
        path: A csv, tsv, jsonl (each also with ``.gz``) or parquet file; for image classification a safetensors file
            with the tensors ``images`` (uint8 [N, H, W] or [N, H, W, C]), ``labels`` [N] and, for natural clients,
            ``client`` [N].
        test_path: The test rows of ``path``; without it, ``test_fraction`` of the rows is held out.
        text: The column of texts.
        text_pair: The column of second texts, for the classification of pairs (a question and its answer, say).
        prompt: For a causal language model: the column of prompts, which are read and not learned; goes with
            ``response``. Without them and without ``messages``, all of ``text`` is learned.
        response: The column of what is to be learned after the prompt.
        messages: For a causal language model: the column of conversations, each a list of ``{role, content}``,
            written out by the tokenizer's chat template; what the role ``assistant`` says is learned.
        label: The column of labels: strings, or integers, which a column
            ``label_name`` may name. A causal language model has none and does not read it.
        image: The column of images of a hub data set.
        classes: Keep only the records of these labels; all of the data's if absent.
        client: The column of natural clients, where there is one.
        test_fraction: The share of rows to hold out where the source has no test split. Which rows depends on
            their content alone, never on the run's seed, so all runs are scored on the same rows.
        limit: Train on this many rows only, drawn by the run's seed.

    Raises:
        ConfigError: If the values contradict each other.
    """

    name: str | None = Field(default=None, min_length=1)
    subset: str | None = Field(default=None, min_length=1)
    path: str | None = Field(default=None, min_length=1)
    test_path: str | None = Field(default=None, min_length=1)
    text: str = "text"
    text_pair: str | None = Field(default=None, min_length=1)
    prompt: str | None = Field(default=None, min_length=1)
    response: str | None = Field(default=None, min_length=1)
    messages: str | None = Field(default=None, min_length=1)
    label: str = "label"
    image: str = "image"
    classes: list[int | str] | None = Field(default=None, min_length=2)
    client: str | None = None
    test_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        # ConfigError is no ValueError, so pydantic hands it to the caller as it is.
        if self.name is not None and self.path is not None:
            raise ConfigError(
                f"[data] has both name = {self.name!r} and path = {self.path!r}, expected exactly one: "
                "remove the one that is not meant."
            )
        if self.name is None and self.path is None:
            raise ConfigError(
                "[data] has neither name nor path, expected exactly one: set name = 'pydoc' or path = 'train.jsonl.gz'."
            )
        if self.test_path is not None and self.path is None:
            raise ConfigError(
                f"[data] has test_path = {self.test_path!r} with name = {self.name!r}, "
                "expected it beside path only: remove test_path, or give the training rows as path."
            )
        if self.subset is not None and self.name is None:
            raise ConfigError(
                f"[data] has subset = {self.subset!r} with path = {self.path!r}, "
                "expected it beside the name of a hub data set only: remove subset."
            )
        self._check_parts()
        keys = ("text", "text_pair", "prompt", "response", "messages", "label", "client")
        columns = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        if self.prompt is not None or self.messages is not None:
            del columns["text"], columns["label"]  # not read then
        if len(set(columns.values())) < len(columns):
            named = ", ".join(f"{key} = {column!r}" for key, column in columns.items())
            raise ConfigError(f"[data] has {named}, expected different columns: name each its own.")
        return self

    def _check_parts(self) -> None:
        if (self.prompt is None) != (self.response is None):
            given, missing = ("prompt", "response") if self.response is None else ("response", "prompt")
            raise ConfigError(
                f"[data] has {given} = {getattr(self, given)!r} without {missing}, expected both: name the column of "
                f"{missing}s too, or use text alone for plain language modelling."
            )
        forms = [key for key in ("text_pair", "prompt", "messages") if getattr(self, key) is not None]
        if len(forms) > 1:
            raise ConfigError(
                f"[data] has {forms[0]} and {forms[1]}, which make different kinds of records: remove one of them."
            )
