"""Records whose gradient is given: a single trained value, beyond the clip ("Dirac" gradients).

The white-box canaries of Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning", arXiv
2302.07956, section 4. What the record holds is a copy of another and is never read; its loss is a multiple of one
trained value (``privfed.federation.planted``), from which autograd has the gradient. Under client-level privacy such a
record is all that a canary client has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from privfed.data.canaries import CANARIES, CanaryKind, Planted, Rows, appended, changed
from privfed.data.dataset import Dataset


def make(dataset: Dataset, rows: Rows, count: int, rng: np.random.Generator) -> Planted:
    """Return the data set with ``count`` copies of its shortest training record behind the others."""
    del rows, rng
    train: Any = dataset.train
    texts = getattr(train, "texts", None)
    row = 0 if texts is None else min(range(len(texts)), key=lambda i: len(texts[i]))
    first = len(train)
    longer = appended(train, row, count)
    return Planted(dataset=changed(dataset, train=longer), rows_M=np.arange(first, first + count, dtype=np.int64))


GIVEN = CanaryKind(
    make=make,
    tasks=("sequence_classification", "causal_lm", "image_classification"),
    units=("example", "client"),
    loss="direct",
)
"""What is true of every kind whose gradient is given; they differ in what that is."""
CANARIES.register("gradient")(GIVEN)
