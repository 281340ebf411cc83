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
        path: A csv, tsv, jsonl (each also with ``.gz``) or parquet file.
        test_path: The test rows of ``path``; without it, ``test_fraction`` of the rows is held out.
        text: The column of texts.
        label: The column of labels: strings, or integers, which a column
            ``label_name`` may name.
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
    label: str = "label"
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
        columns = [column for column in (self.text, self.label, self.client) if column is not None]
        if len(set(columns)) < len(columns):
            raise ConfigError(
                f"[data] has text = {self.text!r}, label = {self.label!r}, client = {self.client!r}, "
                "expected different columns: name each its own."
            )
        return self
