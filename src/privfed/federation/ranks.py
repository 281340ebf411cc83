"""Clients whose adapters have different ranks.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA), EMNLP, arXiv
2401.06432: a client of rank r_i takes the first r_i rows of A and columns of B, trains them, and sends its update with
zeros for the rest. Updates of all ranks have one length, so sums may be masked, encoded and noised like any others.
The zeros mean *unchanged*: the average moves what few clients train by their share of it.

Who has which rank is in the configuration and no secret, so nothing is charged differently. Under example level the
gradient of the whole adapter is clipped and noised, and what a client does not have is cut off after that. Under client
level the clip bounds the update with its zeros, and the divisor of the sum is the cohort whatever the ranks. The noise
of a sum is as large where few clients train as elsewhere.

A mask hides a client among those that have the same part, so a masked sum in which too few have the largest rank is
never unmasked (:func:`refusal`), as with ``privfed.federation.layers``.

Shape suffix: D trained values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from privfed.errors import ConfigError, ModelError
from privfed.federation.pairs import ADAPTER, find_pairs, read_named
from privfed.rules import Pair
from privfed.types import Float32, ParamLayout, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The part of an adapter that a client of a lower rank has: 1 there, 0 elsewhere.

    Attributes:
        by_name: By tensor, of those that are cut.
        mask_D: The same of all trained values.
    """

    by_name: Mapping[str, Float32] = field(repr=False)
    mask_D: Float32 = field(repr=False)


def deal_ranks(
    ranks: Sequence[int], shards: Sequence[Shard], layout: ParamLayout, module: nn.Module
) -> dict[str, Support]:
    """Return the support of each client, by its id: ``ranks`` in turn over the clients in the order of their ids.

    Args:
        ranks: ``server.ranks``; empty for clients of full rank, which get no support.
        shards: The clients.
        layout: What is trained.
        module: The model, its adapter as it was made.

    Raises:
        ConfigError: If a rank is above a pair's.
        ModelError: If there are no plain LoRA pairs, or their products are not 0 at the start.
    """
    if not ranks:
        return {}
    pairs = _plain_pairs(module)
    supports = {rank: support_of(rank, pairs, layout) for rank in set(ranks)}
    ids = sorted(shard.client_id for shard in shards)
    return {client_id: supports[ranks[place % len(ranks)]] for place, client_id in enumerate(ids)}


def support_of(rank: int, pairs: Sequence[Pair], layout: ParamLayout) -> Support:
    """Return the first ``rank`` rows of every A and columns of every B; all of what belongs to no pair.

    Raises:
        ConfigError: If a pair's rank is lower.
    """
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    by_name = {}
    for name, axis in [each for pair in pairs for each in ((pair.a, 0), (pair.b, 1))]:
        if name not in shapes:
            continue  # a factor that is frozen, or carried by the server
        widest = shapes[name][axis]
        if rank > widest:
            raise ConfigError(f"server.ranks has {rank}, and {name} has rank {widest}: lower it, or raise tuning.r.")
        mask = np.zeros(shapes[name], dtype=np.float32)
        mask[(slice(None),) * axis + (slice(rank),)] = 1.0
        by_name[name] = mask
    parts = [
        np.ravel(by_name.get(name, np.ones(shape, dtype=np.float32)))
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    ]
    return Support(by_name=by_name, mask_D=np.concatenate(parts))


def refusal(supports: Iterable[Support | None], least: int) -> str | None:
    """Return why a client takes part in no masked sum of clients with these parts; None where each is hidden by others.

    What only the clients of the largest rank train is the sum of their updates alone, whatever else was added. All
    other parts are shared by more.

    Args:
        supports: The clients' parts; None for the whole.
        least: Fewest clients that may have a part that not all have.
    """
    sizes = [math.inf if each is None else float(each.mask_D.sum()) for each in supports]
    widest = sizes.count(max(sizes, default=0.0))
    if widest in (0, len(sizes)) or widest >= least:
        return None
    return f"{widest} of these clients have the largest rank, and a masked sum would hide them among fewer than {least}"


def _plain_pairs(module: nn.Module) -> tuple[Pair, ...]:
    """Return the model's pairs; a part of each is an adapter of the same base model only if they start as nothing."""
    pairs = find_pairs(module)
    if not pairs:
        raise ModelError("server.ranks cuts LoRA pairs and this model has none: set server.ranks = [].")
    layers = dict(module.named_modules())
    for pair in pairs:
        place = pair.weight.removesuffix(".base_layer.weight")
        if pair.core is not None or ADAPTER in getattr(layers[place], "lora_variant", {}):
            raise ModelError(
                f"server.ranks cuts B A, and {place} is a variant of LoRA (such as DoRA) that is more than B A: use a "
                'plain tuning.name = "lora", or ranks = [].'
            )
        if read_named(module, [pair.b])[pair.b].any():
            raise ModelError(
                f"server.ranks cuts adapters that start as nothing, and {pair.b} does not start at 0: leave out "
                "tuning.init_lora_weights, or set ranks = []."
            )
    return pairs
