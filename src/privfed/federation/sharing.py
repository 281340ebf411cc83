"""Which trained values are sent, which stay with a client, and which the server carries beside them.

Shape suffixes: D trained values, S shared values, P personal values, M values sent in a round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.rules import PERIOD, Pair, Rule
from privfed.types import Float32, ParamLayout

HEAD = "head"
T = TypeVar("T", np.float32, np.float64)


class Selection:
    """Some tensors of a layout, as a shorter flat vector in the same order.

    Args:
        layout: The layout.
        names: Names of the tensors to take.
    """

    def __init__(self, layout: ParamLayout, names: Collection[str]) -> None:
        wanted = set(names)
        kept = [i for i, name in enumerate(layout.names) if name in wanted]
        self.whole = len(kept) == len(layout.names)
        ends = np.cumsum([0, *layout.sizes])
        self._slices = [slice(int(ends[i]), int(ends[i + 1])) for i in kept]
        self.layout = layout if self.whole else _sublayout(layout, kept)
        self.size = self.layout.size

    @property
    def names(self) -> tuple[str, ...]:
        """The selected tensors."""
        return self.layout.names

    def take(self, values_D: NDArray[T]) -> NDArray[T]:
        """Return the selected values; the vector itself where all are."""
        if self.whole:
            return values_D
        empty = values_D[:0]
        return np.concatenate([values_D[each] for each in self._slices]) if self._slices else empty

    def put(self, values_D: NDArray[T], selected: NDArray[T]) -> NDArray[T]:
        """Return a copy of ``values_D`` with the selected values replaced.

        Raises:
            ValueError: If ``selected`` has another length.
        """
        if selected.shape != (self.size,):
            raise ValueError(f"Expected {self.size} values, got shape {selected.shape}.")
        if self.whole:
            return selected
        found, start = values_D.copy(), 0
        for each in self._slices:
            width = each.stop - each.start
            found[each] = selected[start : start + width]
            start += width
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One round's part of the trained tensors.

    Attributes:
        sent: What leaves a client and is aggregated.
        active: Names of the tensors that clients train; None for all.
    """

    sent: Selection
    active: frozenset[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How the trained tensors of a phase are shared out between clients and server.

    Attributes:
        rule: The aggregation rule.
        layout: All tensors that clients train, in any round.
        pairs: The model's LoRA pairs, as far as the rule or the meter uses them.
        shared: The trained tensors that are sent in some round.
        personal: The trained tensors that stay with each client.
        carried: Names of tensors that the server changes and broadcasts and that no client trains.
        rates_S: Learning rate times local steps of each shared value, for control variates; empty without them.
        seed: The run's seed.
    """

    rule: Rule
    layout: ParamLayout
    pairs: tuple[Pair, ...]
    shared: Selection
    personal: Selection
    carried: tuple[str, ...]
    rates_S: Float32 = field(repr=False)
    seed: int

    def part(self, round_number: int) -> Part:
        """Return what is trained and sent in a round."""
        resting = self.rule.resting(round_number, self.pairs)
        if not resting:
            return Part(sent=self.shared, active=None)
        active = frozenset(self.layout.names) - resting
        sent = Selection(self.layout, active - set(self.personal.names))
        return Part(sent=sent, active=active)

    def merged(self, shared_S: Float32, personal_P: Float32 | None) -> Float32:
        """Return all trained values [D] from the shared and the personal ones."""
        if personal_P is None or self.shared.whole:
            return shared_S
        values_D = np.zeros(self.layout.size, dtype=np.float32)
        return self.personal.put(self.shared.put(values_D, shared_S), personal_P)

    def largest(self, rounds: int) -> int:
        """Return the most values that any of the rounds sends."""
        return max(self.part(number).sent.size for number in range(1, min(rounds, PERIOD) + 1))

    def turns(self, round_number: int) -> NDArray[np.float64] | int:
        """Return in how many rounds up to this one each of its sent values was sent; one number where all were."""
        part = self.part(round_number)
        if part.active is None:
            return round_number
        counts = dict.fromkeys(part.sent.names, 0)
        for number in range(1, round_number + 1):
            for name in counts.keys() - self.rule.resting(number, self.pairs):
                counts[name] += 1
        return np.repeat([float(counts[name]) for name in part.sent.names], part.sent.layout.sizes)

    def must_move(self, rounds: int, local_steps: int) -> frozenset[str]:
        """Return the names of trained tensors that have to differ from their start after so many rounds."""
        at_rest = [self.rule.resting(number, self.pairs) for number in range(1, min(rounds, PERIOD) + 1)]
        never = frozenset.intersection(*at_rest)
        personal = set(self.personal.names)
        # A has no gradient while B is at its start, 0: in the first step of a client that keeps its own B
        late = {pair.a for pair in self.pairs if pair.b in personal and local_steps == 1}
        return frozenset(self.layout.names) - never - personal - late - self.rule.remade(self.pairs)


def share_out(
    rule: Rule,
    layout: ParamLayout,
    pairs: Sequence[Pair],
    *,
    patterns: Sequence[str],
    head: str | None,
    rates: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Sharing:
    """Divide the trained tensors of ``layout``.

    Args:
        rule: The aggregation rule.
        layout: What is trained.
        pairs: The model's LoRA pairs.
        patterns: ``server.personal``.
        head: Name of the head's module, ``""`` where all that is trained is the head, None without one.
        rates: Learning rate times local steps by tensor, where the rule keeps control variates.
        seed: The run's seed.

    Raises:
        ConfigError: If a pattern matches nothing, nothing is left to share, or a rule's own tensors would be personal.
    """
    kept = {name for pattern in patterns for name in _matches(pattern, layout, head)}
    remade = kept & {name for pair in pairs for name in (pair.a, pair.b)}
    if remade and (rule.carried(pairs) or (rule.needs_individual and not rule.combines)):
        raise ConfigError(
            f"server.personal keeps {sorted(remade)[0]} with the clients, and the rule "
            f'{_name(rule)!r} makes it anew from all of them: leave it out, or use server.aggregation = "fedavg".'
        )
    if kept and rule.changes_base:
        raise ConfigError(
            f"server.personal with the rule {_name(rule)!r}, which changes base weights, would keep a whole model for "
            'each client: use server.aggregation = "fedavg", "rolora" or "fedsvd".'
        )
    personal = kept | rule.personal(pairs)
    shared = Selection(layout, set(layout.names) - personal)
    if not shared.size:
        raise ConfigError("server.personal leaves no trained tensor to share: leave one of its patterns out.")
    by_name = rates or {}
    widths = dict(zip(layout.names, layout.sizes, strict=True))
    parts = [np.full(widths[name], by_name[name], dtype=np.float32) for name in shared.names if name in by_name]
    return Sharing(
        rule=rule,
        layout=layout,
        pairs=tuple(pairs),
        shared=shared,
        personal=Selection(layout, personal),
        carried=rule.carried(pairs),
        rates_S=np.concatenate(parts) if parts else np.empty(0, dtype=np.float32),
        seed=seed,
    )


def _matches(pattern: str, layout: ParamLayout, head: str | None) -> list[str]:
    if pattern == HEAD:
        found = [name for name in layout.names if head is not None and (not head or name.startswith(f"{head}."))]
    else:
        found = [name for name in layout.names if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(
            f"server.personal = {pattern!r} matches none of the trained tensors (such as {layout.names[0]}): "
            'use "head", or a pattern with * such as "*.lora_B.*".'
        )
    return found


def _name(rule: Rule) -> str:
    return type(rule).__module__.rpartition(".")[2]


def _sublayout(layout: ParamLayout, kept: Sequence[int]) -> ParamLayout:
    names = tuple(layout.names[i] for i in kept)
    shapes = tuple(layout.shapes[i] for i in kept)
    digest = hashlib.sha256(json.dumps([names, shapes]).encode()).hexdigest()
    return ParamLayout(names=names, shapes=shapes, digest=digest)
