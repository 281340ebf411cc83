"""The clients of a phase, or their keys: shards by id, and what belongs to one made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from privfed.types import Shard

T = TypeVar("T")


class Roster(Mapping[str, T]):
    """All clients, in the order of their ids; each look-up makes what is asked for anew, and nothing is kept.

    Args:
        shards: One a client.
        make: Makes the client of a shard, or what else belongs to it.
    """

    def __init__(self, shards: Sequence[Shard], make: Callable[[Shard], T]) -> None:
        self._shards = {shard.client_id: shard for shard in sorted(shards, key=lambda shard: shard.client_id)}
        self._make = make

    def __getitem__(self, client_id: str) -> T:
        return self._make(self._shards[client_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._shards
