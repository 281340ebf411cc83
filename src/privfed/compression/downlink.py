"""The broadcast through a codec: the server encodes, every client decodes.

What is encoded is the change since the start of the phase, which every client has, so that clients who missed rounds
need no history and errors do not add up. The parameters are released already: encoding them is post-processing.
"""

from __future__ import annotations

import numpy as np

from privfed.compression import Codec
from privfed.compression.message import read, sum_of_one, to_bytes
from privfed.errors import ConfigError, ProtocolError
from privfed.rng import PrivateStream
from privfed.types import Float32


def encode_broadcast(codec: Codec, change_D: Float32, stream: PrivateStream) -> tuple[bytes, Float32]:
    """Return the message for a change since the start [D], and the change that clients will decode from it.

    The server must go on from what clients decode where it compares their updates with what they started from.

    Raises:
        ConfigError: If the codec cannot encode a broadcast.
    """
    _check(codec)
    encoded = codec.encode(change_D, stream)
    decoded_D = codec.decode_sum(sum_of_one(encoded, codec)).astype(np.float32)
    return to_bytes(encoded, client_id="", weight=1.0), decoded_D


def decode_broadcast(codec: Codec, message: bytes, length: int) -> Float32:
    """Return the change since the start [D] that a broadcast holds.

    Raises:
        ConfigError: If the codec cannot encode a broadcast.
        ProtocolError: If the message is malformed.
    """
    _check(codec)
    received = read(message, length=length, codec=codec)
    if received.client_id or received.weight != 1.0:
        raise ProtocolError("The message is a client's, expected the server's broadcast.")
    return codec.decode_sum(received.alone(codec, length)).astype(np.float32)


def _check(codec: Codec) -> None:
    if not codec.properties.downlink:
        raise ConfigError(
            f"compression.name = {codec.name!r} cannot encode a broadcast: use 'identity', 'cast', "
            "'stochastic_quantizer', 'rotated_quantizer', 'top_k' or 'svd_truncate'."
        )
