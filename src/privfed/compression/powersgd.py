"""Low rank by one step of power iteration, in two exchanges of which each is linear: sums under masking are exact.

PowerSGD (Vogels, Karimireddy and Jaggi 2019, arXiv 1905.13727, algorithm 1). For each matrix X_i [m, n] of a client and
an orthonormal Q [n, r] that all know: first pass P = sum_i X_i Q, which the server makes orthonormal and sends back;
second pass sum_i X_i^T P; the decoded sum is P (sum_i X_i^T P)^T = P P^T sum_i X_i, the projection of the sum.

*Under masking* the second pass leaves out what the first one told: Q Q^T X_i^T P = Q (X_i Q)^T P, which the server has
from P's own sum, is taken off by the clients and added by the server. So the two sums are of different things: X_i Q,
and X_i^T P without its part in the span of Q. A client that is in the first sum and missing from the second is hidden
by all others of the first. (With the second pass whole, the two sums would differ along Q by P^T X_i Q of the missing
clients alone.) With nobody missing the result is the same; else each part is the mean over those that sent it.

Shape suffixes: D values of an update, M values of a pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import (
    CODECS,
    BaseCodec,
    Codec,
    CodecPlugin,
    CodecState,
    Inner,
    Properties,
    Ring,
    RoundContext,
    Wire,
    build_inner,
    float_slack,
    inner_carries,
    inner_ring_bits,
    no_context,
    plain_inner,
    public_stream,
    renamed,
)
from privfed.compression.fixed_point import check_finite
from privfed.compression.matrices import Blocks, blocks_of, concatenated
from privfed.compression.nested import nested_properties
from privfed.errors import ConfigError, ProtocolError
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32

Float64 = NDArray[np.float64]
RIGHT = "right"


class PowerSGDConfig(Table):
    """Options.

    Attributes:
        rank: Columns of each factor.
        warm_start: Whether the right factors of a round start the next one, as in the paper; else they are drawn anew
            from the round's seed.
        error_feedback: Whether a client keeps what was left out and adds it to its next update, as in the paper.
        inner: How the factors are encoded.
    """

    name: Literal["powersgd"] = "powersgd"
    rank: int = Field(default=4, ge=1)
    warm_start: bool = True
    error_feedback: bool = True
    inner: Inner = Field(default_factory=plain_inner)


class _Pass(BaseCodec):
    """What both passes share: M values computed from the update, encoded by the nested codec."""

    name = "powersgd"

    def __init__(self, config: PowerSGDConfig, ring: Ring | None, context: RoundContext | None = None) -> None:
        self._config = config
        self._ring = ring
        self._context = context
        self._inner = build_inner(config.inner, ring)
        self.properties = _declare(config, ring is not None)

    def _size(self, length: int) -> int:
        raise NotImplementedError

    def _computed(self, vector_D: Float32) -> Float64:
        raise NotImplementedError

    def at(self, context: RoundContext) -> Self:
        """Return this codec for one round."""
        return type(self)(self._config, self._ring, context)

    def sum_length(self, length: int) -> int:
        """Return the number of values that the nested codec makes of M."""
        return self._nested(length).sum_length(self._size(length))

    def wire(self, length: int) -> Wire:
        """Return what the nested codec makes of M values."""
        return self._nested(length).wire(self._size(length))

    def l2_bound(self, bound: float, length: int) -> float | None:
        """Return the bound of this pass alone; see :class:`PowerSGD`."""
        size = self._size(length)
        return self._nested(length).l2_bound(float_slack(bound, size, times=3), size)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message of this pass.

        Raises:
            ClientError: If a value is not finite.
            ConfigError: If the round is missing.
        """
        check_finite(vector_D)
        length = len(vector_D)
        encoded = self._nested(length).encode(self._computed(vector_D).astype(np.float32), stream)
        return renamed(encoded, self.name, length)

    def linear_sum(self, encoded_sum: EncodedSum) -> Float64:
        """Return the sum of the pass's values."""
        length = encoded_sum.length
        return self._nested(length).linear_sum(replace(encoded_sum, length=self._size(length)))

    def _nested(self, length: int) -> Codec:
        return self._inner.at(self._round().inner(self._size(length)))

    def _values(self, mean_M: Float64, length: int) -> Float64:
        return self._nested(length).expand(mean_M, {}, self._size(length))[0]

    def _blocks(self, length: int) -> Blocks:
        return blocks_of(self._round(), length, self._config.rank)

    def _rights(self, blocks: Blocks) -> list[Float64]:
        """Return the round's right factors: the server's where they fit this layout, else random ones."""
        context = self._round()
        carried = context.carried.get(RIGHT)
        if self._config.warm_start and carried is not None and carried.size == blocks.right and blocks.right:
            flat = carried.astype(np.float64)
        else:
            seed = np.frombuffer(public_stream(context.round_seed, "powersgd").bytes(8 * blocks.right), dtype="<i8")
            flat = seed.astype(np.float64) * 2.0**-63
        if not np.isfinite(flat).all():
            raise ProtocolError("The server's right factors hold NaN or infinity, expected finite values.")
        return [_orthonormal(right) for right in blocks.rights(flat)]

    def _round(self) -> RoundContext:
        if self._context is None:
            raise no_context(self.name)
        return self._context


