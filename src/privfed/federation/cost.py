"""What a run's masked sums cost, before it trains: its own figures and those of larger cohorts in groups."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from privfed.compression import Ring, plugin_of
from privfed.compression.state import round_context
from privfed.config import RunConfig
from privfed.errors import ConfigError
from privfed.federation.masking import weight_values
from privfed.federation.phases import TRAIN
from privfed.secagg.cost import Groups, Work, grouped

GROUP_SIZE = 50
"""Larger cohorts are planned in groups of so many: the largest complete graph."""
LARGER = (100, 1_000, 10_000, 100_000, 1_000_000)


def run_cost(config: RunConfig, *, length: int | None = None) -> dict[str, Any]:
    """Return the cost of a round: of the run's cohort, and of up to a million clients in groups.

    Args:
        config: The run. Its data are read for the number of clients where it gives no cohort size.
        length: D, the number of trained values; None to load the model and count them.

    Raises:
        ConfigError: If the run does not mask, or its requirements cannot be met.
    """
    if config.secagg.name != "masked":
        raise ConfigError('secagg.name = "none": there is no masked sum to cost; set secagg.name = "masked".')
    if config.server.layers:
        raise ConfigError(
            "server.layers: a client sends a value more for each trained tensor, whose number the length does not say: "
            "a round is not costed; metrics.jsonl says what one took."
        )
    cohort, values = _cohort_and_length(config, length)
    ring_bits, requirements = config.ring_bits(cohort), config.secagg.requirements()
    sent = _encoded(config, cohort, ring_bits, values)
    masked = sent + (weight_values(cohort, ring_bits) if config.server.weighting == "examples" else 0)
    whole = [
        grouped(cohort, cohort, requirements, length=masked, ring_bits=ring_bits, dropped=dropped)
        for dropped in (0.0, config.secagg.dropped)
    ]
    larger = [
        grouped(n, GROUP_SIZE, requirements, length=masked, ring_bits=ring_bits, dropped=config.secagg.dropped)
        for n in LARGER
    ]
    return {
        "clients": cohort,
        "values": values,
        "sent_values": sent,
        "ring_bits": ring_bits,
        "nobody_dropped": asdict(whole[0]),
        "most_dropped": asdict(whole[1]),
        "in_groups": [asdict(one) for one in larger],
        "lines": [*_own(config, whole, sent), *_larger(larger)],
    }


def _encoded(config: RunConfig, cohort: int, ring_bits: int, length: int) -> int:
    """Return how many values of the ring a client sends for an update of ``length``.

    Raises:
        ConfigError: If that depends on more than the length.
    """
    plugin = plugin_of(config.compression)
    codec = plugin.build(config.compression, Ring(bits=ring_bits, clients=cohort))
    if codec.properties.second_pass:
        raise ConfigError(
            f"compression.name = {codec.name!r} sends two sums, whose lengths follow from the shapes of the trained "
            "tensors: a round of it is not costed; metrics.jsonl says what one took."
        )
    return codec.at(round_context(b"", 1, shapes=((length,),))).wire(length).values


def _cohort_and_length(config: RunConfig, length: int | None) -> tuple[int, int]:
    """Return the cohort's size and the number of trained values, reading no more than is needed."""
    cohort = config.server.cohort_size
    if cohort is not None and length is not None:
        return cohort, length
    from privfed.federation.canaries import expected  # loads the data libraries

    material = expected(config)
    if length is None:
        from privfed.federation.workbench import planned_lengths  # loads torch

        length = planned_lengths(config, material)[TRAIN]
    return cohort or len(material.shards), length


def _own(config: RunConfig, whole: list[Groups], values: int) -> list[str]:
    """Return the lines on the run's own cohort."""
    shape = whole[0].group
    return [
        f"{shape.clients} clients a round, {values:,} values in a ring of {shape.ring_bits} bits, "
        f"{shape.degree} neighbours each",
        f"  a client                {_line(whole[0].client)}",
        f"  server, nobody drops    {_line(whole[0].server)}",
        f"  server, {config.secagg.dropped:4.0%} may drop  {_line(whole[1].server)}",
    ]


def _larger(groups: list[Groups]) -> list[str]:
    """Return the lines on larger cohorts."""
    head = f"In groups of {GROUP_SIZE}, whose sums the server learns and adds (most drop):"
    return [
        head,
        *(
            f"  {one.clients:>9,} clients, {one.groups:>6,} groups: a client {_size(one.client.bytes_up)} up; "
            f"server {_size(one.server.bytes_up)} in, {_size(one.server.keystream_bytes)} keystream"
            for one in groups
        ),
    ]


def _line(work: Work) -> str:
    """Return a party's cost as words."""
    return (
        f"{_size(work.bytes_up)} up, {_size(work.bytes_down)} down, {_size(work.keystream_bytes)} keystream, "
        f"{work.signatures:,} signatures"
    )


def _size(count: float) -> str:
    """Return bytes with a unit of a thousand."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise ValueError(count)
