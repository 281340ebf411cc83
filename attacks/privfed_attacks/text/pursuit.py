"""Which inputs together explain what was observed, where each for itself does not show: joint sparse recovery.

The observed rows are combinations of the batch's inputs, R = C X + noise. Where they have as many directions as there
are inputs, each input lies in their span and a test of each for itself is exact (DAGER; elsewhere known as MUSIC). With
fewer directions an input is only *nearer* to the span than others are, and so are words that resemble it. But all
inputs come from a known dictionary and few of its entries are in use: these few explain R together, and hardly any
other few do. Davies, Eldar 2012, "Rank Awareness in Joint Sparse Recovery", IEEE Transactions on Information Theory
58(2), arXiv 1004.4529 (rank-aware order recursive matching pursuit):

1. take the entry that is nearest to the span of what is left, measured outside of all that was taken;
2. take its direction out of the rows; what is left has its span again, without the directions of the noise;
3. stop when only noise is left, or the next is hardly nearer than the vocabulary at large.

Once all but k of the inputs are taken, k the directions seen, the test is exact again. Then what was taken is judged
together: an entry stays at the position where it explains most, and is dropped if its coefficients, by least squares,
are no larger than noise makes them. In the limit of no noise that is exact while fewer entries are taken than the layer
is wide.

Positions are another matter. Before the normalisation an input is a word's vector plus a position's, so "a at 3 and b
at 7" and "a at 7 and b at 3" explain nearly the same rows; a wrong choice leaves a rest, and words that are little more
than their position (reserved entries that training never moved) explain it. So at the end each *word* has to be needed
with all positions free: it is dropped if the other words and differences between positions explain the rows without it.

Shape suffixes: k rows, d width, N words, S positions, M entries of a pool, s entries taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from privfed.errors import ModelError
from privfed_attacks.text.inputs import Site, dictionary, fingerprint, inputs

Array = NDArray[np.float64]
Pair = tuple[int, int]
_DEPENDENT = 1e-3  # an entry with so little of its square outside of those taken says nothing of its own
_INDEPENDENT = 1e-5
_FULL = 0.8
_EXACT = 1e-6  # the dictionary itself is in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When the search stops.

    Attributes:
        margin: How far above the noise's largest singular value the signal's begin.
        share: The next entry's distance is at most this share of the vocabulary's median.
        evidence: The least mean square of an entry's coefficients that stays, in multiples of what noise makes it.
        pool: Entries that are looked at between two passes over the whole dictionary.
        each: Entries taken between two passes.
        passes: Passes at most before the entries' positions are looked at again.
        sweeps: How often that is done at most.
    """

    margin: float = 1.1
    share: float = 0.9
    evidence: float = 4.0
    pool: int = 3000
    each: int = 20
    passes: int = 6
    sweeps: int = 3


