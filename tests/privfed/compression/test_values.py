"""Values of a few bits: the ring's arithmetic, and what the codecs add that change no positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from loop import at, decoded, linear, stream, total_of

from privfed.compression import CODECS, Ring
from privfed.compression.fixed_point import from_ring, largest_step_count, to_ring
from privfed.errors import ClientError, ConfigError

RINGS = [None, Ring(bits=32, clients=2), Ring(bits=32, clients=64)]
SIZES = st.integers(1, 40)


def codec(name, ring=None, **options):
    plugin = CODECS.get(name)
    return plugin.build(plugin.config(**options), ring)


def vectors(largest, size=SIZES):
    largest = float(np.nextafter(np.float32(largest), np.float32(0)))
    values = st.floats(-largest, largest, width=32, allow_nan=False)
    return size.flatmap(lambda n: hnp.arrays(np.float32, n, elements=values))


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
        np.testing.assert_allclose(made.decode_sum(total_of(made, encoded, ring)), sign * clients * extreme, rtol=1e-6)


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
    error = made.decode_sum(total_of(made, encoded, ring)) - np.sum(updates, axis=0, dtype=np.float64)
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
@pytest.mark.parametrize("bits", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("value", [0.0137, -0.031, 0.0499, 0.0])
def test_rounding_is_unbiased(bits, value, ring):
    made = codec("stochastic_quantizer", ring, bits=bits)
    vector_D = np.full(DRAWS, value, dtype=np.float32)
    encoded = made.encode(vector_D, stream(bits, value))
    found = made.decode_sum(total_of(made, [encoded], ring))
    exact, step = float(vector_D[0]), encoded.scale
    if bits == 1:  # two points, -step and step, instead of whole steps
        found, exact = (found + step) / 2, (exact + step) / 2
    assert mean_is_right(found, exact, step)
    assert np.abs(found - exact).max() < step * (1 + 2.0 ** (bits - 23))
    if value:
        for mutant in (np.floor, np.rint, np.ceil):
            assert not mean_is_right(np.full(DRAWS, mutant(exact / step) * step), exact, step)


@given(bits=st.integers(2, 16), share=st.floats(-1, 1), ring=st.sampled_from(RINGS), seed=st.integers(0, 9))
def test_a_value_is_rounded_to_one_of_its_two_neighbours(bits, share, ring, seed):
    made = codec("stochastic_quantizer", ring, bits=bits, max_value=0.7)
    vector_D = np.full(5, 0.7 * share, dtype=np.float32)
    encoded = made.encode(vector_D, stream(seed))
    steps = np.clip(vector_D.astype(np.float64) / encoded.scale, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    found = np.rint(linear(made, vector_D, ring, seed) / encoded.scale)
    slack = np.abs(steps) * 2.0**-22 + 2.0**-16
    assert ((found >= np.floor(steps - slack)) & (found <= np.ceil(steps + slack))).all()


def test_one_bit_takes_one_bit_and_gives_two_points():
    made = codec("stochastic_quantizer", bits=1, max_value=0.5)
    vector_D = np.linspace(-1, 1, 4001, dtype=np.float32)
    encoded = made.encode(vector_D, stream())
    assert encoded.num_bits == 1 and encoded.saturated == int((np.abs(vector_D) > 0.5).sum())
    found = decoded(made, vector_D)
    assert set(np.unique(found)) == {-0.5, 0.5}
    assert (found[vector_D >= 0.5] == 0.5).all() and (found[vector_D <= -0.5] == -0.5).all()


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
    found = made.decode_sum(total_of(made, [encoded], None))
    np.testing.assert_allclose(found[:4], [0.5, -0.5, 0.5, -0.5])


@given(vector_D=vectors(5.0), seed=st.integers(0, 50))
def test_an_l2_range_scales_long_vectors_down_and_never_cuts(vector_D, seed):
    made = codec("stochastic_quantizer", bits=10, range="l2", max_value=1.0)
    encoded = made.encode(vector_D, stream(seed))
    assert encoded.saturated == 0
    found = made.decode_sum(total_of(made, [encoded], None))
    norm = np.linalg.norm(vector_D.astype(np.float64))
    wanted = vector_D * min(1.0, 1.0 / max(norm, 1e-300))
    assert np.abs(found - wanted).max() < encoded.scale * 1.0001
    assert np.linalg.norm(found) <= made.l2_bound(1.0, len(vector_D))


def test_too_many_clients_for_the_ring_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match="use fewer bits or a smaller cohort"):
        codec("stochastic_quantizer", Ring(bits=16, clients=3), bits=16)
    codec("stochastic_quantizer", Ring(bits=32, clients=65537), bits=16)


# --- cast ---------------------------------------------------------------------------------------------------------


@given(vector_D=vectors(3e38))
def test_bfloat16_is_the_nearest_value_of_8_bits(vector_D):
    wanted = torch.from_numpy(vector_D.copy()).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(decoded(codec("cast"), vector_D).astype(np.float32), wanted)


@given(vector_D=vectors(65000.0))
def test_float16_is_numpys(vector_D):
    made = codec("cast", dtype="float16")
    assert np.array_equal(decoded(made, vector_D), vector_D.astype(np.float16).astype(np.float64))


def test_a_value_beyond_the_smaller_type_is_refused():
    with pytest.raises(ClientError, match=r'beyond 65504, the largest of compression\.dtype = "float16"'):
        codec("cast", dtype="float16").encode(np.array([0.0, -7e4], dtype=np.float32), stream())
    with pytest.raises(ClientError, match=r"beyond 3\.38953e"):
        codec("cast").encode(np.array([np.finfo(np.float32).max], dtype=np.float32), stream())


# --- sign ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [None, Ring(bits=32, clients=5)], ids=str)
def test_the_majority_decides_and_the_mean_counts(ring):
    draw = np.random.default_rng(2)
    updates = [draw.standard_normal(200).astype(np.float32) for _ in range(5)]
    votes_D = np.sum(np.sign(updates), axis=0)
    for vote, wanted in {"majority": np.sign(votes_D) * 0.5 * 5, "mean": votes_D * 0.5}.items():
        made = codec("sign", ring, vote=vote, magnitude=0.5)
        encoded = [made.encode(update, stream(i)) for i, update in enumerate(updates)]
        assert np.array_equal(made.decode_sum(total_of(made, encoded, ring)), wanted)
        assert encoded[0].num_bits == (1 if ring is None else 32)


def test_a_tie_moves_nothing_and_zeros_are_fair():
    made = codec("sign", magnitude=0.5)
    up = np.full(64, 0.1, dtype=np.float32)
    tie = total_of(made, [made.encode(up, stream(1)), made.encode(-up, stream(2))], None)
    assert not made.decode_sum(tie).any()
    votes = decoded(codec("sign", magnitude=1.0, vote="mean"), np.zeros(DRAWS, dtype=np.float32))
    assert abs(votes.mean()) < 5 / DRAWS**0.5


# --- rotation -----------------------------------------------------------------------------------------------------


def test_a_rotation_makes_a_coarse_grid_finer_for_a_spiky_vector():
    vector_D = np.zeros(1000, dtype=np.float32)
    vector_D[::100] = 0.3
    plain = at({"name": "stochastic_quantizer", "bits": 3, "max_value": 0.3}, length=1000)
    turned = at({"name": "rotated_quantizer", "bits": 3, "max_norm": 1.0}, length=1000)
    dense_D = vector_D + np.random.default_rng(1).normal(0, 0.02, 1000).astype(np.float32)
    errors = [np.linalg.norm(decoded(made, dense_D) - dense_D) for made in (plain, turned)]
    assert errors[1] < errors[0] / 1.2


def test_a_vector_beyond_the_declared_norm_is_scaled_down_and_rare_values_are_cut():
    made = at({"name": "rotated_quantizer", "bits": 12, "max_norm": 0.5, "spread": 2.0}, length=1000)
    vector_D = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    encoded = made.encode(vector_D, stream())
    assert 10 < encoded.saturated < 2 * np.exp(-2) * 1024  # sub-Gaussian: a share of at most 2 exp(-2) is expected
    found = decoded(made, vector_D)
    assert 0.45 < np.linalg.norm(found) < 0.51
    cosine = found @ vector_D / np.linalg.norm(found) / np.linalg.norm(vector_D)
    assert cosine > 0.98


def test_the_rotation_is_undone():
    made = at({"name": "rotated_quantizer", "bits": 16, "max_norm": 1.0}, length=1000)
    vector_D = (np.random.default_rng(1).standard_normal(1000) / 50).astype(np.float32)
    np.testing.assert_allclose(decoded(made, vector_D), vector_D, atol=3e-5)
