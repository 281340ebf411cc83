"""The search of the subspace attack.

Shape suffixes: B texts, S positions, K candidates of a position, d width of an input, k directions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from privfed.errors import ConfigError
from privfed_attacks.inversion import Reconstruction, Setting
from privfed_attacks.observation import Observation
from privfed_attacks.public_model import PublicModel
from privfed_attacks.text.inputs import Group, dictionary, groups, inputs, masked_batch, payload_rows
from privfed_attacks.text.simulate import twice_differentiable
from privfed_attacks.text.spans import noise_of

if TYPE_CHECKING:
    from privfed_attacks.inversion.subspace import SubspaceConfig


class SoftSpan:
    """A span whose directions count by how much of them is signal.

    Args:
        rows: (rows, standard deviation of the noise in a value) of each matrix.
    """

    def __init__(self, rows: Sequence[tuple[np.ndarray, float]]) -> None:
        if not rows:
            self.weights_k, self.basis_dk = torch.zeros(0), torch.zeros(0, 0)
            return
        stacked = np.concatenate([matrix / max(noise, 1e-30) for matrix, noise in rows])
        _, values, right = np.linalg.svd(stacked, full_matrices=False)
        floor = np.sqrt(stacked.shape[0]) + np.sqrt(stacked.shape[1])
        # what noise adds to a singular value is taken off again, in squares
        signal = np.clip(values**2 - floor**2, 0, None)
        self.weights_k = torch.from_numpy(signal / (signal + floor**2)).float()
        self.basis_dk = torch.from_numpy(np.ascontiguousarray(right.T)).float()

    def distance(self, x: torch.Tensor) -> torch.Tensor:
        """Return squared distances over squared lengths of vectors [..., d]; 1 where nothing was sent."""
        if not self.weights_k.numel():
            return torch.ones(x.shape[:-1])
        size = (x**2).sum(-1).clamp_min(1e-12)
        return 1 - (((x @ self.basis_dk) ** 2) * self.weights_k).sum(-1) / size


class Pull:
    """One search.

    Args:
        observations: Updates on the same texts.
        model: The adversary's model.
        setting: What it knows of the batch.
        config: The attack's options.
    """

    def __init__(
        self, observations: Sequence[Observation], model: PublicModel, setting: Setting, config: SubspaceConfig
    ) -> None:
        if not setting.sequences:
            raise ConfigError("The subspace attack needs the number of examples: set Setting.sequences.")
        self.model, self.setting, self.config = model, setting, config
        self.last = observations[-1]
        self.module = model.at(self.last)
        self.first, self.second = self._spans(observations)
        self.lengths = setting.lengths or (setting.max_tokens,) * setting.sequences

    def reconstruct(self) -> Reconstruction:
        """Return what was found; nothing where the first layer's update is all zeros."""
        if not self.first[1].weights_k.numel():
            return Reconstruction(facts={"signal": 0.0})
        near_SK, distances_SK = self._candidates()
        start_BS = self._start(near_SK)
        table_Ve = self.module.get_input_embeddings().weight.detach()  # type: ignore[operator]
        embeddings = table_Ve[start_BS].clone().requires_grad_(True)
        rate = self.config.learning_rate * float(table_Ve.square().mean().sqrt())
        optimizer = torch.optim.Adam([embeddings], lr=rate)
        mask_BS = self._mask()
        loss = torch.zeros(())
        for _ in range(self.config.steps):
            loss = self._loss(embeddings, start_BS, mask_BS)
            (embeddings.grad,) = torch.autograd.grad(loss, embeddings)
            optimizer.step()
        moved = self._words(embeddings.detach(), table_Ve, near_SK, start_BS)
        first = tuple(tuple(row[:length]) for row, length in zip(start_BS.tolist(), self.lengths, strict=True))
        # off the dictionary everything can be nearer: what counts is how near the words are
        texts = min((first, moved), key=lambda each: self._discrete_loss(each, table_Ve))
        special = set(self.model.tokenizer.all_special_ids)
        return Reconstruction(
            tokens=frozenset(token for text in texts for token in text) - special,
            sequences=texts,
            facts={
                "loss": round(float(loss.detach()), 6),
                "signal": round(float(self.first[1].weights_k.sum()), 2),
                "nearest": round(float(distances_SK.min()), 6),
            },
        )

    def _spans(
        self, observations: Sequence[Observation]
    ) -> tuple[tuple[Group, SoftSpan], tuple[Group, SoftSpan] | None]:
        found = groups(self.module, self.last.layout.names, len(self.model.tokenizer))
        wide = [
            g for g in found if g.first.rows(self.last.payload[g.first.tensor]).shape[1] >= _width(found, self.last)
        ]
        first = next((group for group in wide if group.depth == 0), None)
        if first is None:
            raise ConfigError("No observed tensor is of a layer that sees single tokens: use the attack matching.")
        later = sorted((group for group in wide if group.depth), key=lambda group: -len(group.sites))
        # the first layer's inputs are the same in every round; those of the second move with the adapters below
        spans = [(first, SoftSpan(_rows(first, observations)))]
        spans += [(group, SoftSpan(_rows(group, observations[-1:]))) for group in later[:1]]
        return spans[0], (spans[1] if len(spans) > 1 else None)

    @torch.no_grad()
    def _candidates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest tokens of each position and their distances [S, K]."""
        group, span = self.first
        length = max(self.lengths)
        tokens = np.arange(len(self.model.tokenizer), dtype=np.int64)
        parts = [span.distance(x) for _, x in dictionary(self.module, group.first, tokens, length)]
        distance_VS = torch.cat(parts)
        distance_VS[self.model.tokenizer.all_special_ids] = torch.inf
        found = distance_VS.topk(min(self.config.candidates, len(tokens)), dim=0, largest=False)
        return found.indices.T, found.values.T

    def _start(self, near_SK: torch.Tensor) -> torch.Tensor:
        """Return a first guess [B, S]: the candidates of each position dealt out to the texts."""
        tokenizer = self.model.tokenizer
        start = torch.full((len(self.lengths), near_SK.shape[0]), int(tokenizer.pad_token_id or 0))
        for row, length in enumerate(self.lengths):
            start[row, :length] = near_SK[:length, row % near_SK.shape[1]]
            if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
                start[row, 0], start[row, length - 1] = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
        return start

    def _mask(self) -> torch.Tensor:
        mask = torch.zeros((len(self.lengths), max(self.lengths)), dtype=torch.long)
        for row, length in enumerate(self.lengths):
            mask[row, :length] = 1
        return mask

    def _loss(self, embeddings: torch.Tensor, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        wanted = [(self.first, 1.0)]
        if self.second is not None and self.config.second:
            wanted.append((self.second, self.config.second))
        sites = [group.first for (group, _), _ in wanted]
        with twice_differentiable():
            found = inputs(self.module, sites, ids_BS, mask_BS, embeddings=embeddings)
        real = mask_BS.bool()
        losses = [
            weight * span.distance(found[group.first.tensor].float())[real].mean() for (group, span), weight in wanted
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _discrete_loss(self, texts: Sequence[Sequence[int]], table_Ve: torch.Tensor) -> float:
        ids_BS, mask_BS = masked_batch(texts, int(self.model.tokenizer.pad_token_id or 0))
        return float(self._loss(table_Ve[ids_BS], ids_BS, mask_BS))

    def _words(
        self, embeddings: torch.Tensor, table_Ve: torch.Tensor, near_SK: torch.Tensor, start_BS: torch.Tensor
    ) -> tuple[tuple[int, ...], ...]:
        special = set(self.model.tokenizer.all_special_ids)
        texts = []
        for row, length in enumerate(self.lengths):
            text = []
            for place in range(length):
                if int(start_BS[row, place]) in special:
                    text.append(int(start_BS[row, place]))
                    continue
                options = near_SK[place]
                scores = torch.nn.functional.cosine_similarity(table_Ve[options], embeddings[row, place], dim=-1)
                text.append(int(options[int(scores.argmax())]))
            texts.append(tuple(text))
        return tuple(texts)


def _rows(group: Group, observations: Sequence[Observation]) -> list[tuple[np.ndarray, float]]:
    return [
        (rows, noise_of(observation, site.tensor))
        for observation in observations
        for site, rows in payload_rows(group, observation.payload)
        if np.abs(rows).max(initial=0.0) > 0
    ]


def _width(found: Sequence[Group], observation: Observation) -> int:
    """Return the width of the first layer's input: LoRA's B has a narrow one of its own."""
    return max((g.first.rows(observation.payload[g.first.tensor]).shape[1] for g in found if g.depth == 0), default=0)
