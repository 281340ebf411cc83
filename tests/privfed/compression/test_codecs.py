"""What every codec promises: what it declares is true, sums decode to sums, bounds hold, bad values are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from loop import (
    CASES,
    LENGTH,
    NAMES,
    SHAPES,
    Loop,
    at,
    build,
    context,
    declared,
    decoded,
    linear,
    passes,
    stream,
    table,
    total_of,
)

from privfed.compression import CODECS, Ring, TwoPass
from privfed.compression.message import read, sum_of_one, to_bytes
from privfed.errors import ClientError, ConfigError

RINGS = [None, Ring(bits=32, clients=2), Ring(bits=32, clients=64)]
ALL = pytest.mark.parametrize("case", CASES)


def updates(count, seed=1, length=LENGTH, norm=1.0):
    draw = np.random.default_rng(seed)
    found = draw.standard_normal((count, length)) * draw.exponential(1.0, length)
    return list((norm * found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32))


SCORES = np.repeat([name.endswith(".scores") for name in NAMES], [int(np.prod(shape)) for shape in SHAPES])


def rings(case):
    return [ring for ring in RINGS if ring is None or declared(case, True).summable]


def test_every_codec_has_a_case():
    assert {options["name"] for options in CASES.values()} == set(CODECS.names())


# --- what is declared ---------------------------------------------------------------------------------------------


@ALL
def test_what_is_declared_is_what_is_built(case):
    made = build(case)
    assert made.properties == declared(case)
    assert made.name == table(case).name
    for name in ("summable", "unbiased", "shared_support"):
        assert getattr(made, name) is getattr(made.properties, name)
    assert isinstance(made, TwoPass) is made.properties.second_pass
    assert bool(made.public_state(made.start_state(LENGTH))) <= made.properties.server_state
    assert bool(made.start_state(LENGTH)) is made.properties.server_state
    assert made.properties.linear or made.properties.server_state or made.name in ("sign", "bernoulli_mask")


@ALL
def test_what_is_not_summable_is_refused_in_a_ring_by_both_names(case):
    if declared(case, True).summable:
        assert build(case, RINGS[1]).summable
        return
    with pytest.raises(ConfigError, match=r"compression.name = .*secagg.name = .masked.*use "):
        build(case, RINGS[1])


@ALL
def test_a_codec_that_needs_the_round_says_so(case):
    made, vector_D = build(case), updates(1)[0]
    if made.properties.needs_context:
        with pytest.raises(ConfigError, match="was not told the round's seed"):
            made.encode(vector_D, stream())
    else:
        assert np.array_equal(
            made.encode(vector_D, stream()).values_M, made.at(context()).encode(vector_D, stream()).values_M
        )


@ALL
def test_the_seed_of_the_round_matters_where_it_is_said_to(case):
    vector_D = updates(1)[0]
    one, other = (to_bytes(at(case, number=n).encode(vector_D, stream()), client_id="c", weight=1.0) for n in (1, 2))
    assert (one != other) is declared(case).needs_round_seed


@ALL
def test_the_same_stream_gives_the_same_message_on_the_same_grid(case):
    made, vector_D = at(case), updates(1)[0]
    encoded = [made.encode(vector_D, stream(n)) for n in (1, 1, 2)]
    first, again, _ = (to_bytes(each, client_id="c", weight=1.0) for each in encoded)
    assert first == again
    assert encoded[0].scale == encoded[2].scale
    assert "values" not in repr(encoded[0]) and "indices" not in repr(encoded[0])  # a value never lands in a log


# --- sums ---------------------------------------------------------------------------------------------------------


@ALL
def test_the_linear_part_of_a_sum_is_the_sum_of_the_linear_parts(case):
    for ring in rings(case):
        clients = 5 if ring is None else ring.clients
        given_D = updates(clients, norm=0.5)
        for made in passes(at(case, ring), given_D[0], ring=ring):
            encoded = [made.encode(update, stream(i)) for i, update in enumerate(given_D)]
            for one in encoded:
                assert (one.codec, one.length, len(one.values_M)) == (made.name, LENGTH, made.wire(LENGTH).values)
                if one.values_M.dtype == np.uint32:
                    assert int(one.values_M.max()) < 2**one.num_bits
            whole = made.linear_sum(total_of(made, encoded, ring))
            parts = [made.linear_sum(total_of(made, [one], ring)) for one in encoded]
            assert whole.shape == (made.sum_length(LENGTH),) and whole.dtype == np.float64
            np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-9, atol=1e-9)


DETERMINISTIC = ["identity", "random_k", "random_k, feedback", "random_k + random_k", "count_sketch", "powersgd",
                 "global_mask", "seed_projection", "seed_projection, feedback"]  # fmt: skip


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_the_sum_of_encodings_is_the_encoding_of_the_sum(case):
    """Where nothing is rounded at random; to the rounding of float32, or of a step of the ring for each client."""
    for ring in rings(case):
        given_D = updates(2, norm=0.5)
        made = at(case, ring)
        whole = made.linear_sum(total_of(made, [made.encode(u, stream()) for u in given_D], ring))
        of_sum = linear(made, (given_D[0].astype(np.float64) + given_D[1]).astype(np.float32), ring)
        np.testing.assert_allclose(whole, of_sum, atol=5e-7)
        assert np.abs(of_sum).max() > 1e-3


@ALL
def test_a_round_decodes_to_a_mean_of_the_right_kind(case):
    for ring in rings(case):
        loop = Loop(case, ring)
        for _ in range(3):
            mean_D = loop.round(updates(2, norm=0.5))
            assert mean_D.shape == (LENGTH,) and mean_D.dtype == np.float64
            assert np.isfinite(mean_D).all() and np.any(mean_D)


@ALL
def test_a_masked_round_decodes_to_what_a_plain_one_does(case):
    """To the steps of the ring and of the grid: rounding is drawn from the same streams."""
    if len(rings(case)) == 1:
        return
    plain, masked = (Loop(case, ring) for ring in RINGS[:2])
    for number in range(3):
        given_D = updates(2, seed=number, norm=0.5)
        found, wanted = masked.round(given_D), plain.round(given_D)
        # in a ring the second pass of powersgd is of other values, which meet the nested grid (steps of 0.13) elsewhere
        np.testing.assert_allclose(found, wanted, atol=0.3 if case == "powersgd + quantizer" else 1e-5)


@ALL
@pytest.mark.parametrize("zeros", [0.0, -0.0])
def test_zeros_decode_to_zeros_or_to_a_fair_coin(case, zeros):
    for ring in rings(case):
        vector_D = np.full(LENGTH, zeros, dtype=np.float32)
        for made in passes(at(case, ring), vector_D, ring=ring):
            found = linear(made, vector_D, ring)
            if made.name == "bernoulli_mask":  # a fair coin where the chance is one half, which is not here
                assert np.all(np.abs(found[SCORES]) == 0.5)
                assert len(np.unique(found[~SCORES])) == (1 if case == "bernoulli_mask" else 2)
            elif made.name == "sign" or "1 bit" in case:
                assert abs(np.sign(found).sum()) < 6 * len(found) ** 0.5
                assert len(np.unique(np.abs(found))) == 1
            else:
                assert not found.any()


# --- bounds -------------------------------------------------------------------------------------------------------

DRAWS = 3400  # vectors a case; over 10^5 in all


def hard_vectors(count, seed, length=LENGTH):
    """Return vectors that look for a bound's edge: dense, sparse, constant, heavy-tailed, low rank, on the grid."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        kind = number % 6
        if kind == 0:
            vector = draw.standard_normal(length)
        elif kind == 1:
            vector = np.zeros(length)
            vector[draw.integers(length, size=draw.integers(1, 4))] = draw.choice([-1.0, 1.0])
        elif kind == 2:
            vector = np.full(length, draw.choice([-1.0, 1.0]))
        elif kind == 3:
            vector = draw.standard_cauchy(length)
        elif kind == 4:
            vector = np.concatenate(
                [np.outer(draw.standard_normal(16), draw.standard_normal(12)).ravel(), np.zeros(length - 192)]
            )
        else:
            vector = draw.integers(-1, 2, length) * draw.exponential(1.0)
        norm = max(float(np.linalg.norm(vector)), 1e-9)
        yield (vector * (10.0 ** draw.uniform(-6, 1) / norm)).astype(np.float32)


