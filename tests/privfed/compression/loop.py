"""The smallest federation that drives every codec: n clients, a link that adds (plainly or in a ring), a server."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from privfed.compression import CODECS, Ring, RoundContext
from privfed.compression.feedback import corrected, residual
from privfed.compression.message import read, sum_of_one, to_bytes
from privfed.rng import PrivateStream
from privfed.types import EncodedSum

SHAPES = ((16, 12), (30,), (8, 5, 4), ())
NAMES = ("first.weight", "first.bias", "second.scores", "scale")
LENGTH = 383
# what clients train from
GIVEN_D = np.random.default_rng(21).standard_normal(LENGTH).astype(np.float32)

QUANTIZER = {"name": "stochastic_quantizer", "bits": 6, "max_value": 4.0}
# every codec, with options under which it does something to 383 values, and the chains
CASES = {
    "identity": {"name": "identity"},
    "bfloat16": {"name": "cast"},
    "float16": {"name": "cast", "dtype": "float16"},
    "quantizer": {"name": "stochastic_quantizer", "max_value": 4.0},
    "quantizer, 1 bit": {"name": "stochastic_quantizer", "bits": 1, "max_value": 4.0},
    "quantizer, 16 bits": {"name": "stochastic_quantizer", "bits": 16, "max_value": 4.0},
    "quantizer, l2": {"name": "stochastic_quantizer", "bits": 5, "range": "l2", "max_value": 4.0},
    "sign": {"name": "sign"},
    "sign, mean": {"name": "sign", "vote": "mean", "error_feedback": True},
    "rotated": {"name": "rotated_quantizer", "bits": 4, "max_norm": 4.0},
    "rotated, 1 bit": {"name": "rotated_quantizer", "bits": 1, "max_norm": 4.0},
    "random_k": {"name": "random_k", "density": 0.3},
    "random_k, feedback": {"name": "random_k", "density": 0.3, "unbiased": False, "error_feedback": True},
    "random_k + quantizer": {"name": "random_k", "density": 0.3, "inner": QUANTIZER},
    "random_k + rotated": {"name": "random_k", "density": 0.3, "inner": {"name": "rotated_quantizer", "max_norm": 4.0}},
    "random_k + cast": {"name": "random_k", "density": 0.3, "inner": {"name": "cast"}},
    "random_k + random_k": {"name": "random_k", "density": 0.5, "inner": {"name": "random_k", "density": 0.5}},
    "top_k": {"name": "top_k", "density": 0.05},
    "top_k, bitmap": {"name": "top_k", "density": 0.4, "error_feedback": False},
    "top_k + quantizer": {"name": "top_k", "density": 0.05, "inner": QUANTIZER},
    "count_sketch": {"name": "count_sketch", "columns": 40, "density": 0.05, "momentum": 0.5},
    "count_sketch, max_norm": {"name": "count_sketch", "columns": 40, "max_norm": 0.5, "inner": QUANTIZER},
    "powersgd": {"name": "powersgd", "rank": 2},
    "powersgd + quantizer": {"name": "powersgd", "rank": 2, "warm_start": False, "inner": QUANTIZER},
    "svd_truncate": {"name": "svd_truncate", "rank": 2, "error_feedback": True},
    "global_mask": {"name": "global_mask", "density": 0.1, "refresh": 3},
    "global_mask + quantizer": {"name": "global_mask", "density": 0.1, "refresh": 3, "inner": QUANTIZER},
    "bernoulli_mask": {"name": "bernoulli_mask", "max_value": 4.0},
    "bernoulli_mask, memory": {"name": "bernoulli_mask", "bits": 1, "max_value": 4.0, "memory": 3, "prior": 0.5},
    "seed_projection": {"name": "seed_projection", "directions": 64, "unbiased": True},
    "seed_projection, feedback": {"name": "seed_projection", "directions": 64, "error_feedback": True},
    "seed_projection + quantizer": {"name": "seed_projection", "directions": 64, "inner": QUANTIZER},
}


def table(case):
    """Return the configuration of a case, or of a codec with the given options."""
    options = CASES[case] if isinstance(case, str) else case
    return CODECS.get(options["name"]).config(**options)


def build(case, ring=None):
    config = table(case)
    return CODECS.get(config.name).build(config, ring)


def declared(case, masked=False):
    config = table(case)
    return CODECS.get(config.name).declare(config, masked)


def context(number=0, carried=None, shapes=SHAPES):
    known = {"names": NAMES, "given_D": GIVEN_D} if shapes == SHAPES else {}
    return RoundContext(
        run_seed=bytes(32), round_seed=number.to_bytes(32, "little"), shapes=shapes, carried=carried or {}, **known
    )


def at(case, ring=None, number=0, carried=None, length=LENGTH):
    """Return a codec for one round of vectors of ``length``."""
    return build(case, ring).at(context(number, carried, SHAPES if length == LENGTH else ((length,),)))


def stream(*names):
    return PrivateStream(bytes(range(32)), "codec", *names)


def total_of(codec, encoded, ring):
    """Return what the server has: residues added in a ring, or plain messages read from bytes and added."""
    if ring is not None:
        total = np.zeros(codec.sum_length(encoded[0].length), dtype=np.uint64)
        for one in encoded:
            assert one.values_M.dtype == np.uint32
            total = (total + one.values_M.astype(np.uint64)) % np.uint64(1 << ring.bits)
        scale = encoded[0].scale
    else:
        received = [
            read(to_bytes(e, client_id=str(i), weight=1.0), length=e.length, codec=codec) for i, e in enumerate(encoded)
        ]
        assert len({each.scale for each in received}) == 1  # a shared grid: the sum means something
        total, scale = np.sum([each.values for each in received], axis=0), received[0].scale
        assert len(total) == codec.sum_length(encoded[0].length)
    return EncodedSum(
        sum_M=total,
        codec=codec.name,
        scale=scale,
        length=encoded[0].length,
        survivors=len(encoded),
        total_weight=float(len(encoded)),
    )


@dataclass
class Loop:
    """n clients and a server over rounds: the order of calls that an engine has to keep."""

    case: object
    ring: Ring | None = None
    length: int = LENGTH
    number: int = 0
    bytes_up: int = 0
    state: dict = None
    residuals: dict = field(default_factory=dict)
    sent: list = field(default_factory=list)

    def round(self, updates):
        """Return the decoded mean of one round."""
        config, base = table(self.case), build(self.case, self.ring)
        if self.state is None:
            self.state = base.start_state(self.length)
        shapes = SHAPES if self.length == LENGTH else ((self.length,),)
        codec = base.at(context(self.number, base.public_state(self.state), shapes))
        self.number += 1
        feedback = codec.properties.stateful
        given = [corrected(u, self.residuals.get(i)) if feedback else u for i, u in enumerate(updates)]
        encoded, linear_M = self._exchange(codec, given)
        if codec.properties.second_pass:
            first, told = codec, codec.between(linear_M, self.length)
            own = [first.second(told, self.length, first.linear_sum(sum_of_one(one, first))) for one in encoded]
            codec = first.second(told, self.length, linear_M / len(updates))
            encoded, linear_M = self._exchange(codec, given)
        if feedback:
            for i, (vector, one) in enumerate(zip(given, encoded, strict=True)):
                mine = own[i] if codec.name == "powersgd" else codec
                self.residuals[i] = residual(mine, vector, one)
                self.sent.append(mine.decode_sum(sum_of_one(one, mine)))
        mean_D, self.state = codec.expand(linear_M / len(updates), self.state, self.length)
        assert config.name == codec.name
        return mean_D

    def _exchange(self, codec, given):
        encoded = [codec.encode(u, stream(self.number, i)) for i, u in enumerate(given)]
        self.bytes_up += sum(len(to_bytes(e, client_id=str(i), weight=1.0)) for i, e in enumerate(encoded))
        return encoded, codec.linear_sum(total_of(codec, encoded, self.ring))


def linear(codec, vector_D, ring=None, *names):
    """Return what one client adds to the server's linear sum."""
    return codec.linear_sum(total_of(codec, [codec.encode(vector_D, stream(*names))], ring))


def decoded(codec, vector_D, ring=None, *names):
    """Return what one client's message stands for, for codecs without a state on the server."""
    return codec.decode_sum(total_of(codec, [codec.encode(vector_D, stream(*names))], ring))


def passes(codec, vector_D, length=LENGTH, ring=None):
    """Return the codec of each pass; the second one after a first with this vector alone."""
    if not codec.properties.second_pass:
        return [codec]
    first_M = linear(codec, vector_D, ring)
    return [codec, codec.second(codec.between(first_M, length), length, first_M)]


__all__ = [name for name in globals() if not name.startswith("_")] + ["replace"]
