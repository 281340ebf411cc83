"""Data sets for text classification, and their partition over clients.

Sources (built in, files, hub) all end in one :class:`TextDataset`; partitioners turn its training split into
shards. A new built-in source is one file in ``sources/``, a new partitioner one file in ``partitioners/``.
"""

from privfed.data.config import DataConfig
from privfed.data.dataset import Split, TextDataset
from privfed.data.load import SOURCES, load_dataset
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
    "DataConfig",
    "Partitioner",
    "Split",
    "TextDataset",
    "check_shards",
    "load_dataset",
    "partition",
    "single_class_clients",
]
