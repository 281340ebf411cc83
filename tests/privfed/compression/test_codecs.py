"""What every codec promises, and what its own file adds: sums decode to sums, bounds hold, bad values are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from privfed.compression import CODECS, Ring
from privfed.compression.fixed_point import from_ring, largest_step_count, to_ring
from privfed.compression.message import to_bytes
from privfed.errors import ClientError, ConfigError
from privfed.rng import PrivateStream
from privfed.types import EncodedSum

RINGS = [None, Ring(bits=32, clients=2), Ring(bits=32, clients=64)]


def codec(name, ring=None, **options):
    plugin = CODECS.get(name)
    return plugin.build(plugin.config(**options), ring)


def stream(*names):
    return PrivateStream(bytes(range(32)), "codec", *names)


def summed(encoded, ring):
    """Return what the server has after adding encodings: modulo 2^bits under masks, plainly without."""
    first = encoded[0]
    if ring is not None:
        total = np.zeros(first.length, dtype=np.uint64)
        for one in encoded:
            total = (total + one.values_M.astype(np.uint64)) % np.uint64(1 << ring.bits)
    elif first.values_M.dtype == np.float32:
        total = np.sum([one.values_M.astype(np.float64) for one in encoded], axis=0)
    else:
        total = np.sum([from_ring(one.values_M.astype(np.uint64), one.num_bits) for one in encoded], axis=0)
    return EncodedSum(
        sum_M=total,
        codec=first.codec,
        scale=first.scale,
        length=first.length,
        survivors=len(encoded),
        total_weight=float(len(encoded)),
    )


def decoded(made, vector_D, ring, *names):
    return made.decode_sum(summed([made.encode(vector_D, stream(*names))], ring))


SIZES = st.integers(1, 40)


def vectors(largest, size=SIZES):
    largest = float(np.nextafter(np.float32(largest), np.float32(0)))
    values = st.floats(-largest, largest, width=32, allow_nan=False)
    return size.flatmap(lambda n: hnp.arrays(np.float32, n, elements=values))


# --- the contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", RINGS, ids=str)
@pytest.mark.parametrize("name", CODECS.names())
def test_contract(name, ring):
    made = codec(name, ring)
    assert made.summable and made.shared_support in (True, False) and made.unbiased in (True, False)
    draw = np.random.default_rng(1)
    clients = 2 if ring is None else ring.clients
    # small enough for the range of every codec's defaults
    updates = [draw.uniform(-0.04, 0.04, 300).astype(np.float32) for _ in range(clients)]
    encoded = [made.encode(update, stream(number)) for number, update in enumerate(updates)]
    for one in encoded:
        assert (one.codec, one.length, one.saturated) == (name, 300, 0)
        assert "values" not in repr(one)  # a value never lands in a log
        if one.values_M.dtype == np.uint32:
            assert int(one.values_M.max()) < 2**one.num_bits
    assert len({(one.scale, one.num_bits) for one in encoded}) == 1  # a shared grid: the sum means something
    total = made.decode_sum(summed(encoded, ring))
    step = encoded[0].scale if encoded[0].values_M.dtype == np.uint32 else 0.0
    assert np.abs(total - np.sum(updates, axis=0, dtype=np.float64)).max() <= clients * step + 1e-12
    assert total.dtype == np.float64


@pytest.mark.parametrize("ring", RINGS, ids=str)
@pytest.mark.parametrize("name", CODECS.names())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, ring, bad):
    with pytest.raises(ClientError, match="NaN or infinity"):
        codec(name, ring).encode(np.array([0.0, bad, 0.01], dtype=np.float32), stream())


@pytest.mark.parametrize("ring", RINGS, ids=str)
@pytest.mark.parametrize("name", CODECS.names())
@settings(max_examples=60, deadline=None)
@given(vector_D=vectors(0.05), seed=st.integers(0, 1000))
def test_the_l2_bound_is_never_exceeded(name, ring, vector_D, seed):
    made = codec(name, ring)
    norm = float(np.linalg.norm(vector_D.astype(np.float64)))
    bound = made.l2_bound(norm, len(vector_D))
    assert bound is not None
    assert np.linalg.norm(decoded(made, vector_D, ring, seed)) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("name", CODECS.names())
def test_the_same_stream_gives_the_same_message_and_another_key_does_not_change_the_grid(name):
    made, vector_D = codec(name), np.linspace(-0.03, 0.03, 50, dtype=np.float32)
    first, again = (to_bytes(made.encode(vector_D, stream(1)), client_id="c", weight=1.0) for _ in range(2))
    assert first == again
    assert made.encode(vector_D, stream(2)).scale == made.encode(vector_D, stream(1)).scale


@pytest.mark.parametrize("name", CODECS.names())
def test_an_empty_update_and_all_zeros(name):
    for ring in RINGS:
        assert not decoded(codec(name, ring), np.zeros(7, dtype=np.float32), ring).any()


# --- the ring -----------------------------------------------------------------------------------------------------


@given(bits=st.integers(2, 32), steps=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_residues_stand_for_signed_integers(bits, steps):
    half = 1 << (bits - 1)
    inside_M = np.array([(s + half) % (2 * half) - half for s in steps], dtype=np.int64)
    residues_M = to_ring(inside_M, bits)
    assert residues_M.dtype == np.uint32
    assert np.array_equal(from_ring(residues_M.astype(np.uint64), bits), inside_M)


@given(bits=st.integers(8, 32), clients=st.integers(1, 1000))
def test_the_largest_count_times_the_clients_fits(bits, clients):
    largest = largest_step_count(bits, clients)
    assert largest * clients < 2 ** (bits - 1) <= (largest + 1) * clients


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "extreme"), [("identity", 16.0), ("stochastic_quantizer", 0.05)])
def test_extreme_values_of_a_whole_cohort_add_up_without_wrapping(name, extreme, sign):
    for clients in (2, 3, 1000):
        ring = Ring(bits=32, clients=clients)
        made = codec(name, ring)
        encoded = [made.encode(np.full(3, sign * extreme, dtype=np.float32), stream(i)) for i in range(clients)]
        np.testing.assert_allclose(made.decode_sum(summed(encoded, ring)), sign * clients * extreme, rtol=1e-6)


# --- identity -----------------------------------------------------------------------------------------------------


@given(vector_D=vectors(3e38))
def test_identity_sends_floats_bit_for_bit(vector_D):
    made = codec("identity")
    assert np.array_equal(decoded(made, vector_D, None).astype(np.float32), vector_D)
    assert made.l2_bound(2.5, 10**6) == 2.5
    assert made.unbiased


@given(data=st.data(), clients=st.integers(1, 5))
def test_identity_in_a_ring_is_off_by_half_a_step_each(data, clients):
    ring = Ring(bits=32, clients=clients)
    made = codec("identity", ring)
    updates = [data.draw(vectors(16.0, st.just(6))) for _ in range(clients)]
    encoded = [made.encode(update, stream()) for update in updates]
    step = encoded[0].scale
    assert step == pytest.approx(16.0 * clients / 2**31, rel=1e-6)
    error = made.decode_sum(summed(encoded, ring)) - np.sum(updates, axis=0, dtype=np.float64)
    assert np.abs(error).max() <= clients * step / 2 * (1 + 1e-6)


def test_identity_in_a_ring_refuses_what_it_cannot_hold():
    made = codec("identity", RINGS[1], max_value=2.0)
    made.encode(np.array([2.0, -2.0], dtype=np.float32), stream())
    with pytest.raises(ClientError, match=r"beyond compression.max_value = 2: raise max_value"):
        made.encode(np.array([0.0, -2.5], dtype=np.float32), stream())
    codec("identity", None, max_value=2.0).encode(np.array([2.5], dtype=np.float32), stream())  # floats have no range


# --- the stochastic quantizer -------------------------------------------------------------------------------------

DRAWS = 100_000


def mean_is_right(samples, value, step):
    """Test that independent roundings of ``value`` average to it: five standard errors of a two-point law."""
    share = value / step - np.floor(value / step)
    error = step * np.sqrt(max(share * (1 - share), 1e-4) / len(samples))
    return abs(float(samples.mean()) - value) < 5 * error


@pytest.mark.parametrize("ring", RINGS[:2], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("value", [0.0137, -0.031, 0.0499, 0.0])
def test_rounding_is_unbiased(bits, value, ring):
    made = codec("stochastic_quantizer", ring, bits=bits)
    vector_D = np.full(DRAWS, value, dtype=np.float32)
    encoded = made.encode(vector_D, stream(bits, value))
    found = made.decode_sum(summed([encoded], ring))
    exact, step = float(vector_D[0]), encoded.scale
    assert mean_is_right(found, exact, step)
    assert np.abs(found - exact).max() < step * (1 + 1e-9)
    if value:
        for mutant in (np.floor, np.rint, np.ceil):
            assert not mean_is_right(mutant(vector_D.astype(np.float64) / step) * step, exact, step)


def test_neighbouring_values_round_independently():
    made = codec("stochastic_quantizer", bits=2)
    rounded_D = decoded(made, np.full(DRAWS, 0.02, dtype=np.float32), None)
    assert abs(np.corrcoef(rounded_D[:-1], rounded_D[1:])[0, 1]) < 5 / np.sqrt(DRAWS)


@pytest.mark.parametrize("bits", range(2, 17))
def test_the_grid_has_its_points_and_uses_its_ends(bits):
    made = codec("stochastic_quantizer", bits=bits, max_value=1.0)
    encoded = made.encode(np.linspace(-1, 1, 4000, dtype=np.float32), stream(bits))
    assert encoded.num_bits == bits
    points = np.unique(from_ring(encoded.values_M.astype(np.uint64), bits))
    largest = 2 ** (bits - 1) - 1
    assert (points.min(), points.max()) == (-largest, largest)
    assert encoded.scale == 1 / largest


def test_values_beyond_the_range_are_cut_and_counted():
    made = codec("stochastic_quantizer", bits=8, max_value=0.5)
    encoded = made.encode(np.array([0.5, -0.5, 0.51, -7.0, 0.1], dtype=np.float32), stream())
    assert encoded.saturated == 2
    found = made.decode_sum(summed([encoded], None))
    np.testing.assert_allclose(found[:4], [0.5, -0.5, 0.5, -0.5])


@given(vector_D=vectors(5.0), seed=st.integers(0, 50))
def test_an_l2_range_scales_long_vectors_down_and_never_cuts(vector_D, seed):
    made = codec("stochastic_quantizer", bits=10, range="l2", max_value=1.0)
    encoded = made.encode(vector_D, stream(seed))
    assert encoded.saturated == 0
    found = made.decode_sum(summed([encoded], None))
    norm = np.linalg.norm(vector_D.astype(np.float64))
    wanted = vector_D * min(1.0, 1.0 / max(norm, 1e-300))
    assert np.abs(found - wanted).max() < encoded.scale * 1.0001
    assert np.linalg.norm(found) <= made.l2_bound(1.0, len(vector_D))


def test_too_many_clients_for_the_ring_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match="use fewer bits or a smaller cohort"):
        codec("stochastic_quantizer", Ring(bits=16, clients=3), bits=16)
    codec("stochastic_quantizer", Ring(bits=32, clients=65537), bits=16)
