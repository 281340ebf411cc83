"""The server's state of a codec as bytes: for its checkpoint, and (the public part) for the broadcast."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import msgpack
import numpy as np

from privfed.compression import CodecState, RoundContext
from privfed.errors import ProtocolError
from privfed.types import Float32

_TYPES = ("float32", "float64", "int64", "uint8")
_MAX_NAME = 64


def round_context(
    public: bytes,
    number: int,
    *,
    shapes: tuple[tuple[int, ...], ...],
    names: tuple[str, ...] = (),
    given_D: Float32 | None = None,
    carried: CodecState | None = None,
) -> RoundContext:
    """Return the context of round ``number`` (from 1) of a run.

    Args:
        public: What identifies the run and its phase and was fixed before any data was read, such as the digest of the
            configuration; the seeds follow from it, so that both sides compute them and nothing has to be sent.
        number: The round.
        shapes: Shapes of the tensors that are sent in this round, in order.
        names: Their names.
        given_D: What clients train from, of these tensors.
        carried: The server's public state.
    """
    return RoundContext(
        run_seed=hashlib.sha256(b"privfed codec, run" + public).digest(),
        round_seed=hashlib.sha256(b"privfed codec, round" + number.to_bytes(8, "little") + public).digest(),
        shapes=shapes,
        names=names,
        given_D=given_D,
        carried=carried or {},
    )


def state_to_bytes(state: CodecState) -> bytes:
    """Return a state as bytes; equal states give equal bytes.

    Raises:
        ValueError: If an array has a type that no codec uses (a programming error).
    """
    entries = []
    for name, values in sorted(state.items()):
        entries.append(
            [name, _TYPES.index(values.dtype.name), list(values.shape), np.ascontiguousarray(values).tobytes()]
        )
    packed: bytes = msgpack.packb(entries)
    return packed


def state_from_bytes(data: bytes) -> CodecState:
    """Return the state that :func:`state_to_bytes` packed.

    Raises:
        ProtocolError: If the bytes are malformed, or an array holds NaN or infinity.
    """
    try:
        entries = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"The codec's state cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise ProtocolError("The codec's state is no list of arrays.")
    return dict(_entry(entry) for entry in entries)


def _entry(entry: Any) -> tuple[str, Any]:
    if not isinstance(entry, list) or len(entry) != 4:
        raise ProtocolError("An array of the codec's state is not (name, type, shape, values).")
    name, kind, shape, raw = entry
    sound = (
        isinstance(name, str)
        and len(name) <= _MAX_NAME
        and type(kind) is int
        and 0 <= kind < len(_TYPES)
        and isinstance(shape, list)
        and all(type(size) is int and size >= 0 for size in shape)
        and isinstance(raw, bytes)
        and len(raw) == math.prod(shape) * np.dtype(_TYPES[kind]).itemsize
    )
    if not sound:
        raise ProtocolError("An array of the codec's state has fields of another type, or another length than it says.")
    values = np.frombuffer(raw, dtype=np.dtype(_TYPES[kind]).newbyteorder("<")).reshape(shape)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ProtocolError(f"The array {name!r} of the codec's state holds NaN or infinity, expected finite values.")
    return name, values.astype(_TYPES[kind])
