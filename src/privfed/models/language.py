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

from privfed.errors import ModelError
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
        if batch.owners_BT is None or batch.learned_N is None:
            return losses_BT.sum(dim=1) / learned_BT.sum(dim=1).clamp(min=1)
        learned_N = batch.learned_N.to(losses_BT.device)
        return by_owner(losses_BT, batch.owners_BT, len(learned_N)) / learned_N.clamp(min=1)

    def packed(self, rows: Rows, longest: int) -> Batch:
        """Return the examples ``rows`` in sequences of at most ``longest`` tokens, or as long as the longest of them.

        Positions start anew with each example. A model of transformers that makes its mask of them lets no token see
        those of another example; there is no attention mask, which would tell it otherwise. Longer examples are placed
        first, each where it first fits.
        """
        chosen = [self._sequences[row] for row in rows]
        packs = _packs([len(each.ids) for each in chosen], longest)
        width = max(sum(len(chosen[n].ids) for n in pack) for pack in packs)
        most = max(1, *(sum(int(chosen[n].learned.sum()) for n in pack) for pack in packs))
        ids, places = (np.zeros((len(packs), width), dtype=np.int64) for _ in range(2))
        positions, targets, owners = (np.full((len(packs), most), fill, dtype=np.int64) for fill in (0, IGNORED, -1))
        for row, pack in enumerate(packs):
            start = done = 0
            ids[row] = chosen[pack[0]].ids[0]  # what fills up is never read, and a padding token would be warned of
            for number in pack:
                sequence, learned = chosen[number], np.flatnonzero(chosen[number].learned)
                ids[row, start : start + len(sequence.ids)] = sequence.ids
                places[row, start : start + len(sequence.ids)] = np.arange(len(sequence.ids))
                here = slice(done, done + len(learned))
                positions[row, here], targets[row, here] = start + learned - 1, sequence.ids[learned]
                owners[row, here] = number
                start, done = start + len(sequence.ids), here.stop
            places[row, start:] = np.arange(width - start)  # what fills up is a record of its own
        return Batch(
            {"input_ids": torch.from_numpy(ids), "position_ids": torch.from_numpy(places)},
            positions_BT=torch.from_numpy(positions),
            targets_BT=torch.from_numpy(targets),
            owners_BT=torch.from_numpy(owners),
            learned_N=torch.tensor([int(each.learned.sum()) for each in chosen]),
        )

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


def by_owner(values_BT: torch.Tensor, owners_BT: torch.Tensor, count: int) -> torch.Tensor:
    """Return the sum of the values of each of ``count`` examples [N]; a product, which a GPU adds up in one order."""
    numbers_N = torch.arange(count, device=values_BT.device)
    picks = owners_BT.to(values_BT.device).flatten() == numbers_N[:, None]
    return picks.to(values_BT.dtype) @ values_BT.flatten()


def packs_are_apart(module: nn.Module, examples: LanguageExamples) -> bool:
    """Return whether examples that share a sequence get the losses that they get alone, on made-up ones.

    Raises:
        ModelError: If the model cannot be given positions, or puts a soft prompt in front of each sequence.
    """
    prompted = getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False)
    if prompted:
        raise ModelError(
            "model.packing = true with a tuning that puts a soft prompt in front of a sequence: of the records packed "
            'into one, only the first would follow it; set model.packing = false, or use tuning.name = "ffa_lora".'
        )
    probe = examples.probe(0)
    rows, training = np.arange(len(probe)), module.training
    module.eval()
    try:
        with torch.no_grad():
            alone = probe.losses(module, probe.batch(rows))
            together = probe.losses(module, probe.packed(rows, int(probe.lengths.sum())))
    except TypeError as error:
        raise ModelError(
            f"model.packing = true: {type(module).__name__} takes no position_ids, by which packed records start anew; "
            "set model.packing = false."
        ) from error
    finally:
        module.train(training)
    return torch.allclose(alone, together, rtol=1e-3, atol=1e-4)


def _packs(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Return the numbers of the examples in each pack: longer ones first, each in the first pack with room."""
    packs: list[list[int]] = []
    room: list[int] = []
    capacity = max(longest, *lengths)
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        place = next((n for n, left in enumerate(room) if left >= lengths[number]), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(capacity)
        packs[place].append(number)
        room[place] -= lengths[number]
    return packs


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
