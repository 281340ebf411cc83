"""Examples as tensors: what a module is run on, and the loss of each.

A new kind of example is one class: :class:`ModelExamples` for what goes through a transformers model (with labels:
:class:`LabelledExamples`), anything else that meets :class:`Examples`. Its builder is named in ``models/tasks.py``.

Shape suffixes: B examples of a microbatch, N examples, S tokens (or patches), T targets of the example that has most,
F features, H hidden width, K classes, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from privfed.models.prefix import FrozenPrefix

Rows = NDArray[np.int64]

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Return a list.",
    "If the file does not exist, an error is raised that names it, and nothing is written to disk at all.",
)
"""Made-up texts of different lengths: what the self-checks run on, so that no client's data is touched."""
PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """A microbatch: in every tensor the first dimension is the batch, and no row depends on another.

    Attributes:
        inputs: What the module's forward gets: a tensor, or a dict of tensors.
        labels_B: Class numbers, where the loss is over classes.
        states_BSH: States of a frozen prefix.
        positions_BT: Where the loss is over tokens: the positions whose output predicts a target.
        targets_BT: The tokens there; -100 (``cross_entropy``'s "ignore") fills up.
        owners_BT: Where a row holds several examples: which of the batch's each target belongs to, -1 for none.
        learned_N: Then, the number of targets of each example.
    """

    inputs: Any
    labels_B: torch.Tensor | None = None
    states_BSH: torch.Tensor | None = None
    positions_BT: torch.Tensor | None = None
    targets_BT: torch.Tensor | None = None
    owners_BT: torch.Tensor | None = None
    learned_N: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``; itself where it is there."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "inputs"}
        moved = {name: tensor if tensor is None else tensor.to(device) for name, tensor in found.items()}
        if isinstance(self.inputs, dict):
            return replace(self, inputs={k: t.to(device) for k, t in self.inputs.items()}, **moved)
        return replace(self, inputs=self.inputs.to(device), **moved)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter: all of a module here is on one."""
    return next(module.parameters()).device


class Examples(Protocol):
    """What local training, self-checks and scoring need of a split."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The cost of each example [N], such as its number of tokens: microbatches are sorted by it."""

    def __len__(self) -> int:
        """Return N."""

    def batch(self, rows: Rows) -> Batch:
        """Return the examples ``rows`` as a batch on the CPU."""

    def losses(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of each example [B]; no example's loss depends on another's."""

    def probe(self, classes: int) -> Examples:
        """Return three made-up examples of this kind, of different lengths; no client's data is touched."""


class ModelExamples(ABC):
    """Examples that go through a transformers model.

    Attributes:
        lengths: Tokens (or patches) of each example [N]; states of a frozen prefix are as long.
        autocast: Whether forward passes run in bfloat16 where torch holds that safe.
    """

    lengths: NDArray[np.int64]
    autocast: bool = False
    _prefix: FrozenPrefix | None = None
    _states: Sequence[torch.Tensor] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def unprefixed(self, rows: Rows) -> Batch:
        """Return the examples ``rows`` padded to the longest of them."""

    @abstractmethod
    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits that the loss is over: [B, K], or [B, T, V]."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of each example [B]."""

    @abstractmethod
    def probe(self, classes: int) -> Examples:
        """Return three made-up examples of this kind."""

    @property
    def prefix_depth(self) -> int:
        """How many frozen blocks forward passes leave out."""
        return self._prefix.depth if self._prefix else 0

    def use_prefix(self, prefix: FrozenPrefix | None, states: list[torch.Tensor]) -> None:
        """Run forward passes from these states of a frozen prefix, one [S, H] an example; None to stop."""
        self._prefix, self._states = prefix, states

    def batch(self, rows: Rows) -> Batch:
        """Return the examples ``rows`` padded to the longest of them, with their states where a prefix is in use."""
        batch = self.unprefixed(rows)
        if self._prefix is None:
            return batch
        states_BSH = torch.nn.utils.rnn.pad_sequence([self._states[row] for row in rows], batch_first=True)
        return replace(batch, states_BSH=states_BSH)

    def forward(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the model's logits; ``batch`` is on its device."""
        with self.precision(module), self._prefix.states(batch.states_BSH) if self._prefix else nullcontext():
            output: torch.Tensor = module(**batch.inputs).logits
        return output

    def precision(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Return the context that forward passes run in."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast(device_of(module).type, dtype=torch.bfloat16)


class LabelledExamples(ModelExamples):
    """Examples with one class each.

    Attributes:
        labels: Class numbers [N].
    """

    labels: torch.Tensor

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits [B, K] of a transformers classifier as float32."""
        return self.forward(module, batch.to(device_of(module))).float()

    def losses(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of each example [B]."""
        return class_losses(self.logits(module, batch), batch)

    def labelled(self, rows: Rows, inputs: dict[str, torch.Tensor]) -> Batch:
        """Return a batch of these inputs with the labels of ``rows``."""
        return Batch(inputs, self.labels[torch.from_numpy(rows)])


class TextExamples(LabelledExamples):
    """Tokenised texts (or pairs) with labels; batches are padded to their own longest text.

    Args:
        texts: One string an example.
        labels: Class numbers, one an example.
        tokenizer: A transformers tokenizer.
        max_length: Longer texts are cut to this many tokens; of a pair, the longer text first.
        pairs: The second texts, where pairs are classified.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: NDArray[np.int64],
        tokenizer: Any,
        max_length: int,
        pairs: Sequence[str] | None = None,
    ) -> None:
        second = None if pairs is None else list(pairs)
        encoded = tokenizer(list(texts), second, truncation=True, max_length=max_length, padding=False)
        self._ids = [np.asarray(ids or [tokenizer.pad_token_id], dtype=np.int64) for ids in encoded["input_ids"]]
        # of single texts all token types are 0, which is what a model takes where it is told none
        types = encoded.get("token_type_ids") if pairs is not None else None
        self._types = None if types is None else [np.asarray(t or [0], dtype=np.int64) for t in types]
        self.labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        self._paired = pairs is not None
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.lengths = np.asarray([len(ids) for ids in self._ids])

    def unprefixed(self, rows: Rows) -> Batch:
        """Return the examples ``rows`` padded to the longest of them."""
        inputs = padded([self._ids[row] for row in rows], int(self._tokenizer.pad_token_id))
        if self._types is not None:
            inputs["token_type_ids"] = padded([self._types[row] for row in rows], 0)["input_ids"]
        return self.labelled(rows, inputs)

    def probe(self, classes: int) -> TextExamples:
        """Return three made-up texts (or pairs) with labels."""
        labels = np.arange(len(PROBES), dtype=np.int64) % classes
        pairs = PROBES[::-1] if self._paired else None
        return TextExamples(PROBES, labels, self._tokenizer, min(PROBE_TOKENS, self._max_length), pairs)


class FeatureExamples:
    """Features of a frozen model with labels: what a head is trained on.

    Args:
        features_NF: float32 features, one row an example.
        labels: Class numbers.
    """

    def __init__(self, features_NF: torch.Tensor, labels: torch.Tensor) -> None:
        self.features_NF = features_NF
        self.labels = labels
        self.lengths = np.ones(len(labels), dtype=np.int64)
        self.width = int(features_NF.shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Rows) -> Batch:
        """Return the features of ``rows`` [B, F]."""
        index = torch.from_numpy(rows)
        return Batch(self.features_NF[index], self.labels[index])

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits [B, K] of a head."""
        output: torch.Tensor = module(batch.to(device_of(module)).inputs)
        return output

    def losses(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of each example [B]."""
        return class_losses(self.logits(module, batch), batch)

    def probe(self, classes: int) -> FeatureExamples:
        """Return three made-up rows of features with labels."""
        draw = torch.Generator().manual_seed(0)
        labels = torch.arange(len(PROBES)) % classes
        return FeatureExamples(torch.randn(len(PROBES), self.width, generator=draw), labels)


def losses(examples: Examples, module: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the loss of each example [B]; no example's loss depends on another's."""
    return examples.losses(module, batch)


def class_losses(logits_BK: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy of each example [B] with the batch's labels."""
    if batch.labels_B is None:
        raise ValueError("This batch has no labels.")
    return cross_entropy(logits_BK, batch.labels_B.to(logits_BK.device), reduction="none")


def padded(rows_S: Sequence[NDArray[np.int64]], fill: int) -> dict[str, torch.Tensor]:
    """Return sequences as ``input_ids`` [B, S], filled up on the right, and their ``attention_mask`` [B, S].

    On the right: the positions of an example then do not depend on its neighbours' lengths.
    """
    width = max(len(ids) for ids in rows_S)
    ids_BS = np.full((len(rows_S), width), fill, dtype=np.int64)
    mask_BS = np.zeros((len(rows_S), width), dtype=np.int64)
    for position, ids in enumerate(rows_S):
        ids_BS[position, : len(ids)] = ids
        mask_BS[position, : len(ids)] = 1
    return {"input_ids": torch.from_numpy(ids_BS), "attention_mask": torch.from_numpy(mask_BS)}


def microbatches(examples: Examples, rows: Rows, size: int) -> Iterator[Rows]:
    """Yield ``rows`` in pieces of at most ``size``, sorted by length so that little is padded.

    The pieces are a matter of memory and speed only: sums over a logical batch do not depend on them. Examples whose
    loss does not go through the model (``privfed.federation.planted``) are in pieces of their own.
    """
    first = getattr(examples, "first_direct", len(examples))
    for part in (rows[rows < first], rows[rows >= first]):
        ordered = part[np.argsort(examples.lengths[part], kind="stable")]
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def head_features(
    module: nn.Module, head: nn.Module, examples: LabelledExamples, size: int = 64
) -> FeatureExamples | None:
    """Return what ``head`` gets as its input for every example, or None where that is not one vector an example.

    Decoders hand their head every token and pick one afterwards: there the caller trains through the model.
    """
    captured: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: captured.append(args[0].detach()))
    features: torch.Tensor | None = None
    module.eval()
    try:
        with torch.no_grad(), examples.precision(module):
            for rows in microbatches(examples, np.arange(len(examples)), size):
                captured.clear()
                batch = examples.batch(rows)
                logits = examples.logits(module, batch)
                found = captured[-1]
                if found.dim() != 2 or not torch.equal(head(found).float(), logits):
                    return None
                if features is None:
                    features = torch.empty(len(examples), found.shape[1])
                features[torch.from_numpy(rows)] = found.float().cpu()
    finally:
        handle.remove()
    return None if features is None else FeatureExamples(features, examples.labels)
