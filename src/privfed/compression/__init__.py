"""Codecs, one file each: how an update becomes a message, and what stays true of it.

A codec's work on the server has two parts. The *linear* part is additive: ``linear_sum`` of a sum of messages is the
sum of what it is of each. That is where one client's influence is bounded (``l2_bound``) and where noise is added. What
follows, ``expand``, is public post-processing: it may pick heavy hitters, keep a momentum, choose the next mask. One
round of a codec, in the order in which the engine calls it::

    codec = codec.at(context)                        both sides: seeds, shapes and the server's public state
    encoded = codec.encode(update_D, stream)         client; values of the message [M]
    sum = ... encodings added up, in a ring or not   link
    linear_M = codec.linear_sum(sum)                 server; noise of the sensitivity l2_bound goes here
    mean_D, state = codec.expand(linear_M / n, state, length)   server; the state is checkpointed
    public = codec.public_state(state)               server; travels with the next broadcast, into the next context

``decode_sum`` is the linear part and ``expand`` in one, for a codec that keeps no state.

Shape suffixes: D values of an update, M values of a message or of a sum of messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, SerializeAsAny

from privfed.errors import ConfigError
from privfed.registry import Registry
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32

Float64 = NDArray[np.float64]
CodecState = Mapping[str, NDArray[Any]]
"""What the server's side of a codec remembers: named arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """What a masked sum leaves room for.

    Attributes:
        bits: Ring size; sums are taken modulo 2^bits.
        clients: At most so many encodings are added.
    """

    bits: int
    clients: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundContext:
    """What every client and the server know alike before a round; nothing of it is secret.

    Attributes:
        run_seed: Fixed for all rounds. Like ``round_seed`` it must not depend on any client's data.
        round_seed: Another one each round.
        shapes: Shapes of the tensors that lie in the vector of this round, in order.
        names: Their names.
        given_D: What clients train from, of these tensors; None where it is not known yet, as before a first round.
        carried: The server's public state, from ``public_state``.
    """

    run_seed: bytes
    round_seed: bytes
    shapes: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] = ()
    given_D: Float32 | None = field(default=None, repr=False, compare=False)
    carried: CodecState = field(default_factory=dict, repr=False)

    def inner(self, length: int) -> RoundContext:
        """Return the context of a codec that is nested in another and sees one vector of this ``length``."""
        return RoundContext(
            run_seed=hashlib.sha256(b"privfed nested codec" + self.run_seed).digest(),
            round_seed=hashlib.sha256(b"privfed nested codec" + self.round_seed).digest(),
            shapes=((length,),),
        )


def public_stream(seed: bytes, *names: str | int) -> PrivateStream:
    """Return a stream that everybody who knows ``seed`` can draw: for choices that all clients share."""
    return PrivateStream(hashlib.sha256(b"privfed public choice" + seed).digest(), *names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """What is true of a configured codec; combinations are allowed or refused by these alone.

    Attributes:
        summable: In a ring, the sum of encodings stands for the sum of the vectors (under masking: required).
        shared_support: All clients send values of the same positions.
        unbiased: The expectation of a decoded vector is the vector, inside the codec's range.
        linear: ``expand`` is linear and keeps no state, so that a sum may be decoded by ``decode_sum`` alone.
        bounded: ``l2_bound`` is a number.
        needs_context: ``at`` has to be called before ``encode``: a seed, the shapes or public state is needed.
        needs_round_seed: The seed of the round is used, and must be fresh for the claims to hold.
        second_pass: A round takes two exchanges; see :class:`TwoPass`.
        stateful: Each client keeps a residual (error feedback), which is private and never leaves it.
        server_state: The server keeps a state from round to round.
        needs_individual: The server has to read each message by itself before it can add.
        scales: The encoding of a multiple stands for that multiple, so that clients can be weighted.
        downlink: A broadcast can be encoded with it.
        separable: A message by itself stands for its client's vector, whatever was summed before, so that a rule can
            read each one where nothing is masked.
        steady: The values of a sum have the same meaning and number in every round, so that noise may be correlated
            over rounds.
        dense: Every value of the updates has a part in what is decoded, so that every trained tensor has to move.
        scores: What is sent are draws of a mask, so the tuning has to train its scores.
    """

    summable: bool
    shared_support: bool
    unbiased: bool
    linear: bool = True
    bounded: bool = True
    needs_context: bool = False
    needs_round_seed: bool = False
    second_pass: bool = False
    stateful: bool = False
    server_state: bool = False
    needs_individual: bool = False
    scales: bool = True
    downlink: bool = False
    separable: bool = True
    steady: bool = True
    dense: bool = True
    scores: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What a codec's message to be received looks like; a message that differs is refused before it is read.

    Attributes:
        values: M, the number of values in the message.
        num_bits: Bits of a value.
        kind: ``integer``, ``float32``, ``float16`` or ``bfloat16``.
        sparse: Whether the positions of the values travel beside them.
    """

    values: int
    num_bits: int
    kind: str
    sparse: bool = False


