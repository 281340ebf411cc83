"""Scoring on the held-out split: accuracy, macro-F1, loss, and the majority class to compare with.

Shape suffixes: N examples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from privfed.models.examples import Examples, microbatches


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A model's quality on the test split; ``right_N`` is 1 where its answer is right."""

    accuracy: float
    macro_f1: float
    loss: float
    n: int
    majority: float
    per_class: tuple[dict[str, Any], ...]
    right_N: NDArray[np.float64] = field(repr=False)


def evaluate(module: nn.Module, examples: Examples, label_names: Sequence[str], *, size: int = 64) -> Score:
    """Score ``module`` on all of ``examples``.

    Args:
        module: Classifier.
        examples: The test split.
        label_names: Names of the K classes.
        size: Examples at once.
    """
    predicted_N = np.empty(len(examples), dtype=np.int64)
    truth_N = np.empty(len(examples), dtype=np.int64)
    loss = 0.0
    module.eval()
    with torch.no_grad():
        for rows in microbatches(examples, np.arange(len(examples)), size):
            batch = examples.batch(rows)
            logits = examples.logits(module, batch)
            loss += float(cross_entropy(logits, batch.labels_B, reduction="sum"))
            predicted_N[rows] = logits.argmax(dim=1).numpy()
            truth_N[rows] = batch.labels_B.numpy()
    return _score(predicted_N, truth_N, label_names, loss / max(1, len(examples)))


def right_answers(
    module: nn.Module, examples: Examples, rows: NDArray[np.int64], *, size: int = 64
) -> NDArray[np.float64]:
    """Return 1 where the module's answer to an example of ``rows`` is right, else 0, in the order of ``rows``."""
    right_N = np.zeros(len(examples), dtype=np.float64)
    module.eval()
    with torch.no_grad():
        for some in microbatches(examples, rows, size):
            batch = examples.batch(some)
            right_N[some] = (examples.logits(module, batch).argmax(dim=1) == batch.labels_B).cpu().numpy()
    return right_N[rows]


def _score(
    predicted_N: NDArray[np.int64], truth_N: NDArray[np.int64], label_names: Sequence[str], loss: float
) -> Score:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    classes = np.arange(len(label_names))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth_N, predicted_N, labels=classes, zero_division=0.0
    )
    per_class = tuple(
        {
            "label": label,
            "precision": float(precision[k]),
            "recall": float(recall[k]),
            "f1": float(f1[k]),
            "support": int(support[k]),
        }
        for k, label in enumerate(label_names)
    )
    present = support > 0
    return Score(
        accuracy=float(accuracy_score(truth_N, predicted_N)),
        macro_f1=float(f1[present].mean()),
        loss=loss,
        n=len(truth_N),
        majority=float(support.max() / max(1, len(truth_N))),
        per_class=per_class,
        right_N=(predicted_N == truth_N).astype(np.float64),
    )