class PowerSGD(_Pass):
    """The first pass: left factors X_i Q, and the way to the second pass.

    ``l2_bound``, of either pass: the shared factor has orthonormal columns, so |X Q| <= |X| and |X^T P| <= |X| in the
    Frobenius norm, for all matrices together and with the tensors that are sent as they are; taking off a part in the
    span of Q makes nothing longer. Rounding to float32 adds what ``float_slack`` says, and the nested codec what it
    says of M values. A client's influence is bounded in each
    pass, given what the earlier one released; under client-level privacy a round has *two* releases.
    """

    def between(self, linear_M: Float64, length: int) -> Float32:
        """Return orthonormal left factors, flat, from the (noised) sum of the first pass."""
        lefts = self._blocks(length).lefts(self._values(linear_M, length))
        return concatenated([_orthonormal(left) for left in lefts]).astype(np.float32)

    def second(self, message: Float32, length: int, first_M: Float64 | None = None) -> Codec:
        """Return the codec of the second pass; ``first_M`` as in :class:`privfed.compression.TwoPass`.

        Raises:
            ProtocolError: If the message does not hold orthonormal factors of this layout.
        """
        blocks = self._blocks(length)
        if message.shape != (blocks.left,) or not np.isfinite(message).all():
            raise ProtocolError(f"The left factors are {message.shape} values, expected ({blocks.left},), all finite.")
        lefts = []
        for left in blocks.lefts(message.astype(np.float64)):
            if not np.allclose(left.T @ left, np.eye(left.shape[1]), atol=1e-4):
                raise ProtocolError("The left factors are not orthonormal: the bound on what is sent would not hold.")
            lefts.append(_orthonormal(left))
        sums = None if first_M is None else tuple(blocks.lefts(self._values(first_M, length)))
        return _Second(self._config, self._ring, self._round(), tuple(lefts), sums)

    def expand(self, mean_M: Float64, state: CodecState, length: int) -> tuple[Float64, CodecState]:  # noqa: ARG002
        """Refuse: the first pass alone stands for no update.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError('compression.name = "powersgd" takes two passes: go on with between and second.')

    def decode_sum(self, encoded_sum: EncodedSum) -> Float64:
        """Refuse, as :meth:`expand`."""
        return self.expand(self.linear_sum(encoded_sum), {}, encoded_sum.length)[0]

    def start_state(self, length: int) -> CodecState:  # noqa: ARG002
        """Return no right factors: the first round draws them."""
        return {RIGHT: np.zeros(0, dtype=np.float32)} if self._config.warm_start else {}

    def public_state(self, state: CodecState) -> CodecState:
        """Return the right factors of the last round."""
        return state

    def _size(self, length: int) -> int:
        return self._blocks(length).left

    def _computed(self, vector_D: Float32) -> Float64:
        blocks = self._blocks(len(vector_D))
        rights = self._rights(blocks)
        return concatenated([m.of(vector_D) @ right for m, right in zip(blocks.matrices, rights, strict=True)])


class _Second(_Pass):
    """The second pass: right factors X_i^T P, or under masking their parts beside Q, and what is not factored.

    Args:
        config: The table.
        ring: The ring of a masked sum, or None.
        context: The round.
        lefts: The orthonormal factors P.
        sums: What the first pass summed to, X Q of each matrix; None where it is not needed.
    """

    def __init__(
        self,
        config: PowerSGDConfig,
        ring: Ring | None,
        context: RoundContext,
        lefts: tuple[Float64, ...],
        sums: tuple[Float64, ...] | None,
    ) -> None:
        super().__init__(config, ring, context)
        self._lefts = lefts
        self._sums = sums
        self.properties = replace(self.properties, second_pass=False)

    def at(self, context: RoundContext) -> Self:  # noqa: ARG002
        """Return this codec: it is of one round already."""
        return self

    def expand(self, mean_M: Float64, state: CodecState, length: int) -> tuple[Float64, CodecState]:
        """Return the projected mean [D], and the right factors for the next round.

        Raises:
            ConfigError: If the second pass left out what the first one told, and that is not known.
        """
        blocks = self._blocks(length)
        values = self._values(mean_M, length)
        rights = blocks.rights(values)
        if self._ring is not None:
            rights = self._completed(blocks, rights)
        products = [left @ right.T for left, right in zip(self._lefts, rights, strict=True)]
        if self._config.warm_start:
            state = {RIGHT: concatenated([_orthonormal(right) for right in rights]).astype(np.float32)}
        return blocks.assembled(products, values[blocks.right :]), state

    def decode_sum(self, encoded_sum: EncodedSum) -> Float64:
        """Return the sum of the projected vectors [D], ``sums`` being of the same ones; no right factors."""
        return self.expand(self.linear_sum(encoded_sum), {}, encoded_sum.length)[0]

    def _size(self, length: int) -> int:
        blocks = self._blocks(length)
        return blocks.right + blocks.plain

    def _computed(self, vector_D: Float32) -> Float64:
        blocks = self._blocks(len(vector_D))
        factors = [m.of(vector_D).T @ left for m, left in zip(blocks.matrices, self._lefts, strict=True)]
        if self._ring is not None:
            factors = [f - right @ (right.T @ f) for f, right in zip(factors, self._rights(blocks), strict=True)]
        return np.concatenate([concatenated(factors), blocks.take_rest(vector_D)])

    def _completed(self, blocks: Blocks, rights: list[Float64]) -> list[Float64]:
        """Return right factors with their parts along Q, which the first pass told."""
        if self._sums is None:
            raise ConfigError('The second pass of compression.name = "powersgd" was not told what the first summed to.')
        parts = zip(rights, self._rights(blocks), self._sums, self._lefts, strict=True)
        return [right + shared @ (total.T @ left) for right, shared, total, left in parts]


def _orthonormal(factor: Float64) -> Float64:
    """Return orthonormal columns whose span holds that of ``factor`` [rows, rank], also where it has a lower rank."""
    return np.linalg.qr(factor)[0]


def _declare(config: PowerSGDConfig, masked: bool) -> Properties:
    return nested_properties(
        config,
        masked,
        unbiased=False,
        needs_round_seed=True,
        second_pass=True,
        stateful=config.error_feedback,
        server_state=config.warm_start,
    )


CODECS.register("powersgd")(
    CodecPlugin(
        config=PowerSGDConfig,
        build=PowerSGD,
        declare=_declare,
        ring_bits=inner_ring_bits,
        carries=inner_carries,
    )
)
