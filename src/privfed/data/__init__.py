"""Data sets of labelled texts, pairs, prompts with responses, conversations, images; and their partition over clients.

Sources (built in, files, hub) all end in one :class:`Dataset`; partitioners turn its training split into
shards. A new built-in source is one file in ``sources/``, a new partitioner one file in ``partitioners/``.
"""

from privfed.data.config import DataConfig
from privfed.data.dataset import AnySplit, Dataset, Split, TextDataset
from privfed.data.load import SOURCES, load_dataset
from privfed.data.records import form_of, has_labels
from privfed.data.sharding import (
    PARTITIONERS,
    Partitioner,
    check_shards,
    partition,
    single_class_clients,
)

__all__ = [
    "PARTITIONERS",
    "SOURCES",
    "AnySplit",
    "DataConfig",
    "Dataset",
    "Partitioner",
    "Split",
    "TextDataset",
    "check_shards",
    "form_of",
    "has_labels",
    "load_dataset",
    "partition",
    "single_class_clients",
]