def exceeded(case, ring, vectors, factor=1.0):
    """Return how many vectors' messages are longer than ``factor`` times the bound."""
    found = 0
    for number, vector_D in enumerate(vectors):
        if number % 40 == 0:
            made = passes(at(case, ring, number), vector_D, ring=ring)
        norm = float(np.linalg.norm(vector_D.astype(np.float64)))
        for one in made:
            bound = one.l2_bound(norm, len(vector_D))
            encoded = one.encode(vector_D, stream(number))
            found += np.linalg.norm(one.linear_sum(sum_of_one(encoded, one))) > factor * bound * (1 + 1e-12)
    return found


@ALL
def test_the_bound_is_never_exceeded(case):
    assert len(CASES) * DRAWS > 100_000
    assert exceeded(case, None, hard_vectors(DRAWS, seed=sum(map(ord, case)))) == 0


@ALL
def test_the_bound_is_never_exceeded_in_a_ring(case):
    if declared(case, True).summable:
        assert exceeded(case, RINGS[1], hard_vectors(120, seed=5)) == 0


@ALL
@settings(max_examples=25, deadline=None)
@given(vector_D=hnp.arrays(np.float32, LENGTH, elements=st.floats(-10, 10, width=32, allow_nan=False)))
def test_the_bound_is_never_exceeded_by_what_hypothesis_finds(case, vector_D):
    assert exceeded(case, None, [vector_D]) == 0


@pytest.mark.parametrize("case", ["identity", "bfloat16", "quantizer", "sign", "top_k", "random_k", "svd_truncate",
                                  "powersgd", "rotated", "global_mask"])  # fmt: skip
