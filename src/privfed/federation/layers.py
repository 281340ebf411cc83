"""Clients that train only some layers, and averages over those that trained each tensor.

A client trains the tensors of its blocks and those of no block; the rest of the model is there and stands still. Its
update has zeros for what it did not train, so that updates of all clients have one length. The average of a tensor is
its sum over the sum of the weights of those clients that trained it; a tensor that none of them trained stays as it is,
with what the server's optimiser remembers of it.

*Where the weights come from.* Each client sends, beside its values, its weight for each tensor that it trained and 0
for the others. Under masking they are values of the same masked vector: the server learns their sums and divides by
those, and never which clients a sum is made of. It needs no list of who trains what.

*What a sum shows.* A tensor that one survivor trained has that client's update for its sum, whatever else was added: a
mask hides a client among those that trained the same tensor. So clients, who know from the configuration what each
client trains, take part in no sum in which any tensor was trained by fewer than two more than may be corrupt (and by
more than none). Here that is one check of the survivors before anything is unmasked; in a deployment each client has to
make it of the list that it signs.

*Privacy of examples.* The gradient over the client's own tensors is what is clipped and noised: DP-SGD on a smaller
model, of the same sensitivity, sampling and steps. The other tensors do not move, whatever the data.

*Privacy of clients.* Who came is protected, and so is by how many each tensor was trained: no counts are sent. The
update is clipped with its zeros and the noised average over the expected cohort is multiplied, for each tensor, by all
clients over those that train it: public numbers, so this is post-processing, and the noise grows by the same factor.

Shape suffixes: T tensors that are sent, M values that are sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from privfed.errors import ConfigError, ModelError
from privfed.federation.sharing import Selection
from privfed.tuning.targets import blocks
from privfed.types import ParamLayout, Shard

OTHERS = 2
"""Of the clients that trained a tensor, so many at least are honest: one would be laid bare by the corrupt ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Who trains what.

    Attributes:
        by_client: Names of the tensors that a client trains.
    """

    by_client: Mapping[str, frozenset[str]] = field(repr=False)

    def trained(self, client_id: str, sent: Selection) -> NDArray[np.bool_]:
        """Return which of the sent tensors a client trains [T]."""
        own = self.by_client[client_id]
        return np.array([name in own for name in sent.names], dtype=bool)

    def shares(self, sent: Selection) -> NDArray[np.float64]:
        """Return by which share of all clients each of the sent tensors is trained [T]."""
        return self._counts(self.by_client, sent) / len(self.by_client)

    def refusal(self, clients: Iterable[str], sent: Selection, least: int) -> str | None:
        """Return why a client takes part in no masked sum over these ones; None where each is hidden by others.

        Args:
            clients: Whose sum it is.
            sent: What is sent.
            least: Fewest clients that may have trained a tensor, if any did.
        """
        counts_T = self._counts(clients, sent)
        few = np.flatnonzero((counts_T > 0) & (counts_T < least))
        if not few.size:
            return None
        return (
            f"{counts_T[few[0]]} of these clients trained {sent.names[few[0]]}, and a masked sum would hide them among "
            f"fewer than {least}"
        )

    def _counts(self, clients: Iterable[str], sent: Selection) -> NDArray[np.int64]:
        counts_T = np.zeros(len(sent.names), dtype=np.int64)
        for client_id in clients:
            counts_T += self.trained(client_id, sent)
        return counts_T


def deal_layers(
    groups: Sequence[Sequence[int]], shards: Sequence[Shard], layout: ParamLayout, module: nn.Module
) -> Layers | None:
    """Return who trains what: ``groups`` in turn over the clients in the order of their ids.

    Args:
        groups: ``server.layers``; empty where all train all.
        shards: The clients.
        layout: What is trained.
        module: The model.

    Raises:
        ConfigError: If there is no such block, no client trains one, or a client trains nothing.
        ModelError: If nothing that is trained lies in a block.
    """
    if not groups:
        return None
    places = block_numbers(layout, module)
    numbers = {number for number in places.values() if number is not None}
    for number in (number for group in groups for number in group):
        if number not in numbers:
            raise ConfigError(
                f"server.layers names block {number}, in which nothing is trained: expected some of {sorted(numbers)}."
            )
    ids = sorted(shard.client_id for shard in shards)
    dealt = {client_id: groups[place % len(groups)] for place, client_id in enumerate(ids)}
    missing = numbers - {number for group in dealt.values() for number in group}
    if missing:
        raise ConfigError(
            f"server.layers leaves block {min(missing)} to no client: add it to a group, or leave it out of the tuning "
            f"(tuning.layers_to_transform = {sorted(numbers - missing)})."
        )
    by_client = {
        client_id: frozenset(name for name, number in places.items() if number is None or number in group)
        for client_id, group in dealt.items()
    }
    idle = [client_id for client_id, names in by_client.items() if not names]
    if idle:
        raise ConfigError(f"server.layers gives {idle[0]} nothing to train: leave out its empty group.")
    return Layers(by_client=by_client)


def block_numbers(layout: ParamLayout, module: nn.Module) -> dict[str, int | None]:
    """Return the number of the block that each trained tensor lies in, None for one in no block.

    Blocks of an encoder and a decoder are numbered alike, as in peft.

    Raises:
        ModelError: If no trained tensor lies in a block.
    """
    numbers = {f"{name}.": int(name.rpartition(".")[2]) for name, _ in blocks(module)}
    found = {
        name: next((number for block, number in numbers.items() if name.startswith(block)), None)
        for name in layout.names
    }
    if all(number is None for number in found.values()):
        raise ModelError(
            f"server.layers deals out blocks, and no trained tensor (such as {layout.names[0]}) lies in one: set "
            'server.layers = [], or choose a tuning of the blocks such as "lora".'
        )
    return found


def over_trained(
    mean_M: NDArray[np.float64], total: float, weights_T: NDArray[np.float64], sent: Selection
) -> NDArray[np.float64]:
    """Return the average of each tensor over those that trained it, and 0 where nobody did.

    Args:
        mean_M: The sum of all updates over ``total``.
        total: What it was divided by.
        weights_T: Sum of the weights of those that trained each tensor.
        sent: The tensors.
    """
    factors_T = np.divide(total, weights_T, out=np.zeros_like(weights_T), where=weights_T > 0)
    averaged_M: NDArray[np.float64] = mean_M * np.repeat(factors_T, sent.layout.sizes)
    return averaged_M


def moving(weights_T: NDArray[np.float64], sent: Selection) -> Selection:
    """Return those of the sent tensors that anybody trained, as a selection of what is sent."""
    return Selection(sent.layout, [name for name, weight in zip(sent.names, weights_T, strict=True) if weight > 0])
