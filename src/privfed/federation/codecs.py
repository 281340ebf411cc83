"""A codec in a run: the seeds of its rounds, its state on the server, a broadcast through it.

*Seeds.* Both sides compute them from the run's seed, its id, the phase and the number of the round; nothing is sent.
They are fresh each round, public, and fixed before any data are read, so no client's data can depend on them unless
the client means it to: what a codec claims in expectation over its seed (``unbiased``) holds for data that were not
chosen to suit the seed. What it claims of one client's influence (``l2_bound``) holds for every seed and whatever the
data, so privacy does not rest on when the seed was known.

*Error feedback.* What a message left out stays with the client (``privfed.federation.personal``) and is added to its
next update. Under client-level privacy the *corrected* update is clipped, so one client adds no more than the bound to
any round, whatever it kept. (What it kept depends on the rounds that it was sampled for. Each round is sampled afresh,
so for every history the round is dominated by the accounted pair, and so is the mixture over histories.) Under
example-level privacy the update is private before the codec sees it; what is kept is computed from it and from
broadcasts, so it is post-processing. Without privacy it is as private as the data.

*State.* A rule that sends other tensors in other rounds has a state, and a residual, for each set of tensors.

Shape suffixes: S shared values, M values of a sum of messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.compression import Codec, CodecState, RoundContext, TwoPass, public_stream
from privfed.compression.downlink import decode_broadcast, encode_broadcast
from privfed.compression.feedback import RESIDUAL
from privfed.compression.state import round_context
from privfed.errors import ConfigError, ProtocolError
from privfed.federation.messages import Broadcast
from privfed.federation.sharing import Selection
from privfed.types import EncodedSum, Float32, ParamLayout

_KEY = 12  # characters of a digest that tell a run's few sets of tensors apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run stands, as everybody knows it: what the seeds of a round follow from."""

    seed: int
    run_id: str
    phase: str
    round: int

    def context(
        self,
        layout: ParamLayout,
        carried: CodecState | None = None,
        use: str = "up",
        given_D: Float32 | None = None,
    ) -> RoundContext:
        """Return what a codec is told of the round.

        Args:
            layout: What is sent.
            carried: The server's public state.
            use: Which of the round's messages it is for; each has seeds of its own.
            given_D: What clients train from, of what is sent.
        """
        public = "\x1f".join((str(self.seed), self.run_id, self.phase, use)).encode()
        return round_context(
            public, self.round, shapes=layout.shapes, names=layout.names, given_D=given_D, carried=carried
        )


def codec_at(codec: Codec, place: Place, sent: Selection, carried: CodecState, start_D: Float32 | None = None) -> Codec:
    """Return a codec for one round; one that is the same in every round as it is.

    Args:
        codec: The run's.
        place: The round.
        sent: What is sent.
        carried: The server's public state.
        start_D: All trained values as clients train from them, as far as they are sent; None where no round began.
    """
    if not codec.properties.needs_context:
        return codec
    given_M = None if start_D is None else sent.take(start_D)
    return codec.at(place.context(sent.layout, carried, given_D=given_M))


def state_of(states: CodecState, codec: Codec, sent: Selection) -> CodecState:
    """Return the server's state of a codec for what is sent, out of all that it keeps."""
    prefix = f"{_key(sent)}."
    found = {name.removeprefix(prefix): value for name, value in states.items() if name.startswith(prefix)}
    return found or codec.start_state(sent.size)


def with_state(states: CodecState, state: CodecState, sent: Selection) -> CodecState:
    """Return all that the server keeps, with the state for what was sent replaced."""
    return {**states, **{f"{_key(sent)}.{name}": value for name, value in state.items()}}


def residual_name(sent: Selection) -> str:
    """Return the name of a client's residual for what is sent, among the arrays that it keeps."""
    return f"{RESIDUAL}.{_key(sent)}"


def residuals(own: Mapping[str, Float32]) -> dict[str, Float32]:
    """Return all residuals out of what a client keeps."""
    return {name: value for name, value in own.items() if name.startswith(f"{RESIDUAL}.")}


