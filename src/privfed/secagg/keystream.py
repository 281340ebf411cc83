"""Masks: AES-256-CTR keystreams, added to or subtracted from a vector block by block.

A mask is the keystream of AES-256 in counter mode from counter zero, read as little-endian 32-bit words. Each
key serves one mask only, so the fixed counter repeats no (key, counter) pair. All keystreams of one block are
applied while the block lies in the processor's cache, and the cipher writes into one reused buffer: nothing
as long as the vector is allocated.

Source: Bonawitz et al. 2017, section 3 (the PRG that expands a seed into a mask); NIST SP 800-38A, section
6.5 (counter mode).

Shape legend: M values of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from privfed.secagg.ring import VALUE_BYTES, UInt32, add_into, subtract_into

BLOCK_BYTES = 128 * 1024
"""Bytes of the vector worked on at a time; fits the second-level cache beside the buffer."""
STREAMS_AT_ONCE = 64
"""Cipher contexts held open at a time; bounds memory where very many masks are removed."""
_SLACK_BYTES = 15  # older releases of the library ask for a buffer one cipher block longer than the data

_Stream = tuple[CipherContext, Callable[[UInt32, UInt32], None]]


def apply_masks(
    values_M: UInt32,
    plus: Sequence[bytes] = (),
    minus: Sequence[bytes] = (),
    *,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Add the keystreams of the keys ``plus`` to ``values_M`` and subtract those of ``minus``, in place.

    Args:
        values_M: A writable, contiguous, flat uint32 array.
        plus: Keys of 32 bytes.
        minus: Keys of 32 bytes.
        block_bytes: Bytes worked on at a time, a positive multiple of four; does not change the result.

    Raises:
        ValueError: If ``block_bytes`` is not a positive multiple of four or ``values_M`` is not as described.
    """
    if block_bytes <= 0 or block_bytes % VALUE_BYTES:
        raise ValueError(f"Expected block_bytes to be a positive multiple of {VALUE_BYTES}, got {block_bytes}.")
    if values_M.dtype != np.uint32 or values_M.ndim != 1 or not values_M.flags.c_contiguous:
        raise ValueError("Expected a contiguous flat uint32 array.")
    work = chain(((key, add_into) for key in plus), ((key, subtract_into) for key in minus))
    while batch := [(_open(key), combine) for key, combine in islice(work, STREAMS_AT_ONCE)]:
        _apply_batch(values_M, batch, block_bytes)


def _apply_batch(values_M: UInt32, streams: Sequence[_Stream], block_bytes: int) -> None:
    """Run all ``streams`` over ``values_M``, block by block."""
    block_bytes = min(block_bytes, max(values_M.nbytes, VALUE_BYTES))
    zeros = memoryview(bytes(block_bytes))
    buffer = bytearray(block_bytes + _SLACK_BYTES)
    words = np.frombuffer(buffer, dtype="<u4", count=block_bytes // VALUE_BYTES)
    for part in _blocks(values_M, words.size):
        for cipher, combine in streams:
            cipher.update_into(zeros[: part.nbytes], buffer)
            combine(part, words[: part.size])


def _blocks(values_M: UInt32, size: int) -> Iterator[UInt32]:
    """Yield views of ``size`` values each; the last may be shorter."""
    for start in range(0, values_M.size, size):
        yield values_M[start : start + size]


def _open(key: bytes) -> CipherContext:
    """Return a running AES-256-CTR cipher from counter zero."""
    if len(key) != 32:
        raise ValueError(f"Expected a key of 32 bytes, got {len(key)}.")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
