"""The clients of a phase: shards by id, and a client made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from privfed.types import Shard

if TYPE_CHECKING:
    from privfed.federation.client import Client


class Roster(Mapping[str, "Client"]):
    """All clients, in the order of their ids; each look-up makes the client anew, and none is kept.

    Args:
        shards: One a client.
        make: Makes the client of a shard.
    """

    def __init__(self, shards: Sequence[Shard], make: Callable[[Shard], Client]) -> None:
        self._shards = {shard.client_id: shard for shard in sorted(shards, key=lambda shard: shard.client_id)}
        self._make = make

    def __getitem__(self, client_id: str) -> Client:
        return self._make(self._shards[client_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._shards
