"""Codecs and the rounds of a run done by hand, with the codec library alone.

Shape suffixes: D trained values, M values given to the codec.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from privfed.compression import CODECS, Ring, plugin_of
from privfed.compression.feedback import corrected, residual
from privfed.compression.message import read, sum_of_one, to_bytes
from privfed.federation.client import _digest
from privfed.federation.codecs import Place
from privfed.federation.messages import Interim
from privfed.privacy.mechanisms import Moment, clip_update
from privfed.privacy.noise import privatise_sum
from privfed.types import EncodedSum

QUANTIZER = {"name": "stochastic_quantizer", "bits": 10, "max_value": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "identity": {"name": "identity"},
    "cast": {"name": "cast"},
    "quantizer": QUANTIZER,
    "sign": {"name": "sign", "error_feedback": True},
    "sign, mean": {"name": "sign", "vote": "mean"},
    "rotated": {"name": "rotated_quantizer", "bits": 8, "max_norm": 4.0},
    "random_k": {"name": "random_k", "density": 0.3, "inner": QUANTIZER},
    "random_k, feedback": {"name": "random_k", "density": 0.3, "unbiased": False, "error_feedback": True},
    "top_k": {"name": "top_k", "density": 0.05},
    "top_k + quantizer": {"name": "top_k", "density": 0.05, "inner": QUANTIZER},
    "count_sketch": {"name": "count_sketch", "rows": 3, "columns": 200, "momentum": 0.5, "max_norm": 2.0},
    "powersgd": {"name": "powersgd", "rank": 1},
    "powersgd, cold": {"name": "powersgd", "rank": 1, "warm_start": False, "inner": QUANTIZER},
    "svd_truncate": {"name": "svd_truncate", "rank": 1, "error_feedback": True},
    "global_mask": {"name": "global_mask", "density": 0.1, "refresh": 2},
    "seed_projection": {"name": "seed_projection", "directions": 64, "error_feedback": True},
}
PRIVACY: dict[str, dict[str, Any]] = {
    "none": {"unit": "none"},
    "example": {"unit": "example"},
    "client": {"unit": "client", "l2_clip_norm": 0.5},
}
CLIP = 0.5


def declared(case: str, masked: bool) -> Any:
    table = CODECS.get(CASES[case]["name"]).config.model_validate(CASES[case])
    return plugin_of(table).declare(table, masked)


CELLS = [
    (case, masking, unit)
    for case in CASES
    for masking in ("none", "masked")
    if masking == "none" or declared(case, True).summable
    for unit in PRIVACY
]


def tables(case: str, masking: str, unit: str, **more: Any) -> dict[str, Any]:
    """Four clients, all of whom take part."""
    server = {"cohort_size": 4, "rounds": 3, **more.pop("server", {})}
    tuning = {"name": "lora", "r": 4}
    return {
        "compression": CASES[case],
        "secagg": {"name": masking},
        "privacy": PRIVACY[unit],
        "server": server,
        "tuning": tuning,
        "client": {"local_steps": 1, "learning_rate": 0.5},
        **more,
    }


@dataclass
class Hand:
    """The rounds of a run done by hand, from what clients trained and what the server broadcast."""

    run: Any
    masked: bool
    unit: str
    state: Any = None
    kept: dict[str, Any] = field(default_factory=dict)
    bytes_up: int = 0
    codec: Any = None

    def codec_of(self, number: int) -> Any:
        config, sent = self.run.config.compression, self.run.phase.sharing.part(number).sent
        ring = Ring(bits=self.run.config.ring_bits(4), clients=4) if self.masked else None
        base = plugin_of(config).build(config, ring)
        if self.state is None:
            self.state = base.start_state(sent.size)
        place = Place(seed=self.run.config.seed, run_id="run", phase="train", round=number)
        return base.at(place.context(sent.layout, base.public_state(self.state)))

    def round(self, number: int, updates: dict[str, Any], broadcast: bytes) -> Any:
        """Return the averaged update of a round."""
        codec, length = self.codec_of(number), len(next(iter(updates.values())))
        given, digests = {}, {}
        for client, update in updates.items():
            own = {"residual." + self._part(number): self.kept[client]} if client in self.kept else {}
            digests[client] = _digest(broadcast, own)
            vector = corrected(update, self.kept.get(client))
            given[client] = clip_update(vector, CLIP) if self.unit == "client" else vector
        encoded, mean = self._exchange(codec, given, digests, number, length, broadcast, b"")
        if codec.properties.second_pass:
            told = codec.between(mean, length)
            interim = Interim(phase="train", round=number, values=told).to_bytes()
            first = codec
            own = {c: first.second(told, length, first.linear_sum(sum_of_one(e, first))) for c, e in encoded.items()}
            codec = first.second(told, length, mean)
            again = {c: hashlib.sha256(d.encode() + interim).hexdigest() for c, d in digests.items()}
            encoded, mean = self._exchange(codec, given, again, number, length, broadcast, interim)
        if codec.properties.stateful:
            mine = own if self.run.phase.codec.properties.second_pass else dict.fromkeys(given, codec)
            self.kept = {client: residual(mine[client], given[client], encoded[client]) for client in given}
        mean_D, self.state = codec.expand(mean, self.state, length)
        self.codec = codec
        return mean_D

    def _exchange(
        self, codec: Any, given: dict[str, Any], digests: dict[str, str], number: int, length: int, broadcast: bytes,
        interim: bytes,
    ) -> tuple[dict[str, Any], Any]:  # fmt: skip
        holder = self.run.holder
        encoded = {
            client: codec.encode(vector, holder.stream("encode", client, "train", number, digests[client]))
            for client, vector in given.items()
        }
        linear = codec.linear_sum(self._total(codec, encoded, length))
        if self.unit != "client":
            return encoded, linear / len(given)
        phase = "train, second pass" if interim else "train"
        digest = Moment(phase=phase, round=number, broadcast=broadcast + interim).digest(linear)
        sums = 2 if self.run.phase.codec.properties.second_pass else 1
        bound = codec.l2_bound(CLIP, length)
        noised = privatise_sum(
            linear,
            standard_deviation=self.run.plan.noise_multiplier * bound * np.sqrt(sums),
            stream=holder.stream("noise", phase, number, digest),
            sensitivity=bound,
        )
        return encoded, noised / 4

    def _total(self, codec: Any, encoded: dict[str, Any], length: int) -> EncodedSum:
        first = next(iter(encoded.values()))
        if self.masked:
            ring = np.uint64((1 << first.num_bits) - 1)
            total: Any = np.sum([e.values_M.astype(np.uint64) for e in encoded.values()], axis=0) & ring
            scale = first.scale
        else:
            messages = [to_bytes(e, client_id=client, weight=1.0) for client, e in encoded.items()]
            self.bytes_up += sum(map(len, messages))
            received = [read(message, length=length, codec=codec) for message in messages]
            total, scale = np.sum([each.values for each in received], axis=0), received[0].scale
        return EncodedSum(
            sum_M=total,
            codec=codec.name,
            scale=scale,
            length=length,
            survivors=len(encoded),
            total_weight=float(len(encoded)),
        )

    def _part(self, number: int) -> str:
        return str(self.run.phase.sharing.part(number).sent.layout.digest[:12])


def recording(run: Any, recorded: Any) -> dict[str, Any]:
    trainers = {name: recorded(run.stage.trainer) for name in run.phase.clients}
    run.trainers(lambda client: trainers[client.shard.client_id])
    return trainers
