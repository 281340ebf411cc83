"""From tokens and positions to texts, by the second layer: the second half of the span attack.

The input of the second layer at a position depends on the whole text (encoders) or on all before it (decoders). A right
text has all its second-layer inputs in the span of that layer's gradient; with a wrong token anywhere they leave it.

* Decoders: texts grow from the left; a prefix lives while its last input is in the span (DAGER's search).
* Encoders: for each length that an end token allows, a text is improved one position at a time until it passes or
  nothing gets better, from several starts.

Where the second layer's gradient has too few directions for that test (a LoRA of small rank: its span does not hold the
inputs, it lies in theirs), the question is turned round: of several arrangements of the tokens found, the right one is
the one whose inputs *explain* the observed rows in every round. That needs no rank at all, but the whole set of texts
at once; it is what is used for encoders then.

Shape suffixes: N sequences, S positions, d width, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privfed_attacks.observation import Observation
from privfed_attacks.public_model import PublicModel
from privfed_attacks.text.inputs import Group, groups, inputs, masked_batch, payload_rows
from privfed_attacks.text.membership import Members
from privfed_attacks.text.spans import Span, noise_of, span_of

Text = tuple[int, ...]
PASSES, DEVIATIONS = 2e-3, 2.0
_BEAM = 64


@dataclass(slots=True)
class _Second:
    """The second layer in one round."""

    observation: Observation
    group: Group
    span: Span
    rows_nd: NDArray[np.float64] = field(repr=False)


def ordered(
    observations: Sequence[Observation], model: PublicModel, setting: Any, found: Members, *, restarts: int
) -> tuple[Text, ...]:
    """Return the texts that the second layer confirms, as token ids with special tokens.

    Args:
        observations: What was seen.
        model: The adversary's model.
        setting: What it knows of the batch.
        found: The tokens, with positions where the first layer shows them.
        restarts: Starts of the search for a text of an encoder.
    """
    seconds = [each for each in (_second(observation, model) for observation in observations) if each is not None]
    if not seconds:
        return ()
    draw = np.random.default_rng(setting.seed)
    search = _Search(model, seconds, found, setting, draw)
    tokenizer = model.tokenizer
    encoder = tokenizer.sep_token_id is not None and tokenizer.cls_token_id is not None
    if not encoder:
        return search.grown()
    best = max(seconds, key=lambda each: each.span.rank)
    if best.span.rank >= min(len(found.pairs), best.span.width // 2):
        return search.climbed(restarts)
    return search.arranged(restarts)


def _second(observation: Observation, model: PublicModel) -> _Second | None:
    module = model.at(observation)
    found = [each for each in groups(module, observation.layout.names, len(model.tokenizer)) if each.depth >= 1]
    wide = [each for each in found if each.sites[0].rows(observation.payload[each.first.tensor]).shape[1] > 1]
    # of the groups after the first mixing, those with LoRA's narrow inputs say least
    hidden = max((each.first.rows(observation.payload[each.first.tensor]).shape[1] for each in wide), default=0)
    # query, key and value of the second block share their input: the token itself and, mixed in, its context
    for group in sorted(wide, key=lambda each: -len(each.sites)):
        rows = payload_rows(group, observation.payload)
        if rows[0][1].shape[1] * 4 < hidden:
            continue
        span = span_of([(matrix, noise_of(observation, site.tensor)) for site, matrix in rows])
        if span.rank:
            stacked = np.concatenate(
                [matrix / np.linalg.norm(matrix) for _, matrix in rows if np.abs(matrix).max() > 0]
            )
            return _Second(observation=observation, group=group, span=span, rows_nd=stacked)
    return None


class _Search:
    """Looks for texts.

    Args:
        model: The adversary's model.
        seconds: The second layer, in each round that has one.
        found: The tokens.
        setting: What is known of the batch.
        draw: Random starts.
    """

    def __init__(
        self,
        model: PublicModel,
        seconds: list[_Second],
        found: Members,
        setting: Any,
        draw: np.random.Generator,
    ) -> None:
        self.model, self.seconds, self.found, self.setting, self.draw = model, seconds, found, setting, draw
        self.best = max(seconds, key=lambda each: each.span.rank)
        self.now: _Second | None = None
        tokenizer = model.tokenizer
        self.padding = int(tokenizer.pad_token_id or 0)
        self.end = tokenizer.sep_token_id
        self.start = tokenizer.cls_token_id

    def grown(self) -> tuple[Text, ...]:
        """Return texts of a decoder, grown from the left."""
        alive: list[Text] = [()]
        done: list[Text] = []
        for position in range(self.setting.max_tokens):
            longer = [(*prefix, token) for prefix in alive for token in self.found.at(position)]
            kept = self._last_in_span(longer)
            extended = {text[:-1] for text in kept}
            done += [prefix for prefix in alive if prefix and prefix not in extended]
            alive = kept[:_BEAM]
            if not alive:
                break
        return tuple(self._distinct([*done, *alive]))

    def climbed(self, restarts: int) -> tuple[Text, ...]:
        """Return texts of an encoder that pass the second layer's test, each found by itself."""
        passed: dict[Text, float] = {}
        for length in self._lengths():
            choices = [self._choices(position, length) for position in range(length)]
            if not all(choices):
                continue
            for _ in range(restarts):
                text, cost = self._climb(choices)
                if cost < self._limit(text):
                    passed[text] = cost
                if len(passed) == self.setting.sequences:
                    break
        most = self.setting.sequences or len(passed)
        return tuple(sorted(passed, key=lambda text: passed[text])[:most])

    def arranged(self, restarts: int) -> tuple[Text, ...]:
        """Return the arrangement of the tokens into texts that explains the observed rows best."""
        slots = self._slots()
        if slots is None:
            return ()
        best, least = slots, self._unexplained(slots)
        for start in range(restarts):
            tried = best if start == 0 else self._shuffled(best)
            tried, cost = self._swapped(tried)
            if cost < least:
                best, least = tried, cost
        return tuple(tuple(text) for text in best)

    # decoders

    def _last_in_span(self, texts: list[Text]) -> list[Text]:
        if not texts:
            return []
        kept = []
        for start in range(0, len(texts), 512):
            some = texts[start : start + 512]
            distances, expected = self._distances(some)
            limits = np.maximum(PASSES, DEVIATIONS * expected)
            last = [len(text) - 1 for text in some]
            kept += [(float(distances[i, j]), some[i]) for i, j in enumerate(last) if distances[i, j] < limits[i, j]]
        return [text for _, text in sorted(kept)]

    @staticmethod
    def _distinct(texts: list[Text]) -> list[Text]:
        """Leave out texts that are the beginning of another."""
        longest = sorted(set(texts), key=len, reverse=True)
        return [t for i, t in enumerate(longest) if not any(o[: len(t)] == t for o in longest[:i])]

    # encoders, one text at a time

    def _lengths(self) -> list[int]:
        ends = {position for token, position in self.found.pairs if token == self.end}
        if self.setting.lengths is not None:
            return sorted(set(self.setting.lengths))
        if not self.found.positional:
            ends = set(range(2, self.setting.max_tokens))
        return sorted(position + 1 for position in ends if position >= 1)

    def _choices(self, position: int, length: int) -> tuple[int, ...]:
        there = self.found.at(position)
        if position == 0:
            return (int(self.start),) if self.start in there else ()
        if position == length - 1:
            return (int(self.end),) if self.end in there else ()
        return tuple(token for token in there if token not in (self.start, self.end, self.padding))

    def _climb(self, choices: list[tuple[int, ...]]) -> tuple[Text, float]:
        text = [int(self.draw.choice(options)) for options in choices]
        cost = self._cost([tuple(text)])[0]
        for _sweep in range(6):
            before = cost
            for position in self.draw.permutation(len(choices)):
                options = choices[position]
                if len(options) < 2:
                    continue
                tried = [(*text[:position], token, *text[position + 1 :]) for token in options]
                costs = self._cost(tried)
                chosen = int(np.argmin(costs))
                text, cost = list(tried[chosen]), costs[chosen]
            if cost >= before or cost < self._limit(tuple(text)):
                break
        return tuple(text), cost

    def _cost(self, texts: list[Text]) -> list[float]:
        """Return each text's root mean squared distance from the second layer's span."""
        found, _ = self._distances(texts)
        return [float(np.sqrt(np.mean(row[: len(text)] ** 2))) for row, text in zip(found, texts, strict=True)]

    def _limit(self, text: Text) -> float:
        _, expected = self._distances([text])
        return max(PASSES, DEVIATIONS * float(np.sqrt(np.mean(expected**2))))

    @torch.no_grad()
    def _distances(self, texts: list[Text]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (distances from the second layer's span, what the noise explains of them) [N, S]."""
        ids, mask = masked_batch(texts, self.padding)
        x = self._inputs(self.best, ids, mask).float()
        distances, expected = self.best.span.distances(x)
        return distances.double().numpy(), expected.double().numpy()

    def _inputs(self, second: _Second, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the second layer's inputs in a round; its parameters are written only when the round changes."""
        if self.now is not second:
            self.model.at(second.observation)
            self.now = second
        module, site = self.model.phase_module(second.observation.phase), second.group.first
        return inputs(module, [site], ids, mask)[site.tensor]

    # encoders, all texts at once

    def _slots(self) -> list[list[int]] | None:
        """Return a first arrangement: the tokens of each position dealt out to the texts that are long enough."""
        count = self.setting.sequences
        lengths = self._lengths()
        if not count or not lengths or not self.found.positional:
            return None
        lengths = [*lengths, *([lengths[-1]] * count)][: max(count, len(lengths))][-count:]
        texts: list[list[int]] = [[0] * length for length in lengths]
        for position in range(max(lengths)):
            inner = [t for t in texts if len(t) - 1 > position]
            choices = self._choices(position, max(lengths) + 1) or (self.padding,)
            for number, text in enumerate(inner):
                text[position] = choices[number % len(choices)]
        for text in texts:
            text[0], text[-1] = int(self.start), int(self.end)
        return texts

    def _shuffled(self, texts: list[list[int]]) -> list[list[int]]:
        copies = [list(text) for text in texts]
        for position in range(1, max(len(text) for text in texts) - 1):
            rows = [text for text in copies if len(text) - 1 > position]
            values = self.draw.permutation([text[position] for text in rows])
            for text, value in zip(rows, values, strict=True):
                text[position] = int(value)
        return copies

    def _swapped(self, texts: list[list[int]]) -> tuple[list[list[int]], float]:
        cost = self._unexplained(texts)
        for _sweep in range(4):
            before = cost
            for position in range(1, max(len(text) for text in texts) - 1):
                rows = [number for number, text in enumerate(texts) if len(text) - 1 > position]
                for i, first in enumerate(rows):
                    for second in rows[i + 1 :]:
                        if texts[first][position] == texts[second][position]:
                            continue
                        tried = [list(text) for text in texts]
                        tried[first][position], tried[second][position] = (
                            texts[second][position],
                            texts[first][position],
                        )
                        found = self._unexplained(tried)
                        if found < cost:
                            texts, cost = tried, found
            if cost >= before:
                break
        return texts, cost

    @torch.no_grad()
    def _unexplained(self, texts: list[list[int]]) -> float:
        """Return the share of the observed rows that the texts' second-layer inputs leave unexplained, over rounds."""
        ids, mask = masked_batch(texts, self.padding)
        left = []
        for second in self.seconds:
            x = self._inputs(second, ids, mask)[mask.bool()].double().numpy()
            basis, _ = np.linalg.qr(x.T)
            rows = second.rows_nd
            left.append(float(np.sum((rows - rows @ basis @ basis.T) ** 2) / np.sum(rows**2)))
        return float(np.mean(left))
