"""Codecs of low rank: what they keep of matrices, that the two passes add up, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from loop import LENGTH, Loop, at, build, context, decoded, linear, stream, total_of

from privfed.compression import Ring
from privfed.compression.matrices import blocks_of
from privfed.errors import ConfigError, ProtocolError

RINGS = pytest.mark.parametrize("ring", [None, Ring(bits=32, clients=3)], ids=str)


def vectors(count, seed=1, length=LENGTH):
    return list(np.random.default_rng(seed).standard_normal((count, length)).astype(np.float32) / 20)


def low_rank(count, seed=1):
    """Return vectors whose matrices have rank 1, all with the same left and right factors up to a number."""
    draw = np.random.default_rng(seed)
    pairs = [(draw.standard_normal(16), draw.standard_normal(12)), (draw.standard_normal(8), draw.standard_normal(20))]
    found = []
    for _ in range(count):
        a, b = (np.outer(u, v).ravel() * draw.uniform(0.1, 0.3) for u, v in pairs)
        found.append(np.concatenate([a, draw.standard_normal(30), b, draw.standard_normal(1)]).astype(np.float32) / 10)
    return found


# --- cutting up ---------------------------------------------------------------------------------------------------


def test_matrices_are_factored_where_that_is_smaller():
    blocks = blocks_of(context(), LENGTH, 2)
    assert [(m.start, m.rows, m.columns, m.rank) for m in blocks.matrices] == [(0, 16, 12, 2), (222, 8, 20, 2)]
    assert blocks.rest == ((192, 222), (382, 383))
    assert (blocks.left, blocks.right, blocks.plain) == (48, 64, 31)
    assert blocks_of(context(), LENGTH, 100).matrices == ()  # full rank is larger than the matrix
    vector_D = np.arange(LENGTH, dtype=np.float64)
    again_D = blocks.assembled([m.of(vector_D) for m in blocks.matrices], blocks.take_rest(vector_D))
    assert np.array_equal(again_D, vector_D)


@pytest.mark.parametrize("name", ["powersgd", "svd_truncate"])
def test_shapes_that_do_not_fit_are_refused(name):
    made = build(name).at(context(shapes=((3, 4),)))
    with pytest.raises(ConfigError, match=r"hold 12 values and the vector 383: give the codec the shapes"):
        made.encode(vectors(1)[0], stream())


@pytest.mark.parametrize("name", ["powersgd", "svd_truncate"])
@pytest.mark.parametrize("shapes", [((5,), ()), ((0, 3), (6,)), ((1, 6),), ((6, 1),), ((2, 3),)])
def test_vectors_without_a_large_matrix_are_sent_as_they_are(name, shapes):
    vector_D = np.linspace(-1, 1, 6, dtype=np.float32)
    made = build({"name": name, "rank": 4}).at(context(shapes=shapes))
    if name == "powersgd":
        assert made.wire(6).values == 0
        made = made.second(made.between(linear(made, vector_D), 6), 6)
    np.testing.assert_allclose(decoded(made, vector_D), vector_D)


# --- singular values ----------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_dropped_singular_values():
    vector_D = vectors(1)[0]
    found = decoded(at("svd_truncate"), vector_D)
    for start, rows, columns in ((0, 16, 12), (222, 8, 20)):
        part = slice(start, start + rows * columns)
        values = np.linalg.svd(vector_D[part].reshape(rows, columns), compute_uv=False)
        error = np.linalg.norm(found[part] - vector_D[part])
        assert error == pytest.approx(np.linalg.norm(values[2:]), rel=1e-4)
        assert np.linalg.matrix_rank(found[part].reshape(rows, columns), tol=1e-5) == 2
    assert np.array_equal(found[192:222], vector_D[192:222])


def test_messages_are_multiplied_out_one_by_one():
    updates, made = vectors(3), at("svd_truncate")
    encoded = [made.encode(update, stream()) for update in updates]
    found = made.decode_sum(total_of(made, encoded, None))
    np.testing.assert_allclose(found, sum(decoded(made, update) for update in updates), atol=1e-12)
    assert made.wire(LENGTH).values == 48 + 64 + 31
    added = sum(one.values_M for one in encoded)  # what masking would give: not the sum
    from dataclasses import replace

    assert np.linalg.norm(made.decode_one(replace(encoded[0], values_M=added)) - found) > 0.5 * np.linalg.norm(found)


# --- two passes ---------------------------------------------------------------------------------------------------


@RINGS
def test_the_two_passes_project_the_sum(ring):
    updates = vectors(3)
    total_D = np.sum(updates, axis=0, dtype=np.float64)
    first = at("powersgd", ring)
    encoded = [first.encode(update, stream(i)) for i, update in enumerate(updates)]
    told_M = first.linear_sum(total_of(first, encoded, ring))
    message = first.between(told_M, LENGTH)
    second = first.second(message, LENGTH, told_M)
    found = second.decode_sum(total_of(second, [second.encode(u, stream(i)) for i, u in enumerate(updates)], ring))
    lefts = blocks_of(context(), LENGTH, 2).lefts(message.astype(np.float64))
    for left, start, rows, columns in zip(lefts, (0, 222), (16, 8), (12, 20), strict=True):
        part = slice(start, start + rows * columns)
        np.testing.assert_allclose(left.T @ left, np.eye(2), atol=1e-6)
        wanted = left @ left.T @ total_D[part].reshape(rows, columns)
        np.testing.assert_allclose(found[part], wanted.ravel(), atol=1e-5)
    np.testing.assert_allclose(found[192:222], total_D[192:222], atol=1e-6)


def along(number=0):
    """Return the first pass's right factor of each matrix, read off what it makes of a matrix."""
    made, rights = at("powersgd", number=number), []
    for start, columns in ((0, 12), (222, 20)):
        vectors_D = np.zeros((columns, LENGTH), dtype=np.float32)
        vectors_D[np.arange(columns), start + np.arange(columns)] = 1.0  # one entry of the first row each
        lefts = [blocks_of(context(), LENGTH, 2).lefts(linear(made, each)) for each in vectors_D]
        rights.append(np.array([left[0 if start == 0 else 1][0] for left in lefts]))
    return rights


