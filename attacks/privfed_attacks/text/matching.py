"""The search of gradient matching: continuous on embeddings, discrete on their order, and on words at the end.

Shape suffixes: B examples, S positions, e width of a token's embedding, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from privfed.errors import ConfigError
from privfed.models.examples import device_of
from privfed_attacks.inversion import ATTACKS, Reconstruction, Setting
from privfed_attacks.observation import Observation
from privfed_attacks.public_model import PublicModel
from privfed_attacks.text.simulate import Simulation, twice_differentiable

if TYPE_CHECKING:
    from privfed_attacks.inversion.matching import MatchingConfig


class Matcher:
    """One search.

    Args:
        observations: Updates on the same batch.
        model: The adversary's model.
        setting: What is known of the batch.
        config: The attack's options.
    """

    def __init__(
        self, observations: Sequence[Observation], model: PublicModel, setting: Setting, config: MatchingConfig
    ) -> None:
        if not setting.sequences:
            raise ConfigError("Gradient matching needs the number of examples: set Setting.sequences.")
        if not observations[0].side.label_names:
            raise ConfigError("Gradient matching is for classifiers: this model has no classes.")
        self.model, self.setting, self.config = model, setting, config
        self.draw = torch.Generator().manual_seed(setting.seed)
        module = model.at(observations[-1])
        self.device = device_of(module)
        self.table_Ve = _embedding(module)
        self.special = sorted(set(model.tokenizer.all_special_ids))
        self.labels_B = torch.tensor(_labels(observations, model, setting), device=self.device)
        self.lengths = setting.lengths or (setting.max_tokens,) * setting.sequences
        longest = max(self.lengths)
        self.mask_BS = torch.zeros(len(self.lengths), longest, dtype=torch.long, device=self.device)
        for row, length in enumerate(self.lengths):
            self.mask_BS[row, :length] = 1
        self.fixed_BS = self._fixed()
        self.simulations = [Simulation(module, each) for each in observations[-config.rounds :]]
        words = torch.ones(len(self.table_Ve), dtype=torch.bool)
        words[self.special] = False
        self.words = words.nonzero()[:, 0].to(self.device)
        self.usual = self.table_Ve[self.words].norm(dim=-1).mean()
        self.prior = Bigrams(model.tokenizer, setting.auxiliary)

    def reconstruct(self) -> Reconstruction:
        """Return what was found."""
        embeddings_BSe = self._first()
        free = (self.fixed_BS < 0)[..., None]
        optimizer = torch.optim.Adam([embeddings_BSe.requires_grad_(True)], lr=self.config.learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.config.steps, eta_min=self.config.learning_rate / 10
        )
        for step in range(1, self.config.steps + 1):
            loss = self._loss(embeddings_BSe) + self._length_penalty(embeddings_BSe)
            (gradient,) = torch.autograd.grad(loss, embeddings_BSe)
            embeddings_BSe.grad = gradient * free
            optimizer.step()
            decay.step()
            if self.config.moves and step % self.config.move_every == 0:
                self._move(embeddings_BSe)
        tokens_BS = self._projected(embeddings_BSe.detach())
        if self.config.polish:
            tokens_BS = self._polished(tokens_BS, embeddings_BSe.detach())
        texts = tuple(tuple(row[:length]) for row, length in zip(tokens_BS.tolist(), self.lengths, strict=True))
        found = frozenset(token for text in texts for token in text) - set(self.special)
        return Reconstruction(
            tokens=found,
            sequences=texts,
            labels=dict(Counter(self.labels_B.tolist())),
            facts={"loss": round(self._discrete_loss(tokens_BS), 6), "objective": self.config.objective},
        )

    def _fixed(self) -> torch.Tensor:
        """Return the special tokens where they are known to be [B, S], and -1 elsewhere."""
        tokenizer = self.model.tokenizer
        fixed = torch.full_like(self.mask_BS, -1)
        fixed[self.mask_BS == 0] = int(tokenizer.pad_token_id or 0)
        if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
            fixed[:, 0] = int(tokenizer.cls_token_id)
            for row, length in enumerate(self.lengths):
                fixed[row, length - 1] = int(tokenizer.sep_token_id)
        return fixed

    def _first(self) -> torch.Tensor:
        """Return the random start with the least loss: words drawn from the vocabulary."""
        best, least = None, math.inf
        for _ in range(self.config.starts):
            drawn = self.words[torch.randint(len(self.words), self.fixed_BS.shape, generator=self.draw)]
            tokens = torch.where(self.fixed_BS < 0, drawn, self.fixed_BS)
            loss = self._discrete_loss(tokens)
            if best is None or loss < least:
                best, least = self.table_Ve[tokens], loss
        if best is None:
            raise ConfigError("Gradient matching needs at least one start.")
        return best.clone()

    def _loss(self, embeddings_BSe: torch.Tensor) -> torch.Tensor:
        losses = []
        with twice_differentiable():
            for simulation in self.simulations:
                made = simulation.update(embeddings_BSe, self.mask_BS, self.labels_B)
                losses.append(distance(made, simulation.observed, self.config.objective, self.config.l1))
        return torch.stack(losses).mean()

    def _discrete_loss(self, tokens_BS: torch.Tensor) -> float:
        return float(self._loss(self.table_Ve[tokens_BS]).detach())

    def _length_penalty(self, embeddings_BSe: torch.Tensor) -> torch.Tensor:
        if not self.config.norm_weight:
            return embeddings_BSe.new_zeros(())
        return self.config.norm_weight * (embeddings_BSe.norm(dim=-1).mean() / self.usual - 1) ** 2

    def _nearest(self, embeddings_BSe: torch.Tensor, count: int) -> torch.Tensor:
        """Return the nearest words by cosine [B, S, count]."""
        unit = torch.nn.functional.normalize(self.table_Ve[self.words], dim=-1)
        scores = torch.nn.functional.normalize(embeddings_BSe, dim=-1) @ unit.T
        return self.words[scores.topk(count, dim=-1).indices]

    def _projected(self, embeddings_BSe: torch.Tensor) -> torch.Tensor:
        return torch.where(self.fixed_BS < 0, self._nearest(embeddings_BSe, 1)[..., 0], self.fixed_BS)

    def _polished(self, tokens_BS: torch.Tensor, embeddings_BSe: torch.Tensor) -> torch.Tensor:
        """Try the nearest few words at each position and keep what makes the loss of the *words* least."""
        near = self._nearest(embeddings_BSe, self.config.polish)
        least = self._discrete_loss(tokens_BS)
        for row, place in (self.fixed_BS < 0).nonzero().tolist():
            for word in near[row, place].tolist():
                if word == int(tokens_BS[row, place]):
                    continue
                tried = tokens_BS.clone()
                tried[row, place] = word
                loss = self._discrete_loss(tried)
                if loss < least:
                    tokens_BS, least = tried, loss
        return tokens_BS

    @torch.no_grad()
    def _score(self, embeddings_BSe: torch.Tensor) -> float:
        with torch.enable_grad():
            loss = float(self._loss(embeddings_BSe).detach())
        unlikely = self.prior.surprise(self._projected(embeddings_BSe).tolist())
        return loss + self.config.prior_weight * unlikely

    def _move(self, embeddings_BSe: torch.Tensor) -> None:
        """Try swaps, and moves of a token or of a run of tokens, in place."""
        least = self._score(embeddings_BSe.detach())
        for _ in range(self.config.moves):
            row = int(torch.randint(len(self.lengths), (1,), generator=self.draw))
            inner = (self.fixed_BS[row] < 0).nonzero()[:, 0]
            if len(inner) < 2:
                continue
            order = self._reordered(inner)
            tried = embeddings_BSe.detach().clone()
            tried[row, inner] = embeddings_BSe.detach()[row, order]
            score = self._score(tried)
            if score < least:
                least = score
                embeddings_BSe.data.copy_(tried)

    def _reordered(self, inner: torch.Tensor) -> torch.Tensor:
        """Return positions in another order: two swapped, one moved, a run moved, or the beginning to the end."""
        places = inner.tolist()
        i, j = sorted(torch.randperm(len(places), generator=self.draw)[:2].tolist())
        kind = int(torch.randint(4, (1,), generator=self.draw))
        if kind == 0:
            places[i], places[j] = places[j], places[i]
        elif kind == 1:
            places.insert(i, places.pop(j))
        elif kind == 2:
            run, rest = places[i:j], places[:i] + places[j:]
            at = int(torch.randint(len(rest) + 1, (1,), generator=self.draw))
            places = rest[:at] + run + rest[at:]
        else:
            places = places[j:] + places[:j]
        return torch.tensor(places, device=inner.device)


class Bigrams:
    """How likely one token follows another in texts from elsewhere, add-one smoothed.

    Args:
        tokenizer: The model's.
        texts: The texts; without any every order is as likely.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str]) -> None:
        self._size = len(tokenizer)
        self._pairs: Counter[tuple[int, int]] = Counter()
        self._firsts: Counter[int] = Counter()
        for text in texts:
            tokens = tokenizer(text)["input_ids"]
            self._pairs.update(pairwise(tokens))
            self._firsts.update(tokens[:-1])

    def surprise(self, texts: Sequence[Sequence[int]]) -> float:
        """Return the mean negative log-probability of each following token."""
        found = [
            -math.log((self._pairs[a, b] + 1) / (self._firsts[a] + self._size))
            for text in texts
            for a, b in pairwise(text)
        ]
        return float(np.mean(found)) if self._pairs and found else 0.0