def decoded_alone(codec: Codec, message: EncodedSum) -> NDArray[np.float64]:
    """Return what one client's message stands for [D], by a codec of the round that is ``separable``."""
    length = message.length
    return codec.expand(codec.linear_sum(message), codec.start_state(length), length)[0]


def between(codec: Codec, mean_M: NDArray[np.float64], length: int) -> Float32:
    """Return what the server tells the clients after the first of two passes.

    Raises:
        ConfigError: If the codec takes one.
    """
    return _two_passes(codec).between(mean_M, length)


def second_codec(codec: Codec, told: Float32, length: int, first_M: NDArray[np.float64] | None = None) -> Codec:
    """Return the codec of the second pass, given what the server told between the passes and what the first one was.

    Raises:
        ConfigError: If the codec takes one pass.
        ProtocolError: If what was told cannot be.
    """
    return _two_passes(codec).second(told, length, first_M)


def _two_passes(codec: Codec) -> TwoPass:
    if not isinstance(codec, TwoPass):
        raise ConfigError(f"compression.name = {codec.name!r} has no second pass.")
    return codec


def bound_of(codec: Codec, length: int) -> Callable[[float], float]:
    """Return what maps a bound on a client's vector [length] to one on what it adds to the round's linear sum."""

    def bound(clip: float) -> float:
        found = codec.l2_bound(clip, length)
        if found is None:
            raise ConfigError(
                f"compression.name = {codec.name!r} gives no bound on the encoded update, "
                'which privacy.unit = "client" needs: use compression.name = "identity".'
            )
        return found

    return bound


def _key(sent: Selection) -> str:
    return sent.layout.digest[:_KEY]


@dataclass(frozen=True, slots=True, kw_only=True)
class Downlink:
    """The broadcast's parameters through a codec: their change since a start that every client computes by itself.

    Clients train from what they decode, the same for all. The server keeps its own parameters exact and adds updates
    to those, so the error of one broadcast is not carried into the next. What is broadcast was released already;
    encoding it costs no privacy, and its random choices are public.

    Attributes:
        codec: Not yet of any round.
        layout: The shared tensors.
        start_S: What they were before any training, which follows from the configuration.
        seed: The run's.
    """

    codec: Codec
    layout: ParamLayout
    start_S: Float32 = field(repr=False)
    seed: int

    def encode(self, params_S: Float32, run_id: str, phase: str, round_number: int) -> tuple[bytes, Float32]:
        """Return the message for parameters, and the parameters that clients decode from it."""
        context = self._context(run_id, phase, round_number)
        stream = public_stream(context.round_seed, "downlink", hashlib.sha256(params_S.tobytes()).hexdigest())
        message, change_S = encode_broadcast(self.codec.at(context), params_S - self.start_S, stream)
        return message, self.start_S + change_S

    def decode(self, received: Broadcast) -> Float32:
        """Return the parameters of a broadcast.

        Raises:
            ProtocolError: If there are none in it, or they are malformed.
        """
        if received.packed is None:
            raise ProtocolError("The broadcast holds plain parameters, expected them encoded as [downlink] says.")
        codec = self.codec.at(self._context(received.run_id, received.phase, received.round))
        return self.start_S + decode_broadcast(codec, received.packed, self.start_S.size)

    def _context(self, run_id: str, phase: str, round_number: int) -> RoundContext:
        place = Place(seed=self.seed, run_id=run_id, phase=phase, round=round_number)
        return place.context(self.layout, use="down")


def received_params(received: Broadcast, downlink: Downlink | None) -> Float32:
    """Return the shared parameters [S] that a client trains from.

    Raises:
        ProtocolError: If they are encoded and the client expects them plain, or the other way round.
    """
    if downlink is not None:
        return downlink.decode(received)
    if received.packed is not None:
        raise ProtocolError("The broadcast's parameters are encoded and this client's [downlink] is plain.")
    return received.params_D