def test_under_masking_the_second_pass_says_nothing_that_the_first_one_did():
    """Two clients that differ in what the first pass sends alone send the same second message; without a mask not."""
    vector_D, other_D = vectors(1)[0].copy(), vectors(1)[0].copy()
    draw = np.random.default_rng(8)
    for (start, rows, columns), right in zip(((0, 16, 12), (222, 8, 20)), along(), strict=True):
        np.testing.assert_allclose(right.T @ right, np.eye(2), atol=1e-6)
        change = draw.standard_normal((rows, 2)) @ right.T
        other_D[start : start + rows * columns] += change.ravel().astype(np.float32)
    for ring, same in ((Ring(bits=32, clients=4), True), (None, False)):
        first = at("powersgd", ring)
        told_M = linear(first, vector_D, ring)
        assert np.abs(told_M - linear(first, other_D, ring)).max() > 0.1
        second = first.second(first.between(told_M, LENGTH), LENGTH)
        found = [linear(second, each, ring) for each in (vector_D, other_D)]
        assert bool(np.abs(found[0] - found[1]).max() < 2e-6) is same


def test_whoever_is_missing_from_the_second_sum_is_hidden_in_the_first():
    """What the two masked sums have in common, along Q, is nothing: in the unmasked ones it is the missing client's."""
    updates = vectors(4)
    for ring in (Ring(bits=32, clients=4), None):
        first = at("powersgd", ring)
        told_M = first.linear_sum(total_of(first, [first.encode(u, stream()) for u in updates], ring))
        second = first.second(first.between(told_M, LENGTH), LENGTH, told_M)
        left_M = second.linear_sum(total_of(second, [second.encode(u, stream()) for u in updates[:3]], ring))
        blocks = blocks_of(context(), LENGTH, 2)
        told, rights = blocks.lefts(told_M), blocks.rights(left_M)
        lefts = blocks.lefts(first.between(told_M, LENGTH).astype(np.float64))
        for n, (start, rows, columns) in enumerate(((0, 16, 12), (222, 8, 20))):
            missing = updates[3][start : start + rows * columns].reshape(rows, columns).astype(np.float64)
            alone = lefts[n].T @ missing @ along()[n]  # r x r values of one client
            seen = lefts[n].T @ told[n] - (along()[n].T @ rights[n]).T
            assert np.allclose(seen, alone, atol=1e-5) is (ring is None)
            if ring is not None:
                assert np.abs(along()[n].T @ rights[n]).max() < 1e-5


