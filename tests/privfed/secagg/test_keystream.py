from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from privfed.secagg import keystream
from privfed.secagg.keystream import BLOCK_BYTES, SPAN_BYTES, STREAMS_AT_ONCE, apply_masks, mask_packed
from privfed.secagg.ring import RING_BITS, pack, packed_bytes, word_type

EDGE = BLOCK_BYTES // 4


def reference(key: bytes, length: int) -> np.ndarray:
    """Return the keystream by one straight call of the library."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * length))
    return np.frombuffer(stream, dtype="<u4")


@given(key=st.binary(min_size=32, max_size=32), length=st.integers(0, 300), words=st.integers(1, 100))
def test_any_block_size_gives_the_straight_keystream(key: bytes, length: int, words: int) -> None:
    values = np.zeros(length, dtype=np.uint32)
    apply_masks(values, [key], block_bytes=4 * words)
    assert np.array_equal(values, reference(key, length))


@pytest.mark.parametrize("length", [0, 1, EDGE - 1, EDGE, EDGE + 1, 2 * EDGE + 3])
def test_default_blocks_at_their_edges(length: int) -> None:
    values = np.ones(length, dtype=np.uint32)
    apply_masks(values, [b"a" * 32], [b"b" * 32])
    expected = 1 + reference(b"a" * 32, length) - reference(b"b" * 32, length)
    assert np.array_equal(values, expected.astype(np.uint32))


@given(key=st.binary(min_size=32, max_size=32), length=st.integers(0, 300))
def test_the_keystream_is_that_of_gcm_from_its_second_counter_on(key: bytes, length: int) -> None:
    """GCM with a zero nonce encrypts with the counters from 2 on, and ours starts at 0: two blocks of 16 earlier."""
    ours = np.zeros(length + 8, dtype=np.uint32)
    apply_masks(ours, [key])
    theirs = AESGCM(key).encrypt(bytes(12), bytes(4 * length), None)[: 4 * length]
    assert ours[8:].tobytes() == theirs


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, SPAN_BYTES // 2 - 1, SPAN_BYTES, SPAN_BYTES + 5, 3 * SPAN_BYTES + 1])
def test_threads_do_not_change_the_result(dtype: type, length: int) -> None:
    found = []
    for threads in (1, 2, 3, 7):
        values = np.arange(length).astype(dtype)
        apply_masks(values, [b"a" * 32], [b"b" * 32], threads=threads)
        found.append(values)
    assert all(np.array_equal(found[0], other) for other in found)
    assert not np.array_equal(found[0], np.arange(length).astype(dtype))


@pytest.mark.parametrize("ring_bits", RING_BITS)
@pytest.mark.parametrize("length", [0, 1, 7, BLOCK_BYTES // 4 + 3, SPAN_BYTES + 5])
def test_masking_into_the_message_is_masking_and_then_packing(ring_bits: int, length: int) -> None:
    values = np.random.default_rng(7).integers(0, 2**ring_bits, length, dtype=np.uint32)
    before, plus, minus = values.copy(), [b"a" * 32, b"b" * 32], [b"c" * 32]
    out = np.zeros(packed_bytes(length, ring_bits), dtype=np.uint8)
    mask_packed(values, plus, minus, ring_bits, out)
    words = values.astype(word_type(ring_bits))
    apply_masks(words, plus, minus)
    assert out.tobytes() == pack(words, ring_bits) and np.array_equal(values, before)


def test_words_of_16_bits_use_half_the_keystream() -> None:
    values = np.zeros(50, dtype=np.uint16)
    apply_masks(values, [b"a" * 32])
    assert np.array_equal(values, reference(b"a" * 32, 25).view(np.uint16))


def test_more_streams_than_are_open_at_once_cancel() -> None:
    keys = [bytes([i]) * 32 for i in range(STREAMS_AT_ONCE + 7)]
    values = np.arange(50, dtype=np.uint32)
    apply_masks(values, keys)
    assert not np.array_equal(values, np.arange(50))
    apply_masks(values, [], keys)
    assert np.array_equal(values, np.arange(50))


@pytest.mark.parametrize("processors", [1, 2, 5])
def test_parallel_work_is_done_once_and_in_order(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(keystream, "processors", lambda: processors)
    seen: list[int] = []

    def act(item: int) -> int:
        seen.append(item)
        return item * item

    for count in (0, 1, 2, 7, 200):
        seen.clear()
        assert keystream.in_parallel(act, range(count)) == [item * item for item in range(count)]
        assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_an_error_in_any_thread_reaches_the_caller_when_nothing_runs_any_more(
    monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    monkeypatch.setattr(keystream, "processors", lambda: 3)
    running: set[int] = set()

    def act(item: int) -> None:
        running.add(item)
        time.sleep(0.01)
        running.discard(item)
        if item == bad:
            raise IndexError(item)

    with pytest.raises(IndexError, match=str(bad)):
        keystream.in_parallel(act, range(7))
    assert not running


def test_a_busy_pool_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that have other work to do leave all of it to the caller."""
    monkeypatch.setattr(keystream, "processors", lambda: 2)
    pool, free = ThreadPoolExecutor(max_workers=1), threading.Event()
    monkeypatch.setattr(keystream, "_pool", lambda: pool)
    busy = pool.submit(free.wait)
    assert keystream.in_parallel(lambda item: threading.get_ident(), range(4)) == [threading.get_ident()] * 4
    assert not busy.done()
    free.set()
    pool.shutdown()


def test_bad_arguments_are_refused() -> None:
    values = np.zeros(8, dtype=np.uint32)
    for block_bytes in (0, -4, 6):
        with pytest.raises(ValueError, match="block_bytes"):
            apply_masks(values, [bytes(32)], block_bytes=block_bytes)
    with pytest.raises(ValueError, match="contiguous"):
        apply_masks(values[::2], [bytes(32)])
    with pytest.raises(ValueError, match="32 bytes"):
        apply_masks(values, [bytes(16)])
