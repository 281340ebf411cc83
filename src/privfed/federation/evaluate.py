"""Scoring on the held-out split, by task, with something to compare with.

Shape suffixes: B examples of a microbatch, N examples, K classes, T learned tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privfed.models.examples import Examples, FeatureExamples, LabelledExamples, class_losses, microbatches
from privfed.models.language import LanguageExamples, token_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A model's quality on the test split.

    Attributes:
        primary: The metric that runs are compared by: ``accuracy``, or ``perplexity`` (lower is better).
        metrics: Every metric by name. Of classes: accuracy, macro_f1, matthews, loss, and majority, the accuracy of
            always the commonest class. Of tokens: perplexity, loss (mean over all learned tokens), token_accuracy
            (how often the likeliest token is the right one) and tokens, their number.
        n: Number of examples.
        per_class: Precision, recall and F1 of each class.
        by_row: Of classes: 1 where the answer is right, else 0 [N]. Of tokens: an example's loss, added up over its
            learned tokens, and their number [N, 2].
    """

    primary: str
    metrics: Mapping[str, float]
    n: int
    per_class: tuple[dict[str, Any], ...] = ()
    by_row: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[self.primary]

    def record(self) -> dict[str, Any]:
        """Return the score as JSON values; what is not finite is None."""
        finite = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return {"metric": self.primary, **finite, "n": self.n}


def evaluate(module: nn.Module, examples: Examples, label_names: Sequence[str], *, size: int = 64) -> Score:
    """Score ``module`` on all of ``examples``.

    Args:
        module: Classifier or language model.
        examples: The test split.
        label_names: Names of the K classes; not read for a language model.
        size: Examples at once.
    """
    module.eval()
    with torch.no_grad():
        if isinstance(examples, LanguageExamples):
            return _tokens(module, examples, size)
        if isinstance(examples, LabelledExamples | FeatureExamples):
            return _classes(module, examples, label_names, size)
    raise TypeError(f"There is no score for {type(examples).__name__}.")


def _classes(
    module: nn.Module, examples: LabelledExamples | FeatureExamples, label_names: Sequence[str], size: int
) -> Score:
    predicted_N = np.empty(len(examples), dtype=np.int64)
    loss = 0.0
    for rows in microbatches(examples, np.arange(len(examples)), size):
        batch = examples.batch(rows)
        logits_BK = examples.logits(module, batch)
        loss += float(class_losses(logits_BK, batch).sum())
        predicted_N[rows] = logits_BK.argmax(dim=1).cpu().numpy()
    return _class_score(predicted_N, examples.labels.numpy(), label_names, loss / max(1, len(examples)))


def scores_by_row(
    module: nn.Module, examples: Examples, rows: NDArray[np.int64], *, size: int = 64
) -> NDArray[np.float64]:
    """Return ``Score.by_row`` of the examples ``rows``, in their order."""
    module.eval()
    if isinstance(examples, LanguageExamples):
        losses_N2 = np.zeros((len(examples), 2))
        with torch.no_grad():
            for some in microbatches(examples, rows, size):
                batch = examples.batch(some)
                losses_N2[some] = _by_row(*token_losses(examples.logits(module, batch), batch))
        return losses_N2[rows]
    if not isinstance(examples, LabelledExamples | FeatureExamples):
        raise TypeError(f"{type(examples).__name__} has no right answers.")
    truth_N, right_N = examples.labels.numpy(), np.zeros(len(examples), dtype=np.float64)
    with torch.no_grad():
        for some in microbatches(examples, rows, size):
            answers_B = examples.logits(module, examples.batch(some)).argmax(dim=1).cpu().numpy()
            right_N[some] = answers_B == truth_N[some]
    return right_N[rows]


def _class_score(
    predicted_N: NDArray[np.int64], truth_N: NDArray[np.int64], label_names: Sequence[str], loss: float
) -> Score:
    from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

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
    metrics = {
        "accuracy": float(accuracy_score(truth_N, predicted_N)),
        "macro_f1": float(f1[present].mean()),
        "matthews": float(matthews_corrcoef(truth_N, predicted_N)),
        "loss": loss,
        "majority": float(support.max() / max(1, len(truth_N))),
    }
    right_N = (predicted_N == truth_N).astype(np.float64)
    return Score(primary="accuracy", metrics=metrics, n=len(truth_N), per_class=per_class, by_row=right_N)


def _tokens(module: nn.Module, examples: LanguageExamples, size: int) -> Score:
    loss, right, tokens, by_row = 0.0, 0, 0, np.zeros((len(examples), 2))
    for rows in microbatches(examples, np.arange(len(examples)), size):
        batch = examples.batch(rows)
        logits_BTV = examples.logits(module, batch)
        losses_BT, learned_BT = token_losses(logits_BTV, batch)
        loss += float(losses_BT.double().sum())
        tokens += int(learned_BT.sum())
        by_row[rows] = _by_row(losses_BT, learned_BT)
        if batch.targets_BT is not None:
            right += int((logits_BTV.argmax(dim=2) == batch.targets_BT.to(logits_BTV.device)).sum())
    mean = loss / max(1, tokens)
    metrics = {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "loss": mean,
        "token_accuracy": right / max(1, tokens),
        "tokens": float(tokens),
    }
    return Score(primary="perplexity", metrics=metrics, n=len(examples), by_row=by_row)


def _by_row(losses_BT: torch.Tensor, learned_BT: torch.Tensor) -> NDArray[np.float64]:
    """Return each example's loss over its learned tokens, and their number [B, 2]."""
    sums = [values_BT.double().sum(dim=1) for values_BT in (losses_BT, learned_BT)]
    found: NDArray[np.float64] = torch.stack(sums, dim=1).cpu().numpy()
    return found
