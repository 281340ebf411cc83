"""What the server sends to the clients of a round, as bytes: the broadcast, and what lies between two passes.

Shape suffixes: S shared values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from privfed.compression import CodecState
from privfed.compression.state import state_from_bytes, state_to_bytes
from privfed.errors import ProtocolError
from privfed.privacy.mechanisms import Terms
from privfed.types import Float32

_HEADER_BYTES = 2
_PLAIN, _CODED = 2, 3  # a broadcast with a codec's state or an encoded change says so by its version
_INTERIM = 1
_FACTOR = "values"


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """What the server sends to every client of a round.

    Attributes:
        params_D: The shared parameters; empty where ``packed`` stands for them.
        carried: Tensors by name that the server changes and no client trains, and a rule's own vectors.
        terms: What the privacy mechanism tells the clients.
        codec: The public part of the codec's state on the server, from which the round's codec follows.
        packed: The parameters through the downlink's codec, where there is one.
    """

    run_id: str
    phase: str
    round: int
    layout_digest: str
    params_D: Float32 = field(repr=False)
    carried: Mapping[str, Float32] = field(default_factory=dict, repr=False)
    terms: Terms = ()
    codec: CodecState = field(default_factory=dict, repr=False)
    packed: bytes | None = field(default=None, repr=False)

    def to_bytes(self) -> bytes:
        """Return the message."""
        names = [[name, list(value.shape)] for name, value in self.carried.items()]
        known = [self.run_id, self.phase, self.round, self.layout_digest, names, list(self.terms)]
        state = state_to_bytes(self.codec) if self.codec else b""
        coded = bool(state) or self.packed is not None
        packed = -1 if self.packed is None else len(self.packed)
        header: bytes = msgpack.packb([_CODED, *known, packed, len(state)] if coded else [_PLAIN, *known])
        params = self.packed if self.packed is not None else _written(self.params_D)
        tensors = b"".join(_written(each) for each in self.carried.values())
        return len(header).to_bytes(_HEADER_BYTES, "little") + header + params + tensors + state

    @staticmethod
    def from_bytes(message: bytes, *, size: int) -> Broadcast:
        """Return the broadcast of ``size`` parameters in ``message``.

        Raises:
            ProtocolError: If it is malformed or of another size.
        """
        end = _HEADER_BYTES + int.from_bytes(message[:_HEADER_BYTES], "little")
        try:
            version, *known = msgpack.unpackb(message[_HEADER_BYTES:end])
            run_id, phase, number, digest, names, terms, *coded = known
            packed, state = coded if version == _CODED else (-1, 0)
            sizes = [_values_of(entry) for entry in names]
            sound = all(isinstance(term, float) and math.isfinite(term) for term in terms)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolError(f"The broadcast's header cannot be read: {error}.") from error
        if version not in (_PLAIN, _CODED) or not (_is_count(state) and (_is_count(packed) or packed == -1)):
            raise ProtocolError(f"The broadcast has version {version!r}, expected {_PLAIN} or {_CODED}, well-formed.")
        if not (_is_count(number) and all(isinstance(text, str) for text in (run_id, phase, digest))):
            raise ProtocolError("The broadcast's header holds a value of another type than expected.")
        params = 4 * size if packed < 0 else packed
        if len(message) - end != params + 4 * sum(sizes) + state:
            raise ProtocolError(
                f"The broadcast holds {len(message) - end} bytes, expected {params + 4 * sum(sizes) + state} for "
                f"{size} parameters."
            )
        if not sound:
            raise ProtocolError(f"The broadcast's terms are {terms}, expected finite numbers.")
        first, last = end + params, len(message) - state
        values = _read(message[first:last])
        parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
        return Broadcast(
            run_id=run_id,
            phase=phase,
            round=number,
            layout_digest=digest,
            params_D=_read(message[end:first]) if packed < 0 else np.empty(0, dtype=np.float32),
            carried={name: part.reshape(shape) for (name, shape), part in zip(names, parts, strict=True)},
            terms=tuple(terms),
            codec=state_from_bytes(message[last:]) if state else {},
            packed=None if packed < 0 else message[end:first],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interim:
    """What the server tells the clients between a codec's two passes, for one round only.

    Attributes:
        values: What the codec's ``between`` made public.
    """

    phase: str
    round: int
    values: Float32 = field(repr=False)

    def to_bytes(self) -> bytes:
        """Return the message."""
        packed: bytes = msgpack.packb([_INTERIM, self.phase, self.round, state_to_bytes({_FACTOR: self.values})])
        return packed

    @staticmethod
    def from_bytes(message: bytes, *, phase: str, round_number: int) -> Interim:
        """Return the message of this round.

        Raises:
            ProtocolError: If it is malformed, or another round's.
        """
        try:
            version, found, number, raw = msgpack.unpackb(message)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolError(f"The message between the passes cannot be read: {error}.") from error
        if (version, found, number) != (_INTERIM, phase, round_number) or not isinstance(raw, bytes):
            raise ProtocolError(
                f"The message between the passes is of round {number!r} of {found!r}, expected {round_number} of "
                f"{phase!r}."
            )
        values = state_from_bytes(raw).get(_FACTOR)
        if values is None or values.dtype != np.float32 or values.ndim != 1:
            raise ProtocolError("The message between the passes holds no vector of float32 values.")
        return Interim(phase=phase, round=round_number, values=values)


def _written(values: Float32) -> bytes:
    return np.ascontiguousarray(values).astype("<f4", copy=False).tobytes()


def _read(data: bytes) -> Float32:
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def _values_of(entry: Any) -> int:
    """Return how many values a tensor (name, shape) has.

    Raises:
        ValueError: If it is no such thing.
    """
    name, shape = entry
    if not isinstance(name, str) or not isinstance(shape, list) or not all(_is_count(each) for each in shape):
        raise ValueError(f"a tensor is {entry!r}, expected its name and shape")
    return math.prod(shape)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
