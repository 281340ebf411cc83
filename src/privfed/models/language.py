"""Examples of a causal language model: sequences of which some tokens are learned.

An example's loss is the mean over its *own* learned tokens. (transformers' ``labels=`` averages over the tokens of the
whole batch: an example's gradient would then depend on its neighbours' lengths, and no clip would bound it.)

Shape suffixes: B examples of a microbatch, S tokens, T learned tokens of the example that has most, H hidden width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from privfed.models.examples import PROBE_TOKENS, PROBES, Batch, ModelExamples, Rows, device_of, padded

IGNORED = -100


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A tokenised example: ``learned[i]`` says whether token i is a target."""

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]


class LanguageExamples(ModelExamples):
    """Sequences with their learned tokens; batches are padded on the right to their own longest sequence.

    Args:
        sequences: From :mod:`privfed.models.sequences`.
        tokenizer: A transformers tokenizer.
        autocast: Whether forward passes run in bfloat16.
    """

    def __init__(self, sequences: Sequence[TokenSequence], tokenizer: Any, *, autocast: bool = False) -> None:
        self._sequences = list(sequences)
        self.tokenizer = tokenizer
        self.autocast = autocast
        self.lengths = np.asarray([len(s.ids) for s in self._sequences], dtype=np.int64)

    def unprefixed(self, rows: Rows) -> Batch:
        """Return the examples ``rows`` with the positions before each learned token, and those tokens."""
        chosen = [self._sequences[row] for row in rows]
        inputs = padded([s.ids for s in chosen], int(self.tokenizer.pad_token_id))
        places = [np.flatnonzero(s.learned) for s in chosen]
        width = max(1, *(len(p) for p in places))
        positions_BT = np.zeros((len(rows), width), dtype=np.int64)
        targets_BT = np.full((len(rows), width), IGNORED, dtype=np.int64)
        for number, (sequence, place) in enumerate(zip(chosen, places, strict=True)):
            positions_BT[number, : len(place)] = place - 1
            targets_BT[number, : len(place)] = sequence.ids[place]
        return Batch(inputs, positions_BT=torch.from_numpy(positions_BT), targets_BT=torch.from_numpy(targets_BT))

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits [B, T, V] that predict the learned tokens, as float32; no others are computed."""
        batch = batch.to(device_of(module))
        positions_BT, _ = _targets(batch)
        width = batch.inputs["input_ids"].shape[1]
        find = getattr(module, "get_output_embeddings", None)
        head = find() if callable(find) else None
        if not isinstance(head, nn.Module):
            return _at(self.forward(module, batch), positions_BT, width).float()
        with _only_at(head, positions_BT, width):
            return self.forward(module, batch).float()

    def losses(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy [B] over each example's own learned tokens; 0 where it has none."""
        losses_BT, learned_BT = token_losses(self.logits(module, batch), batch)
        return losses_BT.sum(dim=1) / learned_BT.sum(dim=1).clamp(min=1)

    def probe(self, classes: int) -> LanguageExamples:
        """Return three made-up sequences of different lengths, of which one starts with tokens that are not learned."""
        del classes
        ids = self.tokenizer(list(PROBES), truncation=True, max_length=PROBE_TOKENS)["input_ids"]
        sequences = []
        for number, tokens in enumerate(ids):
            tokens = np.asarray(tokens[: max(8, int(self.lengths.max()))] or [0, 0], dtype=np.int64)
            first = len(tokens) // 2 if number == 0 else 1
            sequences.append(TokenSequence(tokens, np.arange(len(tokens)) >= max(1, first)))
        return LanguageExamples(sequences, self.tokenizer)

    def continuation(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens to continue and the reference: the last stretch of learned tokens, or half of all.

        All of a plain text is learned, so its first half is the prompt.
        """
        sequence = self._sequences[row]
        start, end = last_stretch(sequence.learned)
        if start <= 1:
            start = max(1, (start + end) // 2)
        return sequence.ids[:start], sequence.ids[start:end]


def token_losses(logits_BTV: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of each learned token [B, T], 0 where there is none, and where there is one."""
    _, targets_BT = _targets(batch)
    targets_BT = targets_BT.to(logits_BTV.device)
    # flat: the version over [B, V, T] has no deterministic kernel on a GPU
    flat = cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view_as(targets_BT), targets_BT != IGNORED


def last_stretch(learned: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the start and the end of the last run of learned tokens; two equal numbers where there is none."""
    places = np.flatnonzero(learned)
    if not len(places):
        return len(learned), len(learned)
    end = int(places[-1]) + 1
    before = np.flatnonzero(~learned[:end])
    return (int(before[-1]) + 1 if len(before) else 0), end


def _targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.positions_BT is None or batch.targets_BT is None:
        raise ValueError("This batch has no learned tokens.")
    return batch.positions_BT, batch.targets_BT


def _at(states_BSH: torch.Tensor, positions_BT: torch.Tensor, width: int) -> torch.Tensor:
    """Return the states at these positions [B, T, H]; a soft prompt in front of the tokens shifts them."""
    index_BT = positions_BT + (states_BSH.shape[1] - width)
    return states_BSH.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, states_BSH.shape[2]))


@contextmanager
def _only_at(head: nn.Module, positions_BT: torch.Tensor, width: int) -> Iterator[None]:
    """Let ``head`` see these positions only: a vocabulary of logits for every token of a prompt is wasted.

    First of its hooks, so that whatever records activations for per-example gradients sees the same.
    """

    def pick(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (_at(args[0], positions_BT, width), *args[1:])

    handle = head.register_forward_pre_hook(pick, prepend=True)
    try:
        yield
    finally:
        handle.remove()