def distance(
    made: dict[str, torch.Tensor], observed: dict[str, torch.Tensor], objective: str, l1: float
) -> torch.Tensor:
    """Return how far a simulated update is from the observed one, without unit.

    Args:
        made: The simulated update.
        observed: The observed one, of the same tensors.
        objective: ``l2``, ``tag`` or ``cosine``.
        l1: Weight of L1 in ``tag``.
    """
    a = torch.cat([made[name].flatten() for name in observed])
    b = torch.cat([observed[name].flatten() for name in observed])
    if objective == "cosine":
        return 1 - (a @ b) / (a.norm() * b.norm()).clamp_min(1e-30)
    far = ((a - b) ** 2).sum() / (b**2).sum().clamp_min(1e-30)
    return far if objective == "l2" else far + l1 * (a - b).abs().sum() / b.abs().sum().clamp_min(1e-30)


def _labels(observations: Sequence[Observation], model: PublicModel, setting: Setting) -> list[int]:
    if setting.labels is not None:
        return list(setting.labels)
    attack = ATTACKS.get("labels")
    found = attack.run(observations, model, setting, attack.config()).labels
    return [label for label, count in sorted(found.items()) for _ in range(count)]


def _embedding(module: torch.nn.Module) -> torch.Tensor:
    """Return the table of token embeddings [V, e]."""
    found = module.get_input_embeddings()  # type: ignore[operator]
    table: torch.Tensor = found.weight.detach()
    return table
