"""The server's state: bytes and back, a run that is stopped and resumed, and seeds that both sides compute."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop import CASES, LENGTH, Loop, build, declared

from privfed.compression.state import round_context, state_from_bytes, state_to_bytes
from privfed.errors import ProtocolError

KEEPING = [case for case in CASES if declared(case).server_state]


def vectors(count, seed):
    return list(np.random.default_rng(seed).standard_normal((count, LENGTH)).astype(np.float32) / 20)


@pytest.mark.parametrize("case", KEEPING)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(case):
    """The server is built anew after every round, from the bytes of its state."""
    whole, stopped = Loop(case), Loop(case)
    for number in range(5):
        wanted = whole.round(vectors(2, number))
        found = stopped.round(vectors(2, number))
        assert np.array_equal(found, wanted)
        packed = state_to_bytes(stopped.state)
        again = state_from_bytes(packed)
        assert state_to_bytes(again) == packed
        for name, values in stopped.state.items():
            assert again[name].dtype == values.dtype and again[name].shape == values.shape
        residuals = stopped.residuals
        stopped = Loop(case, number=number + 1, state=again, residuals=residuals)


@pytest.mark.parametrize("case", KEEPING)
def test_only_the_public_part_travels_and_it_is_not_large(case):
    loop = Loop(case)
    loop.round(vectors(2, 1))
    public = build(case).public_state(loop.state)
    assert set(public) <= set(loop.state)
    limit = {"count_sketch": 5, "global_mask": LENGTH / 8 + 30, "powersgd": 4 * 64 + 30, "bernoulli_mask": 5}[
        build(case).name
    ]
    assert len(state_to_bytes(public)) <= limit


GOOD = ["right", 0, [2], np.ones(2, dtype="<f4").tobytes()]


@pytest.mark.parametrize(
    "entries",
    [
        7, "text", {"a": 1}, [7], [GOOD[:3]], [[*GOOD, 0]],
        [[5, *GOOD[1:]]], [["x" * 65, *GOOD[1:]]],
        [[GOOD[0], 9, *GOOD[2:]]], [[GOOD[0], -1, *GOOD[2:]]], [[GOOD[0], True, *GOOD[2:]]],
        [[GOOD[0], "f", *GOOD[2:]]],
        [[*GOOD[:2], 2, GOOD[3]]], [[*GOOD[:2], [3], GOOD[3]]], [[*GOOD[:2], [-2], GOOD[3]]],
        [[*GOOD[:2], [2**62], GOOD[3]]], [[*GOOD[:2], [2.0], GOOD[3]]],
        [[*GOOD[:3], "12345678"]], [[*GOOD[:3], np.array([1, np.nan], dtype="<f4").tobytes()]],
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_state_is_refused(entries):
    state_from_bytes(msgpack.packb([GOOD]))
    with pytest.raises(ProtocolError):
        state_from_bytes(msgpack.packb(entries))


@given(noise=st.binary(max_size=60))
def test_random_bytes_are_no_state(noise):
    try:
        found = state_from_bytes(noise)
    except ProtocolError:
        return
    assert found == {} and noise == b"\x90"  # an empty list


def test_seeds_follow_from_what_is_public_and_the_round():
    one = round_context(b"digest", 1, shapes=((3,),))
    assert one == round_context(b"digest", 1, shapes=((3,),))
    later, other = round_context(b"digest", 2, shapes=((3,),)), round_context(b"another", 1, shapes=((3,),))
    assert later.run_seed == one.run_seed and later.round_seed != one.round_seed
    assert other.run_seed != one.run_seed and other.round_seed != one.round_seed
    assert len({one.run_seed, one.round_seed, later.round_seed}) == 3
    assert one.inner(5).round_seed != one.round_seed and one.inner(5).shapes == ((5,),)
