"""Masks: AES-256-CTR keystreams, added to or subtracted from a vector block by block.

A mask is the keystream of AES-256 in counter mode from counter zero, read as little-endian words of the ring (16
bits for a ring of 16, else 32). Each key serves one mask only, so the fixed counter repeats no (key, counter)
pair. All keystreams of one block are applied while the block lies in the processor's cache, and the cipher writes
into one reused buffer: nothing as long as the vector is allocated. Cipher and addition both release the
interpreter's lock, so a long vector is cut into spans that threads work on, each from its own counter.

Source: Bonawitz et al. 2017, section 3 (the PRG that expands a seed into a mask); NIST SP 800-38A, section
6.5 (counter mode).

Shape legend: M values of a vector.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from privfed.secagg.ring import Words, add_into, pack_into, subtract_into, word_type

BLOCK_BYTES = 128 * 1024
"""Bytes of the vector worked on at a time; fits the second-level cache beside the buffer."""
STREAMS_AT_ONCE = 64
"""Cipher contexts held open at a time; bounds memory where very many masks are removed."""
SPAN_BYTES = 512 * 1024
"""A thread takes no less than this much of a vector: below, starting it costs more than it saves."""
_SPANS_A_THREAD = 2
_AES_BLOCK = 16
_ZEROS = bytes(BLOCK_BYTES)
_SLACK_BYTES = 15  # older releases of the library ask for a buffer one cipher block longer than the data

_T = TypeVar("_T")
_R = TypeVar("_R")
_Stream = tuple[CipherContext, Callable[[Words, Words], None]]


def apply_masks(
    values_M: Words,
    plus: Sequence[bytes] = (),
    minus: Sequence[bytes] = (),
    *,
    block_bytes: int = BLOCK_BYTES,
    threads: int | None = None,
) -> None:
    """Add the keystreams of the keys ``plus`` to ``values_M`` and subtract those of ``minus``, in place.

    Args:
        values_M: A writable, contiguous, flat array of uint32 or uint16.
        plus: Keys of 32 bytes.
        minus: Keys of 32 bytes.
        block_bytes: Bytes worked on at a time, a positive multiple of four; does not change the result.
        threads: Most threads to use; None for one per processor, at most 8. Does not change the result.

    Raises:
        ValueError: If ``block_bytes`` is not a positive multiple of four or ``values_M`` is not as described.
    """
    if block_bytes <= 0 or block_bytes % 4:
        raise ValueError(f"Expected block_bytes to be a positive multiple of 4, got {block_bytes}.")
    if values_M.dtype not in (np.uint32, np.uint16) or values_M.ndim != 1 or not values_M.flags.c_contiguous:
        raise ValueError("Expected a contiguous flat array of uint32 or uint16.")
    work = _work(plus, minus)
    width = values_M.itemsize

    def apply(span: tuple[int, int]) -> None:
        first, last = span
        rest = iter(work)
        while batch := [(_open(key, first * width), combine) for key, combine in islice(rest, STREAMS_AT_ONCE)]:
            _apply_batch(values_M[first:last], batch, block_bytes)

    in_parallel(apply, spans(values_M.size, width, threads))


def mask_packed(
    values_M: NDArray[np.uint32], plus: Sequence[bytes], minus: Sequence[bytes], ring_bits: int, out: NDArray[np.uint8]
) -> None:
    """Write ``values_M`` under the masks of the keys to ``out``, packed, without changing or copying it as a whole.

    Args:
        values_M: Flat values below 2^ring_bits.
        plus: Keys of 32 bytes whose keystreams are added.
        minus: Keys whose keystreams are subtracted.
        ring_bits: Bits of a value.
        out: As many bytes as the packed values take.

    Raises:
        ValueError: If a key has another length.
    """
    work, dtype = _work(plus, minus), np.dtype(word_type(ring_bits))
    size = BLOCK_BYTES // dtype.itemsize

    def mask(span: tuple[int, int]) -> None:
        first, last = span
        streams = [(_open(key, first * dtype.itemsize), combine) for key, combine in work]
        block: Words = np.empty(size, dtype=dtype)
        for start in range(first, last, size):
            part = block[: min(size, last - start)]
            np.copyto(part, values_M[start : start + part.size], casting="unsafe")
            _apply_batch(part, streams, BLOCK_BYTES)
            pack_into(part, ring_bits, out[start * ring_bits // 8 :])

    in_parallel(mask, spans(values_M.size, dtype.itemsize))


def spans(length: int, width: int, threads: int | None = None) -> list[tuple[int, int]]:
    """Return the parts of a vector that threads take: first value and the one after the last.

    Each starts on a whole cipher block and, packed, on a whole byte.

    Args:
        length: Number of values.
        width: Bytes of a value in memory.
        threads: Most parts; None for two per processor, for a thread that is slow to take the second may lose it.
    """
    most = _SPANS_A_THREAD * processors() if threads is None else threads
    count = max(1, min(most, length * width // SPAN_BYTES))
    step = max(1, -(-length // count // _AES_BLOCK)) * _AES_BLOCK
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def processors() -> int:
    """Return how many threads are worth starting on this machine: one per processor, at most 8."""
    return min(8, os.cpu_count() or 1)


def in_parallel(act: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Return what ``act`` gives for each item, in order.

    Threads take the next item whenever they are free, and this one as well: where the others get no processor, it does
    all the work and waits for nobody who has not begun.
    """
    helpers = min(processors(), len(items)) - 1
    if helpers < 1:
        return [act(item) for item in items]
    waiting, results = deque(range(len(items))), dict[int, _R]()

    def run() -> None:
        while True:
            try:
                place = waiting.popleft()
            except IndexError:  # asking beforehand would leave another thread time to take the last one
                return
            results[place] = act(items[place])

    pending = [_pool().submit(run) for _ in range(helpers)]
    try:
        run()
    finally:
        waiting.clear()
        begun = [one for one in pending if not one.cancel()]
        wait(begun)
    for one in begun:
        one.result()
    return [results[place] for place in range(len(items))]


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Return the threads of this process; they sleep when there is nothing to do."""
    return ThreadPoolExecutor(max_workers=processors(), thread_name_prefix="privfed-secagg")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _work(plus: Sequence[bytes], minus: Sequence[bytes]) -> Sequence[tuple[bytes, Callable[[Words, Words], None]]]:
    """Return each key with what is done with its keystream."""
    if any(len(key) != 32 for key in (*plus, *minus)):
        raise ValueError("Expected keys of 32 bytes.")
    return [(key, add_into) for key in plus] + [(key, subtract_into) for key in minus]


def _apply_batch(values_M: Words, streams: Sequence[_Stream], block_bytes: int) -> None:
    """Run all ``streams`` on over ``values_M``, block by block."""
    block_bytes = min(block_bytes, max(values_M.nbytes, 4))
    zeros = memoryview(_ZEROS if block_bytes <= BLOCK_BYTES else bytes(block_bytes))
    buffer = bytearray(block_bytes + _SLACK_BYTES)
    words: Words = np.frombuffer(buffer, dtype=values_M.dtype, count=block_bytes // values_M.itemsize)
    for part in _blocks(values_M, words.size):
        for cipher, combine in streams:
            cipher.update_into(zeros[: part.nbytes], buffer)
            combine(part, words[: part.size])


def _blocks(values_M: Words, size: int) -> Iterator[Words]:
    """Yield views of ``size`` values each; the last may be shorter."""
    for start in range(0, values_M.size, size):
        yield values_M[start : start + size]


def _open(key: bytes, first_byte: int) -> CipherContext:
    """Return a running AES-256-CTR cipher at this byte of its keystream, a multiple of 16."""
    counter = (first_byte // _AES_BLOCK).to_bytes(_AES_BLOCK, "big")
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
