"""A sample of a random mask, one bit a score: the server's chances are the mean of what its clients drew.

Isik et al. 2023, "Sparse Random Networks for Communication-Efficient Federated Learning" (FedPM), ICLR, arXiv
2209.15328, algorithm 1, for a tuning that trains the log-odds of a mask (*scores*: ``tuning.name = "bernoulli_mask"``).
A client trains from the server's scores s, draws each place of the mask with chance sigmoid(s + its change), and sends
the draws. The server's next chances are the mean of the draws, of this round or of up to ``memory`` of them, with a
prior of one half (the paper's Beta prior and its resets, section 3.2); its scores are their log-odds.

Trained tensors that are no scores, such as a classifier's head, travel beside the bits through a stochastic quantiser.

Shape suffixes: D values of an update; S scores, P plain values (D = S + P); M values of a message.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import (
    CODECS,
    BaseCodec,
    CodecPlugin,
    CodecState,
    Properties,
    Ring,
    RoundContext,
    Wire,
    no_context,
)
from privfed.compression.fixed_point import check_finite
from privfed.compression.one_bit import signs, sum_of_signs
from privfed.compression.stochastic_quantizer import (
    StochasticQuantizer,
    StochasticQuantizerConfig,
    stochastic_ring_bits,
)
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import SCORES, Encoded, EncodedSum, Float32

Float64 = NDArray[np.float64]
SUM, ROUNDS = "sum", "rounds"


class BernoulliMaskConfig(Table):
    """Options.

    Attributes:
        floor: Chances are kept at least so far from 0 and 1, so that a place all clients agreed on can still change.
        memory: Chances are the mean of the masks of so many rounds, after which it starts afresh. The paper takes one
            over the share of clients in a round.
        prior: Weight of a prior chance of one half in that mean, in rounds.
        bits: Bits of a value that is no score.
        max_value: The range of those values' grid; larger ones are cut, counted and reported.
    """

    name: Literal["bernoulli_mask"] = "bernoulli_mask"
    floor: float = Field(default=0.02, gt=0, lt=0.5)
    memory: int = Field(default=1, ge=1)
    prior: float = Field(default=0.0, ge=0)
    bits: int = Field(default=8, ge=1, le=16)
    max_value: float = Field(default=0.05, ge=1e-30, le=1e30)


class BernoulliMask(BaseCodec):
    """Sends a draw of each place of the mask, and the other values on a grid.

    A draw counts +1/2 (there) or -1/2 (not) in the linear sum, so that its mean is the mean chance minus one half, to
    2^-32. Without a ring a value of b bits travels as b bits of their own, whose sums give its sum.

    ``l2_bound``: whatever a client trained, each of its S draws adds +1/2 or -1/2 to the sum, so the scores' part has
    the norm sqrt(S) / 2; the P other values have at most the quantiser's bound. The whole is the root of the sum of
    their squares. Before ``at``, when S is not known, it is that of D draws and D values together.
    """

    name = "bernoulli_mask"

    def __init__(self, config: BernoulliMaskConfig, ring: Ring | None, context: RoundContext | None = None) -> None:
        self._config = config
        self._ring = ring
        self._context = context
        self._quantizer = StochasticQuantizer(
            StochasticQuantizerConfig(bits=config.bits, max_value=config.max_value), ring
        )
        self.properties = _declare(config, ring is not None)

    def at(self, context: RoundContext) -> Self:
        """Return this codec for one round."""
        return type(self)(self._config, self._ring, context)

    def l2_bound(self, bound: float, length: int) -> float:
        """Return the bound; see the class."""
        drawn = plain = length
        if self._context is not None:
            drawn = int(self._scores(length).sum())
            plain = length - drawn
        return float((drawn / 4 + self._quantizer.l2_bound(bound, plain) ** 2) ** 0.5)

    def wire(self, length: int) -> Wire:
        """Return a bit a score and ``bits`` bits a plain value, or D values of the ring."""
        if self._ring is not None:
            return Wire(values=length, num_bits=self._ring.bits, kind="integer")
        drawn = int(self._scores(length).sum())
        return Wire(values=drawn + self._config.bits * (length - drawn), num_bits=1, kind="integer")

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message: the draws, then the plain values' bits, lowest first; in a ring in the update's order.

        Raises:
            ClientError: If a value is not finite.
            ConfigError: If the round, or what clients train from, is missing.
        """
        check_finite(vector_D)
        length = len(vector_D)
        scores_D = self._scores(length)
        trained_S = self._given(length)[scores_D].astype(np.float64) + vector_D[scores_D]
        absent_S = _draws(len(trained_S), stream) >= _chances(trained_S)
        plain = self._quantizer.encode(np.ascontiguousarray(vector_D[~scores_D]), stream)
        if self._ring is None:
            steps_P = plain.values_M.astype(np.uint32, copy=False)
            planes = (steps_P >> np.arange(self._config.bits, dtype=np.uint32)[:, None]) & np.uint32(1)
            values_M = np.concatenate([signs(absent_S, None), planes.ravel()])
        else:
            values_M = np.empty(length, dtype=np.uint32)
            values_M[scores_D], values_M[~scores_D] = signs(absent_S, self._ring), plain.values_M
        return Encoded(
            values_M=values_M,
            codec=self.name,
            num_bits=1 if self._ring is None else self._ring.bits,
            scale=1.0,
            length=length,
            l2_bound=None,
            saturated=plain.saturated,
        )

    def decode_one(self, encoded: Encoded) -> Float64:
        """Return what a message without a ring adds to the sum [D]: +1/2 or -1/2 a score, and the plain values."""
        scores_D = self._scores(encoded.length)
        drawn, found_D = int(scores_D.sum()), np.empty(encoded.length)
        found_D[scores_D] = 0.5 - encoded.values_M[:drawn]
        planes = encoded.values_M[drawn:].reshape(self._config.bits, -1).astype(np.int64)
        steps_P = (planes << np.arange(self._config.bits)[:, None]).sum(axis=0)
        # the highest bit is the sign, as in two's complement
        steps_P -= planes[-1] << self._config.bits
        found_D[~scores_D] = self._plain(steps_P, survivors=1)
        return found_D

    def linear_sum(self, encoded_sum: EncodedSum) -> Float64:
        """Return the sum of the centred draws, and of the plain values [D]."""
        if self._ring is None:
            return super().linear_sum(encoded_sum)
        scores_D, sum_D = self._scores(encoded_sum.length), np.empty(encoded_sum.length)
        sum_D[scores_D] = 0.5 * sum_of_signs(replace(encoded_sum, sum_M=encoded_sum.sum_M[scores_D]), self._ring)
        sum_D[~scores_D] = self._plain(encoded_sum.sum_M[~scores_D], encoded_sum.survivors)
        return sum_D

    def start_state(self, length: int) -> CodecState:
        """Return no masks."""
        return {SUM: np.zeros(length), ROUNDS: np.zeros(1, dtype=np.int64)} if self._config.memory > 1 else {}

    def expand(self, mean_M: Float64, state: CodecState, length: int) -> tuple[Float64, CodecState]:
        """Return the change of the scores that makes them the log-odds of the mean, and the plain values [D].

        Raises:
            ConfigError: If the round, or what clients trained from, is missing.
        """
        scores_D, config = self._scores(length), self._config
        sum_D, rounds = mean_M + 0.5, 1
        if config.memory > 1:
            # the oldest mean goes with all others that it was added to, as in the paper
            kept = int(state[ROUNDS][0]) % config.memory
            sum_D, rounds = sum_D + (state[SUM] if kept else 0.0), kept + 1
            state = {SUM: np.where(scores_D, sum_D, 0.0), ROUNDS: np.array([rounds], dtype=np.int64)}
        chances_D = (sum_D + config.prior / 2) / (rounds + config.prior)
        chances_D = np.clip(chances_D, config.floor, 1 - config.floor)
        return np.where(scores_D, np.log(chances_D / (1 - chances_D)) - self._given(length), mean_M), state

    def _plain(self, steps_P: NDArray[Any], survivors: int) -> Float64:
        """Return plain values from their sums of steps."""
        total = EncodedSum(
            sum_M=steps_P,
            codec=self._quantizer.name,
            scale=self._quantizer.step,
            length=len(steps_P),
            survivors=survivors,
            total_weight=float(survivors),
        )
        return self._quantizer.linear_sum(total)

    def _scores(self, length: int) -> NDArray[np.bool_]:
        """Return which values are scores [D]."""
        context = self._round()
        if not context.names:
            return np.zeros(length, dtype=bool)
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in context.shapes]
        return np.repeat([name.rpartition(".")[2] == SCORES for name in context.names], sizes)

    def _given(self, length: int) -> Float32:
        """Return what clients train from [D]."""
        given_D = self._round().given_D
        if given_D is not None:
            return given_D
        if self._scores(length).any():
            raise no_context(self.name)
        return np.zeros(length, dtype=np.float32)

    def _round(self) -> RoundContext:
        if self._context is None:
            raise no_context(self.name)
        return self._context


def _chances(scores_S: Float64) -> Float64:
    """Return the sigmoid, of scores of any size."""
    chances_S: Float64 = 0.5 * (1 + np.tanh(scores_S / 2))
    return chances_S


def _draws(count: int, stream: PrivateStream) -> Float64:
    """Return numbers uniform on [0, 1), 32 random bits each."""
    return np.multiply(stream.raw(4 * count).view(np.uint32), 2.0**-32, dtype=np.float64)


def _declare(config: BernoulliMaskConfig, masked: bool) -> Properties:
    return Properties(
        summable=True,
        shared_support=True,
        unbiased=False,
        linear=False,
        needs_context=True,
        needs_individual=not masked,
        server_state=config.memory > 1,
        scales=False,
        separable=False,
        steady=False,
        scores=True,
    )


CODECS.register("bernoulli_mask")(
    CodecPlugin(config=BernoulliMaskConfig, build=BernoulliMask, declare=_declare, ring_bits=stochastic_ring_bits)
)
