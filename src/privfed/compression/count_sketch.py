"""A count sketch of the update: sums of sketches are the sketch of the sum, and the server finds its large values.

FetchSGD (Rothchild et al. 2020, arXiv 2007.07682, algorithm 1): momentum and error accumulation live in sketches on the
server, clients keep nothing.

The paper takes the found values off the error sketch whole. Where several of them share a bucket, each was estimated as
the sum of all, and what is left is larger than before: with more values found than a row has buckets, the sketch grows
without end. (The paper's code sets such buckets to 0, which forgets what else was in them.) Here the step is as long as
takes most off: the found values times <error, their sketch> / |their sketch|^2, at most 1. It is 1 where no two share a
bucket, and the error never grows by it.

Count sketch: Charikar, Chen and Farach-Colton 2002.

Shape suffixes: D values of an update; R rows and C columns of the sketch; K values found.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import (
    CODECS,
    CodecPlugin,
    CodecState,
    Inner,
    Properties,
    declare_inner,
    float_slack,
    inner_carries,
    inner_ring_bits,
    plain_inner,
    public_stream,
)
from privfed.compression.fixed_point import check_finite
from privfed.compression.nested import Nested, kept, led_properties
from privfed.compression.top_k import largest
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, Float32

MOMENTUM, ERROR = "momentum", "error"
_BLOCK = 1 << 16  # values estimated at a time
_LEAST = 1e-300  # of a divisor, where nothing is found


class CountSketchConfig(Table):
    """Options.

    Attributes:
        rows: Independent rows; a value's estimate is the median over them.
        columns: Buckets of a row. Estimates are good where values are few or of very different size; updates whose
            values are all alike (as AdamW's are) need about as many buckets in all as they have values.
        density: Share of the values that is found and applied each round; the rest stays in the server's sketch.
        momentum: Momentum, kept in the server's sketch; leave ``server.optimizer`` at plain ``sgd``.
        max_norm: A sketch whose norm is larger is scaled down to it; unset for none. Under client-level privacy this is
            the bound that keeps the noise small.
        inner: How the sketch is encoded.
    """

    name: Literal["count_sketch"] = "count_sketch"
    rows: int = Field(default=5, ge=1, le=64)
    columns: int = Field(default=10_000, ge=1)
    density: float = Field(default=0.01, gt=0, le=1)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    max_norm: float | None = Field(default=None, gt=0)
    inner: Inner = Field(default_factory=plain_inner)


class CountSketch(Nested):
    """Sends R x C sums of the values, each value in one bucket of a row with a random sign; hashes are the run's.

    ``l2_bound``: bucket b of a row holds a signed sum of its values, at most sqrt(load_b) times their norm (Cauchy and
    Schwarz), so a row is at most sqrt(largest load) times the vector, and the sketch sqrt(sum over rows of the largest
    load) times. The loads are those of the run's hashes; before ``at`` they are taken to be D. With ``max_norm`` the
    sketch is never longer than that. Rounding to float32 adds what ``float_slack`` says.
    """

    name = "count_sketch"

    @staticmethod
    def declared(config: CountSketchConfig, masked: bool) -> Properties:
        """Return what is true of it."""
        found = led_properties(config, masked)
        inner = declare_inner(config.inner, masked, config.name)
        return replace(found, separable=False, steady=inner.steady)  # hashes are the run's

    def values(self, length: int) -> int:  # noqa: ARG002
        """Return R C."""
        return int(self._config.rows * self._config.columns)

    def l2_bound(self, bound: float, length: int) -> float | None:
        """Return the bound; see the class."""
        loads = [length] * self._config.rows if self._context is None else self._hashes(length)[2]
        sketch = float_slack(bound * sum(loads) ** 0.5, self.values(length))
        if self._config.max_norm is not None:
            sketch = min(sketch, float_slack(self._config.max_norm, self.values(length)))
        return self.inner_bound(sketch, length)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message.

        Raises:
            ClientError: If a value is not finite.
            ConfigError: If the run's seed is missing.
        """
        check_finite(vector_D)
        sketch = self.sketch(vector_D.astype(np.float64))
        norm = float(np.linalg.norm(sketch))
        if self._config.max_norm is not None and norm > self._config.max_norm:
            sketch *= self._config.max_norm / norm
        return self.inner_encode(sketch, len(vector_D), stream)

    def sketch(self, vector_D: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sketch [R C] of a vector."""
        columns = self._config.columns
        buckets, signs, _ = self._hashes(len(vector_D))
        rows = [
            np.bincount(bucket_D, weights=vector_D * sign_D, minlength=columns)
            for bucket_D, sign_D in zip(buckets, signs, strict=True)
        ]
        return np.concatenate(rows)

    def estimate(self, sketch: NDArray[np.float64], length: int) -> NDArray[np.float64]:
        """Return the median estimate of each value [D]."""
        rows, out_D = sketch.reshape(self._config.rows, -1), np.empty(length)
        buckets, signs, _ = self._hashes(length)
        for start in range(0, length, _BLOCK):
            part = slice(start, start + _BLOCK)
            found = [
                row[bucket_D[part]] * sign_D[part] for row, bucket_D, sign_D in zip(rows, buckets, signs, strict=True)
            ]
            out_D[part] = np.median(found, axis=0)
        return out_D

    def start_state(self, length: int) -> CodecState:
        """Return empty sketches."""
        return {MOMENTUM: np.zeros(self.values(length)), ERROR: np.zeros(self.values(length))}

    def expand(
        self, mean_M: NDArray[np.float64], state: CodecState, length: int
    ) -> tuple[NDArray[np.float64], CodecState]:
        """Return the largest estimated values in their places, times the step [D]; the rest stays in the sketch."""
        momentum = self._config.momentum * state[MOMENTUM] + self.inner_expand(mean_M, length)
        error = state[ERROR] + momentum
        estimate_D = self.estimate(error, length)
        found_K = largest(np.abs(estimate_D), kept(self._config.density, length))
        vector_D = np.zeros(length)
        vector_D[found_K] = estimate_D[found_K]
        taken = self.sketch(vector_D)
        step = min(1.0, float(taken @ error) / max(float(taken @ taken), _LEAST))
        return step * vector_D, {MOMENTUM: momentum, ERROR: error - step * taken}

    def _hashes(self, length: int) -> _Hashes:
        return _hashes(self.context().run_seed, length, self._config.rows, self._config.columns)


_Hashes = tuple[tuple[NDArray[np.int32], ...], tuple[NDArray[np.int8], ...], tuple[int, ...]]


@lru_cache(maxsize=2)
def _hashes(seed: bytes, length: int, rows: int, columns: int) -> _Hashes:
    """Return the bucket [D] and sign [D] of each value in each row, and each row's largest load."""
    stream = public_stream(hashlib.sha256(seed).digest(), "count_sketch", length, rows, columns)
    buckets, signs, loads = [], [], []
    for _ in range(rows):
        bucket_D = (stream.uniform(length) * columns).astype(np.int32)
        bits_D = np.unpackbits(stream.raw(-(-length // 8)), count=length)
        buckets.append(bucket_D)
        signs.append((1 - 2 * bits_D.astype(np.int8)).astype(np.int8))
        loads.append(int(np.bincount(bucket_D).max(initial=0)))
    return tuple(buckets), tuple(signs), tuple(loads)


def _carries(config: CountSketchConfig, masked: bool) -> float | None:
    """Return what is carried whatever the hashes: a bucket may sum many values, unless ``max_norm`` cuts it."""
    limit = inner_carries(config, masked)
    if limit is None or (config.max_norm is not None and config.max_norm * (1 + 2.0**-20) <= limit):
        return None
    return 0.0


CODECS.register("count_sketch")(
    CodecPlugin(
        config=CountSketchConfig,
        build=CountSketch,
        declare=CountSketch.declared,
        ring_bits=inner_ring_bits,
        carries=_carries,
    )
)