def test_a_round_of_which_some_dropped_between_the_passes_is_made_of_what_each_pass_got():
    updates, ring = vectors(4), Ring(bits=32, clients=4)
    first = at("powersgd", ring)
    mean_M = first.linear_sum(total_of(first, [first.encode(u, stream()) for u in updates], ring)) / 4
    second = first.second(first.between(mean_M, LENGTH), LENGTH, mean_M)
    left_M = second.linear_sum(total_of(second, [second.encode(u, stream()) for u in updates[:3]], ring)) / 3
    found, _ = second.expand(left_M, {}, LENGTH)
    lefts = blocks_of(context(), LENGTH, 2).lefts(first.between(mean_M, LENGTH).astype(np.float64))
    everyone, rest = np.mean(updates, axis=0, dtype=np.float64), np.mean(updates[:3], axis=0, dtype=np.float64)
    for n, (start, rows, columns) in enumerate(((0, 16, 12), (222, 8, 20))):
        part, inside = slice(start, start + rows * columns), along()[n] @ along()[n].T
        of_all, of_rest = (whole[part].reshape(rows, columns) for whole in (everyone, rest))
        wanted = lefts[n] @ lefts[n].T @ (of_all @ inside + of_rest @ (np.eye(columns) - inside))
        np.testing.assert_allclose(found[part], wanted.ravel(), atol=1e-5)
    np.testing.assert_allclose(found[192:222], rest[192:222], atol=1e-6)
    with pytest.raises(ConfigError, match="not told what the first summed to"):
        first.second(first.between(mean_M, LENGTH), LENGTH).expand(left_M, {}, LENGTH)


@RINGS
def test_a_sum_of_low_rank_comes_through_whole(ring):
    updates = low_rank(3)
    found = Loop({"name": "powersgd", "rank": 1, "error_feedback": False}, ring).round(updates)
    np.testing.assert_allclose(found, np.mean(updates, axis=0), atol=1e-5)


def test_a_warm_start_finds_the_largest_singular_values_and_a_cold_one_does_not():
    update, errors = vectors(1)[0], {}
    best = at("svd_truncate")
    wanted = np.linalg.norm(decoded(best, update) - update)
    for warm in (True, False):
        loop = Loop({"name": "powersgd", "rank": 2, "warm_start": warm, "error_feedback": False})
        errors[warm] = [np.linalg.norm(loop.round([update]) - update) for _ in range(25)]
    assert errors[True][-1] < wanted * 1.01 < errors[True][0]
    assert min(errors[False]) > wanted * 1.01


def test_right_factors_of_another_layout_start_anew():
    vector_D = vectors(1)[0]
    cold = linear(at("powersgd"), vector_D)
    assert np.array_equal(linear(at("powersgd", carried={"right": np.ones(5, dtype=np.float32)}), vector_D), cold)
    with pytest.raises(ProtocolError, match="right factors hold NaN"):
        at("powersgd", carried={"right": np.full(64, np.nan, dtype=np.float32)}).encode(vector_D, stream())


def test_left_factors_that_would_break_the_bound_are_refused():
    first = at("powersgd")
    good = first.between(linear(first, vectors(1)[0]), LENGTH)
    first.second(good, LENGTH)
    for bad, sentence in (
        (good * 2, "not orthonormal"),
        (good[:-1], "expected"),
        (np.where(np.arange(good.size) == 3, np.nan, good).astype(np.float32), "all finite"),
    ):
        with pytest.raises(ProtocolError, match=sentence):
            first.second(bad, LENGTH)


def test_right_factors_that_are_not_orthonormal_do_not_break_the_bound():
    vector_D = vectors(1)[0]
    made = at("powersgd", carried={"right": np.full(64, 1e6, dtype=np.float32)})
    assert np.linalg.norm(linear(made, vector_D)) <= made.l2_bound(float(np.linalg.norm(vector_D)), LENGTH)


def test_the_first_pass_alone_is_no_update():
    made = at("powersgd")
    for attempt in (
        lambda: made.expand(np.zeros(48), {}, LENGTH),
        lambda: made.decode_sum(total_of(made, [made.encode(vectors(1)[0], stream())], None)),
    ):
        with pytest.raises(ConfigError, match="takes two passes"):
            attempt()


def test_rank_deficient_sums_keep_orthonormal_factors():
    loop = Loop({"name": "powersgd", "rank": 3})
    for _ in range(3):
        assert not loop.round([np.zeros(LENGTH, dtype=np.float32)] * 2).any()
    found = loop.round(low_rank(2))
    np.testing.assert_allclose(found[:192], np.mean(low_rank(2), axis=0)[:192], atol=1e-5)
