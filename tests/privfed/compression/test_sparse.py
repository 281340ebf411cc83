"""Codecs that choose values: random positions, the largest ones, a server's mask, a sketch, seeded directions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import LENGTH, Loop, at, build, context, decoded, linear, stream, total_of

from privfed.compression import Ring
from privfed.compression.global_mask import MASK
from privfed.compression.message import to_bytes
from privfed.compression.nested import kept
from privfed.errors import ConfigError, ProtocolError


def vectors(count, seed=1, length=LENGTH):
    return list(np.random.default_rng(seed).standard_normal((count, length)).astype(np.float32) / 20)


def size(codec, vector_D):
    return len(to_bytes(codec.encode(vector_D, stream()), client_id="c", weight=1.0))


# --- random_k -----------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 500), density=st.floats(0.001, 1), number=st.integers(0, 50))
@settings(deadline=None)
def test_random_positions_are_ascending_distinct_and_shared(length, density, number):
    options = {"name": "random_k", "density": density}
    positions_K, runs_K = at(options, number=number, length=length)._positions(length)
    assert len(positions_K) == kept(density, length) and (np.diff(positions_K) > 0).all()
    assert positions_K[0] >= 0 and positions_K[-1] < length and runs_K.sum() == length
    again_K, _ = at(options, Ring(bits=32, clients=2), number, length=length)._positions(length)
    assert np.array_equal(positions_K, again_K)


def test_every_position_is_drawn_as_often_as_its_run_is_short():
    length, rounds = 37, 4000
    counts_D = np.zeros(length)
    for number in range(rounds):
        positions_K, runs_K = at({"name": "random_k", "density": 0.2}, number=number, length=length)._positions(length)
        counts_D[positions_K] += 1
    share_D = 1 / np.repeat(runs_K, runs_K)
    error_D = np.sqrt(share_D * (1 - share_D) / rounds)
    assert (np.abs(counts_D / rounds - share_D) < 5 * error_D).all()
    assert len(set(runs_K)) == 2  # 7 runs of 5 and 6


def test_random_k_has_the_variance_that_it_says():
    """That of K positions drawn without replacement: (D / K - 1) times the squared norm."""
    vector_D = vectors(1, length=400)[0]
    errors = [
        np.sum((decoded(at({"name": "random_k", "density": 0.1}, number=n, length=400), vector_D) - vector_D) ** 2)
        for n in range(2000)
    ]
    assert np.mean(errors) == pytest.approx(9 * np.sum(vector_D.astype(np.float64) ** 2), rel=0.05)


def test_random_k_sends_no_positions():
    assert size(at({"name": "random_k", "density": 0.01}, length=100_000), vectors(1, length=100_000)[0]) < 4100


def test_feedback_around_scaled_values_is_refused():
    for name in ("random_k", "seed_projection"):
        with pytest.raises(ConfigError, match=r"error_feedback = true with compression\.unbiased = true.*set "):
            build({"name": name, "error_feedback": True, "unbiased": True})


# --- top_k --------------------------------------------------------------------------------------------------------


def test_top_k_is_the_best_of_its_size():
    vector_D = vectors(1)[0]
    found = decoded(at("top_k"), vector_D)
    count = kept(0.05, LENGTH)
    threshold = np.sort(np.abs(vector_D))[-count]
    assert np.array_equal(found, np.where(np.abs(vector_D) >= threshold, vector_D, 0).astype(np.float64))


def test_top_k_adds_up_messages_of_other_positions():
    updates = vectors(4)
    made = at("top_k")
    encoded = [made.encode(update, stream()) for update in updates]
    assert len({tuple(one.indices_M) for one in encoded}) == 4
    found = made.decode_sum(total_of(made, encoded, None))
    np.testing.assert_allclose(found, sum(decoded(made, update) for update in updates))


def test_top_k_sends_few_bytes():
    vector_D = vectors(1, length=100_000)[0]
    spent = size(at({"name": "top_k", "density": 0.01}, length=100_000), vector_D)
    assert 4000 < spent < 4000 + 1000 * 10 / 8  # 32 bits a value, less than 10 a position
    four = {"name": "stochastic_quantizer", "bits": 4, "max_value": 4.0}
    assert size(at({"name": "top_k", "density": 0.01, "inner": four}, length=100_000), vector_D) < 1800


# --- the server's mask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [None, Ring(bits=32, clients=3)], ids=str)
def test_the_mask_is_of_the_largest_means_and_lasts_until_the_refresh(ring):
    loop, sizes = Loop("global_mask", ring), []
    found = []
    for number in range(7):
        before = loop.bytes_up
        found.append(loop.round(vectors(3, seed=number)))
        sizes.append(loop.bytes_up - before)
    dense = [np.count_nonzero(each) for each in found]
    few = kept(0.1, LENGTH)
    assert dense == [LENGTH, few, few, LENGTH, few, few, LENGTH]
    assert sizes[0] > 5 * sizes[1] and sizes[0] == sizes[3]
    for full in (0, 3):
        largest = set(np.argsort(np.abs(found[full]))[-few:])
        assert set(np.flatnonzero(found[full + 1])) == set(np.flatnonzero(found[full + 2])) == largest
    mean_D = np.mean(vectors(3, seed=1), axis=0)
    support = np.flatnonzero(found[1])
    np.testing.assert_allclose(found[1][support], mean_D[support], atol=1e-6)


def test_the_mask_travels_as_one_bit_a_value_and_another_vectors_is_refused():
    made = at("global_mask")
    _, state = made.expand(vectors(1)[0].astype(np.float64), made.start_state(LENGTH), LENGTH)
    public = made.public_state(state)
    assert set(public) == {MASK} and public[MASK].nbytes == -(-LENGTH // 8)
    with pytest.raises(ProtocolError, match=r"The mask has 48 bytes, expected 2 for 10 values"):
        build("global_mask").at(context(1, public)).encode(np.zeros(10, dtype=np.float32), stream())
    with pytest.raises(ProtocolError, match="The mask has"):
        made.at(context(1, {MASK: public[MASK].astype(np.float32)})).encode(vectors(1)[0], stream())


# --- count sketch -------------------------------------------------------------------------------------------------

SKETCH = {"name": "count_sketch", "rows": 5, "columns": 400, "density": 0.02}


def test_heavy_hitters_are_found_in_a_sum():
    draw, length = np.random.default_rng(4), 50_000
    places = draw.choice(length, 20, replace=False)
    heavy_D = np.zeros(length)
    heavy_D[places] = draw.choice([-1.0, 1.0], 20) * draw.uniform(1, 2, 20)
    updates = [(heavy_D + draw.normal(0, 0.01, length)).astype(np.float32) for _ in range(3)]
    for ring in (None, Ring(bits=32, clients=3)):
        loop = Loop({**SKETCH, "rows": 7, "columns": 2000, "density": 20 / length}, ring, length=length)
        found = loop.round(updates)
        assert set(np.flatnonzero(found)) == set(places)
        assert np.abs(found - heavy_D)[places].max() < 0.3
    assert loop.bytes_up / 3 < 0.3 * 4 * length


def test_momentum_and_error_are_those_of_a_server_that_sees_everything():
    """With more buckets than values nothing collides: FetchSGD is then momentum SGD with top-k and error feedback."""
    length, count, rho = 12, 3, 0.7
    loop = Loop({"name": "count_sketch", "rows": 5, "columns": 4000, "density": 0.25, "momentum": rho}, length=length)
    momentum_D = error_D = np.zeros(length)
    for number in range(8):
        updates = vectors(4, seed=number, length=length)
        momentum_D = rho * momentum_D + np.mean(updates, axis=0)
        error_D = error_D + momentum_D
        wanted = np.zeros(length)
        top = np.argsort(np.abs(error_D))[-count:]
        wanted[top] = error_D[top]
        error_D = error_D - wanted
        np.testing.assert_allclose(loop.round(updates), wanted, atol=1e-6)


def test_nothing_is_lost_in_the_servers_sketch():
    """The sketch of what was applied and what remains is that of all that came, without momentum."""
    loop = Loop(SKETCH)
    came = np.zeros(LENGTH)
    applied = np.zeros(LENGTH)
    for number in range(5):
        updates = vectors(3, seed=number)
        came += np.mean(updates, axis=0, dtype=np.float64)
        applied += loop.round(updates)
    made = at(SKETCH)
    np.testing.assert_allclose(made.sketch(came), made.sketch(applied) + loop.state["error"], atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_what_is_found_never_makes_the_sketch_larger_however_many_share_a_bucket(rows):
    """Dense updates and few buckets: taken off whole, the estimates would make the rest grow without end."""
    case = {"name": "count_sketch", "rows": rows, "columns": LENGTH // (4 * rows), "density": 0.1}
    loop, made, whole = Loop(case), at(case), np.zeros(rows * (LENGTH // (4 * rows)))
    for number in range(40):
        updates = vectors(3, seed=number)
        before = made.sketch(np.mean(updates, axis=0, dtype=np.float64))
        error = before if number == 0 else before + loop.state["error"]
        loop.round(updates)
        assert np.linalg.norm(loop.state["error"]) <= np.linalg.norm(error) * (1 + 1e-9)
        whole = whole + before
        estimate_D = made.estimate(whole, LENGTH)
        found = np.argsort(-np.abs(estimate_D))[: round(0.1 * LENGTH)]
        whole = whole - made.sketch(np.where(np.isin(np.arange(LENGTH), found), estimate_D, 0.0))
    assert np.linalg.norm(loop.state["error"]) < 40 * np.linalg.norm(before)
    assert np.linalg.norm(whole) > 1e3 * np.linalg.norm(loop.state["error"])


def test_hashes_are_those_of_the_run_and_loads_are_the_largest():
    one, other = at(SKETCH, number=1), at(SKETCH, number=2)
    assert np.array_equal(linear(one, vectors(1)[0]), linear(other, vectors(1)[0]))
    buckets, signs, loads = one._hashes(LENGTH)
    assert loads == tuple(np.bincount(bucket).max() for bucket in buckets)
    assert {*np.unique(signs)} == {-1, 1} and all(b.min() >= 0 and b.max() < 400 for b in buckets)


def test_the_bound_of_a_sketch_is_reached_by_values_of_one_bucket():
    """One row: equal values, all of the fullest bucket and of the right signs, give exactly the bound."""
    made = at({"name": "count_sketch", "rows": 1, "columns": 40})
    (bucket_D,), (sign_D,), _ = made._hashes(LENGTH)
    fullest = np.argmax(np.bincount(bucket_D))
    worst_D = np.where(bucket_D == fullest, sign_D, 0).astype(np.float32)
    bound = made.l2_bound(float(np.linalg.norm(worst_D)), LENGTH)
    assert np.linalg.norm(linear(made, worst_D)) == pytest.approx(bound, rel=1e-6)


def test_a_sketch_is_scaled_down_to_its_norm():
    made = at({**SKETCH, "max_norm": 0.5})
    found = linear(made, vectors(1)[0])
    assert np.linalg.norm(found) == pytest.approx(0.5, rel=1e-6) and made.l2_bound(100.0, LENGTH) < 0.5001
    free = linear(at(SKETCH), vectors(1)[0])
    np.testing.assert_allclose(found / 0.5, free / np.linalg.norm(free), atol=1e-6)


def test_a_sum_alone_is_not_decoded_without_the_servers_state():
    made = at(SKETCH)
    with pytest.raises(ConfigError, match="keeps a state on the server: use linear_sum and expand"):
        made.decode_sum(total_of(made, [made.encode(vectors(1)[0], stream())], None))


# --- directions ---------------------------------------------------------------------------------------------------


def test_scalars_are_a_projection():
    made = at({"name": "seed_projection", "directions": 64})
    vector_D = vectors(1)[0]
    scalars_K = linear(made, vector_D)
    found = decoded(made, vector_D)
    assert len(scalars_K) == 64 and size(made, vector_D) < 64 * 4 + 100
    assert np.linalg.norm(found) <= np.linalg.norm(scalars_K) <= np.linalg.norm(vector_D)
    assert found @ vector_D == pytest.approx(np.sum(scalars_K**2), rel=1e-5)


def test_all_directions_give_the_update_back():
    for unbiased in (True, False):
        made = at({"name": "seed_projection", "directions": 512, "unbiased": unbiased})
        np.testing.assert_allclose(decoded(made, vectors(1)[0]), vectors(1)[0], atol=1e-7)


def test_other_rounds_take_other_directions_and_every_row_is_as_likely():
    counts = np.zeros(64)
    for number in range(2000):
        counts[at({"name": "seed_projection", "directions": 16}, number=number, length=50)._rows(50)] += 1
    assert (np.abs(counts / 2000 - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5).all()
