"""The ``[privacy.distributed]`` table, and what ``placement = "distributed"`` cannot be combined with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from privfed.schedule import ClientConfig, HeadWarmStart, ServerConfig
from privfed.table import Table


class DistributedConfig(Table):
    """How clients add the noise of their sum in shares. Cohort, ``corrupt`` and ``n_min`` are those of ``[secagg]``.

    Attributes:
        noise: Law of a share: ``skellam`` (sums of it are Skellam again) or ``discrete_gaussian``.
        scale: Integer steps per unit of an update; None for 5 sqrt(d) / l2_clip_norm, with d values sent: the noise is
            then 0.5% larger than the Gaussian's for the same budget. More costs ring bits, less costs noise.
        rotate: Spread each vector evenly by a public random rotation: fewer ring bits, and a second of work for
            millions of values.
        overflow: The largest probability, a round, that any value of a sum may leave its ring (which spoils the sum,
            and reveals nothing).
    """

    noise: Literal["skellam", "discrete_gaussian"] = "skellam"
    scale: float | None = Field(default=None, gt=0)
    rotate: bool = False
    overflow: float = Field(default=1e-9, gt=0, le=1e-3)


def check_distributed(
    *,
    unit: str,
    relation: str,
    client: ClientConfig,
    server: ServerConfig,
    warm: HeadWarmStart,
    secagg: str,
    compression: str,
) -> None:
    """Refuse what distributed noise is not proved for.

    Args:
        unit: The privacy unit.
        relation: The neighbouring relation.
        client: The ``[client]`` table.
        server: The ``[server]`` table.
        warm: The ``[head_warm_start]`` table.
        secagg: Name of the secure aggregation.
        compression: Name of the codec.

    Raises:
        ValueError: A sentence that names both sides and the nearest that works.
    """
    _check_sum(server, secagg, compression)
    if unit != "example":
        return
    if relation == "replace_one":
        raise ValueError(
            'privacy.neighboring_relation = "replace_one" with placement = "distributed": integer noise on sampled '
            'examples is accounted for "add_or_remove_one" only; use that'
        )
    _check_step("client", client.optimizer, client.local_steps)
    if client.momentum or client.weight_decay or client.proximal_mu:
        raise ValueError(
            'privacy.placement = "distributed" with unit = "example" sums gradients alone; set client.momentum, '
            "weight_decay and proximal_mu to 0.0"
        )
    if warm.name != "none":
        _check_step("head_warm_start", warm.optimizer, warm.local_steps)


def _check_sum(server: ServerConfig, secagg: str, compression: str) -> None:
    with_ = 'with privacy.placement = "distributed"'
    if secagg != "masked":
        raise ValueError(
            f"secagg.name = {secagg!r} {with_}: a single update has only its own share of the noise, and the server "
            'would see it; use secagg.name = "masked"'
        )
    if compression != "identity":
        raise ValueError(
            f"compression.name = {compression!r} {with_}: rounding to integers with noise is the encoding, and no "
            'codec comes before or after it; use compression.name = "identity"'
        )
    if server.weighting != "uniform":
        raise ValueError(
            f"server.weighting = {server.weighting!r} {with_}: what one unit adds is bounded in an unweighted sum "
            'only; use weighting = "uniform"'
        )
    if server.rule != "fedavg":
        raise ValueError(
            f"server.aggregation = {server.rule!r} {with_} is not available: only plain sums are proved; use "
            'aggregation = "fedavg", or placement = "local" or "central"'
        )
    if server.personal:
        raise ValueError(
            f"server.personal = {server.personal} {with_}: what stays with a client would get no noise; use "
            'personal = [], or placement = "local"'
        )
    if server.ranks:
        raise ValueError(
            f"server.ranks = {server.ranks} {with_}: shares of the noise are as long as the whole adapter; use "
            'ranks = [], or placement = "local" or "central"'
        )
    if server.layers:
        raise ValueError(
            f"server.layers = {server.layers} {with_}: shares of the noise are as long as all that is trained; use "
            'layers = [], or placement = "local" or "central"'
        )
    if server.meter:
        raise ValueError(f"server.meter = true {with_}: it reads what single clients sent; use meter = false")


def _check_step(table: str, optimizer: str, local_steps: int) -> None:
    if (optimizer, local_steps) != ("sgd", 1):
        raise ValueError(
            f'{table}.optimizer = "{optimizer}" with {table}.local_steps = {local_steps}: under placement = '
            '"distributed" and unit = "example" a client sends one sum of clipped gradients a round, which the server '
            f'takes one step with; use {table}.optimizer = "sgd" and {table}.local_steps = 1'
        )
