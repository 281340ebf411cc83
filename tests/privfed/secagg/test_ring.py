from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.errors import ConfigError, SecAggError
from privfed.secagg.ring import add_into, check_ring_bits, check_vector, subtract_into, wrap

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
    assert wrap(np.array(values, dtype=np.int64)).tolist() == [value % 2**32 for value in values]


def test_wrap_refuses_floats() -> None:
    with pytest.raises(SecAggError, match="float32"):
        wrap(np.zeros(2, dtype=np.float32))


@pytest.mark.parametrize("bits", [16, 24, 31, 64, True, 32.0])
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
