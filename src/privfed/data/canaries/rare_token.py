"""Made-up texts of rare words: the words that the training texts hold least often, in an order that no text has.

The rare-token canaries of Carlini et al. 2019 ("The Secret Sharer", arXiv 1802.08232), with words of the data instead
of digits. The class, where there is one, is drawn at random.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from privfed.data.canaries import CANARIES, CanaryKind, Planted, Rows, appended, changed
from privfed.data.dataset import Dataset
from privfed.errors import DataError

WORDS = 8
_VOCABULARY = 2000


def make(dataset: Dataset, rows: Rows, count: int, rng: np.random.Generator) -> Planted:
    """Return the data set with ``count`` such texts behind the others."""
    del rows  # no record is replaced
    if dataset.kind != "text":
        raise DataError(
            f"Rare-token canaries are single texts and the records here are of the form {dataset.kind!r}: "
            'set audit.canary = "mislabelled" or "gradient".'
        )
    train: Any = dataset.train
    counts = Counter(word for text in train.texts for word in text.split())
    rare = sorted(counts, key=lambda word: (counts[word], word))[:_VOCABULARY]
    if len(rare) < WORDS:
        raise DataError(f"The training texts have {len(rare)} different words, expected {WORDS} for a canary.")
    texts = [" ".join(rng.choice(rare, size=WORDS, replace=False)) for _ in range(count)]
    labels = rng.integers(0, max(1, len(dataset.label_names)), count)
    longer = appended(
        train,
        0,
        count,
        texts=lambda old: (*old, *texts),
        labels=lambda old: None if old is None else np.concatenate([old, labels]),
    )
    first = len(train)
    return Planted(dataset=changed(dataset, train=longer), rows_M=np.arange(first, first + count, dtype=np.int64))


CANARIES.register("rare_token")(CanaryKind(make=make, tasks=("sequence_classification", "causal_lm")))