class Codec(Protocol):
    """A codec for one ring (or none), bound to a round by ``at`` where it needs one."""

    @property
    def name(self) -> str:
        """Its name in the registry."""

    @property
    def properties(self) -> Properties:
        """What is true of it."""

    @property
    def summable(self) -> bool:
        """See :class:`Properties`."""

    @property
    def unbiased(self) -> bool:
        """See :class:`Properties`."""

    @property
    def shared_support(self) -> bool:
        """See :class:`Properties`."""

    def at(self, context: RoundContext) -> Self:
        """Return this codec for one round."""

    def l2_bound(self, bound: float, length: int) -> float | None:
        """Return a bound on the norm of linear_sum(encode(x)) for every x [D] of norm <= bound, or None."""

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message for ``vector_D``; ``stream`` is the client's own."""

    def wire(self, length: int) -> Wire:
        """Return what a message for a vector of D = ``length`` values looks like."""

    def sum_length(self, length: int) -> int:
        """Return the number of values of a sum of messages, and of ``linear_sum``."""

    def decode_one(self, encoded: Encoded) -> Float64:
        """Return what one message adds to a sum [sum_length]; only where ``needs_individual``."""

    def linear_sum(self, encoded_sum: EncodedSum) -> Float64:
        """Return the additive part of decoding [sum_length]: sensitivity ``l2_bound``, to be noised here."""

    def start_state(self, length: int) -> CodecState:
        """Return the server's state before the first round."""

    def expand(self, mean_M: Float64, state: CodecState, length: int) -> tuple[Float64, CodecState]:
        """Return the decoded mean [D] of the (noised) mean of ``linear_sum``, and the server's next state."""

    def public_state(self, state: CodecState) -> CodecState:
        """Return the part of the server's state that every client has to know in the next round."""

    def decode_sum(self, encoded_sum: EncodedSum) -> Float64:
        """Return the sum of the encoded vectors [D], without any state of the server."""


@runtime_checkable
class TwoPass(Protocol):
    """What a codec with ``second_pass`` has beside the rest, which is its first pass.

    The sum of the first pass is made public by ``between`` and sent to the clients that answered; both sides then go on
    with ``second``, whose sum decodes to the update. Each pass is additive by itself and has a bound of its own: under
    client-level privacy each is noised *and charged*, the first before ``between``.
    """

    def between(self, linear_M: Float64, length: int) -> Float32:
        """Return what the server tells the clients, from the (noised) ``linear_sum`` of the first pass."""

    def second(self, message: Float32, length: int, first_M: Float64 | None = None) -> Codec:
        """Return the codec of the second pass.

        Args:
            message: What ``between`` returned.
            length: D.
            first_M: What the first pass's ``linear_sum`` was, on the scale of what the second one is expanded from: the
                (noised) mean at the server, the client's own at a client that computes its residual. Not needed to
                encode.
        """