def test_a_smaller_bound_would_be_exceeded(case):
    """The attack above can tell: halved, each of these bounds is passed by some vector."""
    assert exceeded(case, None, hard_vectors(240, seed=9), factor=0.5) > 0


@ALL
def test_one_client_changes_the_sum_by_at_most_the_bound(case):
    """What noise is scaled to: the sum of a cohort with and without a client, given what the first pass released."""
    for ring in rings(case):
        cohort = updates(2 if ring else 6, seed=8)
        for made in passes(at(case, ring), cohort[0], ring=ring):
            encoded = [made.encode(update, stream(i)) for i, update in enumerate(cohort)]
            whole = made.linear_sum(total_of(made, encoded, ring))
            for i, update in enumerate(cohort):
                without = made.linear_sum(total_of(made, encoded[:i] + encoded[i + 1 :], ring))
                bound = made.l2_bound(float(np.linalg.norm(update.astype(np.float64))), LENGTH)
                assert np.linalg.norm(whole - without) <= bound * (1 + 1e-9)


def test_noise_has_to_come_before_what_follows_the_sum():
    """Scaled up, the values of ``random_k`` are longer than the bound of the sum: noise after that is too small."""
    made, vector_D = at("random_k"), updates(1)[0]
    bound = made.l2_bound(float(np.linalg.norm(vector_D)), LENGTH)
    assert np.linalg.norm(linear(made, vector_D)) <= bound < np.linalg.norm(decoded(made, vector_D))


def test_the_bound_of_a_quantizer_needs_its_rounding():
    """The norm alone does not bound what is decoded: a vector between grid points is rounded up."""
    made, vector_D = at("quantizer"), np.full(LENGTH, 0.001, dtype=np.float32)
    assert np.linalg.norm(decoded(made, vector_D)) > 2 * np.linalg.norm(vector_D)


def test_the_bound_before_the_round_covers_every_round():
    for case in ("global_mask", "count_sketch", "rotated", "random_k + quantizer", "seed_projection"):
        before = build(case).l2_bound(1.0, LENGTH)
        for number in range(3):
            assert at(case, number=number).l2_bound(1.0, LENGTH) <= before


# --- bias ---------------------------------------------------------------------------------------------------------

UNBIASED = [case for case in CASES if declared(case).unbiased and case not in ("identity",)]
ROUNDS = 1200


def samples(case, vector_D):
    """Return the decoded vector of many rounds, each with a seed and a stream of its own."""
    return np.array([decoded(at(case, number=n), vector_D, None, n) for n in range(ROUNDS)])


def looks_unbiased(found, vector_D):
    """Test the mean in each value (Bernstein's bound at six standard errors) and along the vector (five)."""
    errors = 6 * found.std(axis=0) / ROUNDS**0.5 + 36 * np.ptp(found) / ROUNDS / 3
    along = found @ (vector_D / np.linalg.norm(vector_D))
    off = along.mean() - np.linalg.norm(vector_D.astype(np.float64))
    each = np.abs(found.mean(axis=0) - vector_D) < errors
    return bool(each.all() and abs(off) < 5 * along.std() / ROUNDS**0.5 + 1e-6)


@pytest.mark.parametrize("case", UNBIASED)
def test_what_is_said_to_be_unbiased_is(case):
    vector_D = updates(1, seed=4, norm=3.0)[0]
    found = samples(case, vector_D)
    assert looks_unbiased(found, vector_D)
    assert not looks_unbiased(found * 0.67, vector_D)  # biased mutants: shrunk, or off in one value
    place = int(np.argmin(np.abs(vector_D)))
    assert not looks_unbiased(found + 2.0 * np.eye(LENGTH)[place], vector_D)


@pytest.mark.parametrize("case", ["random_k, feedback", "seed_projection + quantizer", "sign, mean"])
def test_what_is_not_said_to_be_unbiased_is_not(case):
    vector_D = updates(1, seed=4)[0]
    assert not declared(case).unbiased and declared(case).linear
    assert not looks_unbiased(samples(case, vector_D), vector_D)


# --- bad values ---------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, LENGTH // 2, LENGTH - 1])
def test_values_that_are_not_finite_are_refused(case, bad, place):
    vector_D = updates(1)[0]
    vector_D[place] = bad
    for ring in rings(case):
        with pytest.raises(ClientError, match="NaN or infinity"):
            at(case, ring).encode(vector_D, stream())


@ALL
def test_a_message_of_another_round_or_codec_is_refused_or_read_as_one_of_this(case):
    from privfed.errors import ProtocolError

    message = to_bytes(at(case).encode(updates(1)[0], stream()), client_id="c", weight=1.0)
    for other in CASES:
        made = at(other)
        if made.name == at(case).name and made.wire(LENGTH) == at(case).wire(LENGTH):
            assert read(message, length=LENGTH, codec=made).values.shape == (made.sum_length(LENGTH),)
        else:
            with pytest.raises(ProtocolError, match="expected"):
                read(message, length=LENGTH, codec=made)