class Dictionary:
    """The inputs of all words at all positions, kept in 16 bits: enough to find those that are worth a closer look.

    Args:
        module: The adversary's model.
        site: A site whose input depends on the word alone, or on word and position.
        words: Their tokens.
        positions: S; 1 where the input does not depend on it.
    """

    def __init__(self, module: torch.nn.Module, site: Site, words: NDArray[np.int64], positions: int) -> None:
        self._module, self._site = weakref.ref(module), site
        self.words, self.positions = words, positions
        self._chunks: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []
        for _, x in dictionary(module, site, words, positions):
            self._chunks.append(x.bfloat16())
            self._squares.append((x**2).sum(-1))

    @torch.no_grad()
    def nearest(self, signal_dk: Array, taken_ds: Array, count: int) -> tuple[list[Pair], float]:
        """Return the entries nearest to a span, measured outside of another, and the median over words of nearness."""
        k = signal_dk.shape[1]
        both = torch.from_numpy(np.concatenate([signal_dk, taken_ds], axis=1)).to(self._chunks[0])
        found = []
        for chunk, whole in zip(self._chunks, self._squares, strict=True):
            parts = (chunk @ both).float() ** 2
            outside = whole - parts[..., k:].sum(-1)
            near = parts[..., :k].sum(-1) / outside.clamp_min(1e-12)
            found.append(near.masked_fill(outside < 10 * _DEPENDENT * whole, 0.0))
        near_NS = torch.cat(found)
        best = near_NS.flatten().topk(min(count, near_NS.numel())).indices.tolist()
        pairs = [(int(self.words[i // self.positions]), i % self.positions) for i in best]
        return pairs, float(near_NS.max(dim=1).values.median())

    @torch.no_grad()
    def vectors(self, pairs: Sequence[Pair]) -> Array:
        """Return entries in full precision [M, d].

        Raises:
            ModelError: If the model they are of is no longer there.
        """
        module = self._module()
        if module is None:
            raise ModelError("The model that this dictionary was made of is no longer there.")
        words = sorted({word for word, _ in pairs})
        rows = {word: row for row, word in enumerate(words)}
        parts = []
        for start in range(0, len(words), 512):
            ids = torch.tensor(words[start : start + 512])[:, None].expand(-1, self.positions).contiguous()
            parts.append(inputs(module, [self._site], ids)[self._site.tensor].float().cpu())
        table = torch.cat(parts)
        found: Array = table[[rows[word] for word, _ in pairs], [place for _, place in pairs]].double().numpy()
        return found


_KEPT: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple[bytes, str, int], Dictionary]]
_KEPT = weakref.WeakKeyDictionary()


def dictionary_of(module: torch.nn.Module, site: Site, words: NDArray[np.int64], positions: int) -> Dictionary:
    """Return a model's dictionary; the last one of each model is kept, and used again if its inputs are the same."""
    key = (fingerprint(module, site, len(words)), site.tensor, positions)
    kept = _KEPT.get(module)
    if kept is None or kept[0] != key:
        kept = _KEPT[module] = (key, Dictionary(module, site, words, positions))
    return kept[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What explains the rows.

    Attributes:
        pairs: (token, position) of each entry.
        evidence_s: Of each: its coefficients' mean square, in multiples of what noise would make it.
        left: Root mean square of what is left of the rows, in multiples of the noise: 1 if nothing else is there.
        usual: Median nearness of the vocabulary to the whole span.
    """

    pairs: tuple[Pair, ...]
    evidence_s: Array = field(repr=False)
    left: float
    usual: float


def explain(rows_kd: Array, entries: Dictionary, limits: Limits | None = None) -> Explained:
    """Return the entries of a dictionary that explain rows together.

    Args:
        rows_kd: Rows with noise of standard deviation 1 in every value.
        entries: The dictionary.
        limits: When to stop.
    """
    limits = limits or Limits()
    search = _Search(rows_kd, entries, limits)
    for _sweep in range(limits.sweeps):
        before = list(search.pairs)
        search.take()
        search.move()
        if search.pairs == before:
            break
    return search.judged()


class _Search:
    """Entries taken so far.

    Args:
        rows_kd: The rows.
        entries: The dictionary.
        limits: When to stop.
    """

    def __init__(self, rows_kd: Array, entries: Dictionary, limits: Limits) -> None:
        self.rows_kd, self.entries, self.limits = rows_kd, entries, limits
        rows, width = rows_kd.shape
        noise = limits.margin * (np.sqrt(rows) + np.sqrt(width))
        self.floor = max(float(noise), _EXACT * float(np.linalg.norm(rows_kd, 2)) if rows else 0.0)
        self.most = int(_FULL * width)
        self.pairs: list[Pair] = []
        self.vectors_sd: Array = np.zeros((0, width))
        self.usual = 0.0

    def take(self) -> None:
        """Take entries until the rows are explained or the next is no better than chance."""
        for _ in range(self.limits.passes):
            taken_ds = _orthonormal(self.vectors_sd)
            rest_kd = self.rows_kd - (self.rows_kd @ taken_ds) @ taken_ds.T
            signal_dk = _signal(rest_kd, self.floor)
            if not signal_dk.shape[1] or len(self.pairs) >= self.most:
                return
            pairs, usual = self.entries.nearest(signal_dk, taken_ds, self.limits.pool)
            self.usual = self.usual or usual
            found = self._of_pool(rest_kd, self.entries.vectors(pairs), taken_ds, usual)
            if not found:
                return
            self._add([pairs[i] for i in found])

    def move(self) -> None:
        """Let each entry go to the position where it explains most, the others staying where they are."""
        if self.entries.positions == 1:
            return
        for number in range(len(self.pairs)):
            word, place = self.pairs[number]
            others = np.delete(self.vectors_sd, number, axis=0)
            taken_ds = _orthonormal(others)
            rest_kd = self.rows_kd - (self.rows_kd @ taken_ds) @ taken_ds.T
            held = {p for w, p in self.pairs if w == word} - {place}
            places = [p for p in range(self.entries.positions) if p not in held]
            x = self.entries.vectors([(word, p) for p in places])
            outside = x - (x @ taken_ds) @ taken_ds.T
            gains = np.sum((outside @ rest_kd.T) ** 2, axis=1) / np.maximum(np.sum(outside**2, axis=1), 1e-12)
            best = int(np.argmax(gains))
            self.pairs[number] = word, places[best]
            self.vectors_sd[number] = x[best]

    def judged(self) -> Explained:
        """Drop words that are not needed, then the weakest entry until all are stronger than the noise."""
        needed = self._needed_words()
        kept = np.array([i for i, (word, _) in enumerate(self.pairs) if word in needed], dtype=np.int64)
        while True:
            evidence_s, left = _evidence(self.rows_kd, self.vectors_sd[kept])
            if not len(kept) or evidence_s.min() >= self.limits.evidence:
                pairs = tuple(self.pairs[i] for i in kept)
                return Explained(pairs=pairs, evidence_s=evidence_s, left=left, usual=self.usual)
            kept = np.delete(kept, int(np.argmin(evidence_s)))

    def _needed_words(self) -> set[int]:
        """Return the words without which the rows are not explained, wherever the others stand."""
        words = list(dict.fromkeys(word for word, _ in self.pairs))
        free_pd = self._position_changes(set(words))
        if len(words) + len(free_pd) >= self.most:
            return set(words)  # too little is left of the width to tell by
        anywhere = dict(reversed(self.pairs))
        x_wd = self.entries.vectors([(word, anywhere[word]) for word in words]) if words else self.vectors_sd
        while words:
            evidence = _evidence(self.rows_kd, np.concatenate([x_wd, free_pd]))[0][: len(words)]
            weakest = int(np.argmin(evidence))
            if evidence[weakest] >= self.limits.evidence:
                break
            words.pop(weakest)
            x_wd = np.delete(x_wd, weakest, axis=0)
        return set(words)

    def _position_changes(self, taken: set[int]) -> Array:
        """Return a basis of what a change of position does to an input [p, d]: that of two words not taken."""
        if self.entries.positions == 1:
            return self.vectors_sd[:0]
        others = [int(word) for word in self.entries.words if int(word) not in taken][:2]
        x = self.entries.vectors([(word, place) for word in others for place in range(self.entries.positions)])
        _, values, right = np.linalg.svd(x, full_matrices=False)
        found: Array = right[values > _INDEPENDENT * values[0]]
        return found

    def _of_pool(self, rest_kd: Array, pool_Md: Array, taken_ds: Array, usual: float) -> list[int]:
        """Return which entries of a pool to take, in order."""
        rest_kd = rest_kd.copy()
        found: list[int] = []
        whole_M = np.sum(pool_Md**2, axis=1)
        outside_Md = pool_Md - (pool_Md @ taken_ds) @ taken_ds.T
        while len(found) < min(self.limits.each, self.most - len(self.pairs)):
            signal_dk = _signal(rest_kd, self.floor)
            if not signal_dk.shape[1]:
                break
            outside_M = np.sum(outside_Md**2, axis=1)
            near_M = np.sum((outside_Md @ signal_dk) ** 2, axis=1) / np.maximum(outside_M, 1e-12)
            near_M[outside_M < _DEPENDENT * whole_M] = 0.0
            best = int(np.argmax(near_M))
            if 1 - near_M[best] >= self.limits.share**2 * (1 - usual):
                break
            found.append(best)
            direction = outside_Md[best] / np.sqrt(outside_M[best])
            rest_kd -= np.outer(rest_kd @ direction, direction)
            outside_Md -= np.outer(outside_Md @ direction, direction)
        return found

    def _add(self, pairs: list[Pair]) -> None:
        self.pairs += pairs
        self.vectors_sd = np.concatenate([self.vectors_sd, self.entries.vectors(pairs)])


def _orthonormal(vectors_sd: Array) -> Array:
    """Return an orthonormal basis of rows [d, s]."""
    found: Array = np.linalg.qr(vectors_sd.T)[0]
    return found


def _signal(rows_kd: Array, floor: float) -> Array:
    """Return an orthonormal basis of the rows' directions above the noise [d, k]."""
    squares, left = np.linalg.eigh(rows_kd @ rows_kd.T)
    kept = squares > floor**2
    found: Array = rows_kd.T @ (left[:, kept] / np.sqrt(squares[kept]))
    return found


def _evidence(rows_kd: Array, x_sd: Array) -> tuple[Array, float]:
    """Return each entry's evidence and what all leave of the rows, by least squares."""
    inverse_ss = np.linalg.pinv(x_sd @ x_sd.T, hermitian=True) if len(x_sd) else np.zeros((0, 0))
    coefficients_ks = rows_kd @ x_sd.T @ inverse_ss
    rest = rows_kd - coefficients_ks @ x_sd
    left = float(np.sqrt(np.sum(rest**2) / (len(rows_kd) * max(1, rows_kd.shape[1] - len(x_sd)))))
    spread_s = np.maximum(np.diag(inverse_ss), 1e-30) * max(1.0, left) ** 2
    evidence_s: Array = np.mean(coefficients_ks**2, axis=0) / spread_s if len(x_sd) else np.zeros(0)
    return evidence_s, left