class BaseCodec:
    """What most codecs have in common: one dense message of D values, no context and no state."""

    name: ClassVar[str]
    properties: Properties

    @property
    def summable(self) -> bool:
        """See :class:`Properties`."""
        return self.properties.summable

    @property
    def unbiased(self) -> bool:
        """See :class:`Properties`."""
        return self.properties.unbiased

    @property
    def shared_support(self) -> bool:
        """See :class:`Properties`."""
        return self.properties.shared_support

    def at(self, context: RoundContext) -> Self:  # noqa: ARG002
        """Return this codec, which is the same in every round."""
        return self

    def sum_length(self, length: int) -> int:
        """Return D."""
        return length

    def decode_one(self, encoded: Encoded) -> Float64:
        """Refuse: messages are added as they are.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"compression.name = {encoded.codec!r} decodes sums: use decode_sum.")

    def linear_sum(self, encoded_sum: EncodedSum) -> Float64:
        """Return the sum of the values."""
        return np.multiply(encoded_sum.sum_M, encoded_sum.scale, dtype=np.float64)

    def start_state(self, length: int) -> CodecState:  # noqa: ARG002
        """Return nothing: there is no state."""
        return {}

    def expand(self, mean_M: Float64, state: CodecState, length: int) -> tuple[Float64, CodecState]:  # noqa: ARG002
        """Return the values as they are."""
        return mean_M, state

    def public_state(self, state: CodecState) -> CodecState:  # noqa: ARG002
        """Return nothing: there is no state."""
        return {}

    def decode_sum(self, encoded_sum: EncodedSum) -> Float64:
        """Return the sum of the vectors [D].

        Raises:
            ConfigError: If the server's state is needed for that.
        """
        if self.properties.server_state:
            raise ConfigError(
                f"compression.name = {self.name!r} keeps a state on the server: use linear_sum and expand."
            )
        linear_M, length = self.linear_sum(encoded_sum), encoded_sum.length
        if self.properties.linear:
            return self.expand(linear_M, {}, length)[0]
        clients = max(1, encoded_sum.survivors)
        return self.expand(linear_M / clients, {}, length)[0] * clients


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecPlugin:
    """A codec's table and its builder; ``ring`` is None where updates are not masked.

    ``declare(config, masked)`` says what is true of it without building it, so that a combination can be refused before
    the number of clients is known.

    Attributes:
        ring_bits: The ring that ``secagg.ring_bits = "auto"`` takes for this table and so many clients.
        carries: Maps (table, whether sums are masked) to the largest norm of a vector of which no value can be beyond
            what the codec encodes; None where it encodes any. A client whose vector is longer may have to drop.
        instead: A codec of its kind whose messages add up in a ring, for sentences that refuse this one.
    """

    config: type[Table]
    build: Callable[[Any, Ring | None], Codec]
    declare: Callable[[Any, bool], Properties]
    ring_bits: Callable[[Any, int], int] = lambda _config, _clients: 32
    carries: Callable[[Any, bool], float | None] = lambda _config, _masked: None
    instead: str = "identity"


CODECS: Registry[CodecPlugin] = Registry("codec", "privfed.compression")


def _inner(value: Any) -> Any:
    if isinstance(value, Table):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"expected a table with a name, such as {{name = 'cast'}}, got {value!r}")
    return CODECS.get(value["name"]).config.model_validate(dict(value))


Inner = Annotated[SerializeAsAny[Table], BeforeValidator(_inner)]
"""The type of a key that nests a codec for the values that remain: ``inner = {name = "stochastic_quantizer"}``."""


def plain_inner() -> Table:
    """Return the nested codec where none is named: ``identity``."""
    return CODECS.get("identity").config()


def declare_inner(config: Table, masked: bool, outer: str) -> Properties:
    """Return what is true of a nested codec.

    Raises:
        ConfigError: If it keeps a state, takes two passes or has to see each message: then it cannot be nested.
    """
    name = str(getattr(config, "name", ""))
    found = CODECS.get(name).declare(config, masked)
    if found.second_pass or found.server_state or found.stateful or found.needs_individual or not found.linear:
        raise ConfigError(
            f'compression.name = "{outer}" with inner.name = "{name}": a nested codec has to send plain values; use '
            "inner.name = 'identity', 'cast', 'stochastic_quantizer', 'rotated_quantizer' or 'random_k'."
        )
    return found


def plugin_of(config: Table) -> CodecPlugin:
    """Return the plug-in of a codec's table."""
    return CODECS.get(str(getattr(config, "name", "")))


def inner_ring_bits(config: Any, clients: int) -> int:
    """Return the ring that a codec takes whose values a nested one encodes."""
    return plugin_of(config.inner).ring_bits(config.inner, clients)


def inner_carries(config: Any, masked: bool) -> float | None:
    """Return what a codec carries whose nested one gets no value larger than the vector's norm."""
    return plugin_of(config.inner).carries(config.inner, masked)


def build_inner(config: Table, ring: Ring | None) -> Codec:
    """Return the nested codec."""
    return CODECS.get(str(getattr(config, "name", ""))).build(config, ring)


def renamed(encoded: Encoded, name: str, length: int) -> Encoded:
    """Return a nested codec's message as that of the outer codec ``name`` for a vector of D = ``length`` values."""
    return replace(encoded, codec=name, length=length)


def float_slack(bound: float, length: int, times: float = 1.0) -> float:
    """Return ``bound`` plus what rounding ``length`` computed values to float32 can add to it.

    Rounding moves a value by at most 2^-24 of itself, or by 2^-150 where it is subnormal, so the norm by at most that
    share of itself, or sqrt(length) times that. Twice as much is allowed, for the float64 work before it.
    """
    return float(bound * (1 + times * 2.0**-23) + 2.0**-149 * length**0.5)


def no_context(name: str) -> ConfigError:
    """Return the error of a codec that was used without ``at``."""
    return ConfigError(
        f"compression.name = {name!r} was not told the round's seed, shapes and state: call at(context)."
    )
