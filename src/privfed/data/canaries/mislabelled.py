"""Training records under a wrong label: nothing but the record itself could teach a model that label.

Jagielski, Ullman and Oprea 2020, arXiv 2006.07709; Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, section 6.
"""

from __future__ import annotations

import numpy as np

from privfed.data.canaries import CANARIES, CanaryKind, Planted, Rows, changed, choose_rows
from privfed.data.dataset import Dataset
from privfed.errors import DataError


def make(dataset: Dataset, rows: Rows, count: int, rng: np.random.Generator) -> Planted:
    """Return the data set with another label, uniform among the wrong ones, on ``count`` records."""
    labels, classes = dataset.train.labels, len(dataset.label_names)
    if labels is None or classes < 2:
        raise DataError("Mislabelled canaries need records of two classes or more.")
    rows_M = choose_rows(rows, count, rng)
    wrong = labels.copy()
    wrong[rows_M] = (labels[rows_M] + rng.integers(1, classes, count)) % classes
    train = changed(dataset.train, labels=wrong)
    return Planted(dataset=changed(dataset, train=train), rows_M=rows_M)


CANARIES.register("mislabelled")(CanaryKind(make=make, tasks=("sequence_classification", "image_classification")))
