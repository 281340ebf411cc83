"""Examples as tensors: tokenised texts, or features of a frozen model.

Shape suffixes: B examples of a microbatch, S tokens, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from privfed.models.prefix import FrozenPrefix

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """A microbatch: what the module's forward gets, the labels [B], and states of a frozen prefix [B, S, H]."""

    inputs: Any
    labels_B: torch.Tensor
    states_BSH: torch.Tensor | None = None


class TextExamples:
    """Tokenised texts with labels; batches are padded to their own longest text.

    Args:
        texts: One string an example.
        labels: Class numbers, one an example.
        tokenizer: A transformers tokenizer.
        max_length: Longer texts are cut to this many tokens.
    """

    def __init__(self, texts: Sequence[str], labels: NDArray[np.int64], tokenizer: Any, max_length: int) -> None:
        encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)["input_ids"]
        self._ids = [np.asarray(ids or [tokenizer.pad_token_id], dtype=np.int64) for ids in encoded]
        self._labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        self._pad = int(tokenizer.pad_token_id)
        self.lengths = np.asarray([len(ids) for ids in self._ids])
        self._prefix: FrozenPrefix | None = None
        self._states: list[torch.Tensor] = []

    def use_prefix(self, prefix: FrozenPrefix | None, states: list[torch.Tensor]) -> None:
        """Run forward passes from these states of a frozen prefix, one [S, H] an example; None to stop."""
        self._prefix, self._states = prefix, states

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, rows: Rows) -> Batch:
        """Return the examples ``rows`` padded to the longest of them."""
        width = int(self.lengths[rows].max())
        ids_BS = np.full((len(rows), width), self._pad, dtype=np.int64)
        mask_BS = np.zeros((len(rows), width), dtype=np.int64)
        for position, row in enumerate(rows):
            ids = self._ids[row]
            ids_BS[position, : len(ids)] = ids
            mask_BS[position, : len(ids)] = 1
        inputs = {"input_ids": torch.from_numpy(ids_BS), "attention_mask": torch.from_numpy(mask_BS)}
        labels_B = self._labels[torch.from_numpy(rows)]
        if self._prefix is None:
            return Batch(inputs, labels_B)
        states_BSH = torch.nn.utils.rnn.pad_sequence([self._states[row] for row in rows], batch_first=True)
        return Batch(inputs, labels_B, states_BSH)

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits [B, K] of a transformers classifier."""
        with self._prefix.states(batch.states_BSH) if self._prefix else nullcontext():
            output: torch.Tensor = module(**batch.inputs).logits
        return output


class FeatureExamples:
    """Features of a frozen model with labels: what a head is trained on.

    Args:
        features_NF: float32 features, one row an example.
        labels: Class numbers.
    """

    def __init__(self, features_NF: torch.Tensor, labels: torch.Tensor) -> None:
        self._features = features_NF
        self._labels = labels
        self.lengths = np.ones(len(labels), dtype=np.int64)
        self.width = int(features_NF.shape[1])

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, rows: Rows) -> Batch:
        """Return the features of ``rows`` [B, F]."""
        index = torch.from_numpy(rows)
        return Batch(self._features[index], self._labels[index])

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits [B, K] of a head."""
        output: torch.Tensor = module(batch.inputs)
        return output


Examples = TextExamples | FeatureExamples


def losses(examples: Examples, module: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy of each example [B]; no example's loss depends on another's."""
    return cross_entropy(examples.logits(module, batch), batch.labels_B, reduction="none")


def microbatches(examples: Examples, rows: Rows, size: int) -> Iterator[Rows]:
    """Yield ``rows`` in pieces of at most ``size``, sorted by length so that little is padded.

    The pieces are a matter of memory and speed only: sums over a logical batch do not depend on them.
    """
    ordered = rows[np.argsort(examples.lengths[rows], kind="stable")]
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def head_features(module: nn.Module, head: nn.Module, examples: TextExamples, size: int = 64) -> FeatureExamples | None:
    """Return what ``head`` gets as its input for every example, or None where that is not one vector an example.

    Decoders hand their head every token and pick one afterwards: there the caller trains through the model.
    """
    captured: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: captured.append(args[0].detach()))
    features: torch.Tensor | None = None
    module.eval()
    try:
        with torch.no_grad():
            for rows in microbatches(examples, np.arange(len(examples)), size):
                captured.clear()
                batch = examples.batch(rows)
                logits = examples.logits(module, batch)
                found = captured[-1]
                if found.dim() != 2 or not torch.equal(head(found), logits):
                    return None
                if features is None:
                    features = torch.empty(len(examples), found.shape[1])
                features[torch.from_numpy(rows)] = found
    finally:
        handle.remove()
    return None if features is None else FeatureExamples(features, examples._labels)
