from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.errors import ConfigError, SecAggError
from privfed.secagg.ring import (
    READ_AHEAD,
    RING_BITS,
    add_into,
    add_packed,
    check_ring_bits,
    check_vector,
    pack,
    packed_bytes,
    padding_is_zero,
    reduced,
    subtract_into,
    word_type,
    wrap,
)

WORDS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=20)


@given(WORDS)
def test_in_place_arithmetic_is_modular(pairs: list[tuple[int, int]]) -> None:
    left = np.array([a for a, _ in pairs], dtype=np.uint32)
    right = np.array([b for _, b in pairs], dtype=np.uint32)
    total = left.copy()
    add_into(total, right)
    assert total.tolist() == [(a + b) % 2**32 for a, b in pairs]
    subtract_into(total, right)
    assert total.tolist() == left.tolist()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_wrap_reduces_signed_integers(values: list[int]) -> None:
    for bits in RING_BITS:
        assert wrap(np.array(values, dtype=np.int64), bits).tolist() == [value % 2**bits for value in values]


def test_wrap_refuses_floats() -> None:
    with pytest.raises(SecAggError, match="float32"):
        wrap(np.zeros(2, dtype=np.float32))


@pytest.mark.parametrize("bits", [0, 8, 31, 33, 64, True, 32.0])
def test_other_rings_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match="ring_bits"):
        check_ring_bits(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        np.zeros(2, np.int32),
        np.zeros(2, np.uint64),
        np.zeros(3, np.uint32),
        np.zeros((2, 1), np.uint32),
    ],
)
def test_only_a_flat_uint32_vector_of_the_length_passes(values: object) -> None:
    check_vector(np.zeros(2, np.uint32), 2)
    with pytest.raises(SecAggError):
        check_vector(values, 2)


def bits_of(values: list[int], ring_bits: int) -> bytes:
    """Return the packed form by its definition: one long integer, the first value in its lowest bits."""
    whole = sum(value << (place * ring_bits) for place, value in enumerate(values))
    return whole.to_bytes((len(values) * ring_bits + 7) // 8, "little")


@given(data=st.data(), ring_bits=st.sampled_from(RING_BITS), offset=st.integers(0, 9))
def test_packing_is_by_the_definition_and_adding_unpacks(data: st.DataObject, ring_bits: int, offset: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**ring_bits - 1), max_size=37))
    before = data.draw(st.integers(0, 2**16 - 1))
    words = np.array(values, dtype=word_type(ring_bits))
    packed = pack(words, ring_bits)
    assert packed == bits_of(values, ring_bits) and len(packed) == packed_bytes(len(values), ring_bits)
    total = np.full(len(values), before, dtype=word_type(ring_bits))
    add_packed(total, b"x" * offset + packed + b"\xff" * READ_AHEAD, offset, ring_bits)
    assert reduced(total, ring_bits).tolist() == [(before + value) % 2**ring_bits for value in values]


@pytest.mark.parametrize("ring_bits", RING_BITS)
@pytest.mark.parametrize("length", [2**15 - 1, 2**15, 2**15 + 1, 2**16 + 3])
def test_packing_drops_bits_above_the_ring_at_every_chunk(ring_bits: int, length: int) -> None:
    words = np.random.default_rng(3).integers(0, 2**32, length, dtype=np.uint32).astype(word_type(ring_bits))
    total = np.zeros_like(words)
    add_packed(total, pack(words, ring_bits) + bytes(READ_AHEAD), 0, ring_bits)
    assert np.array_equal(reduced(total, ring_bits), wrap(words, ring_bits))


def test_a_last_byte_that_is_not_filled_up_with_zeros_is_seen() -> None:
    packed = bytearray(pack(np.array([2**20 - 1], np.uint32), 20))
    assert padding_is_zero(memoryview(packed), 1, 20)
    packed[-1] |= 0x10
    assert not padding_is_zero(memoryview(packed), 1, 20)
    assert padding_is_zero(memoryview(b""), 0, 20) and padding_is_zero(memoryview(b"\xff" * 3), 1, 24)
