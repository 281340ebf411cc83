"""The whole mechanism: sums come back, with the noise that was promised and an epsilon for what was really there."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from privfed_noise_checks import fit, stream
from scipy import stats

from privfed.errors import ClientError, ConfigError, RoundError
from privfed.privacy.discrete import params as params_module
from privfed.privacy.discrete.accounting import epsilon
from privfed.privacy.discrete.mechanism import DiscreteParams, calibrate_local_variance, decode_sum, encode
from privfed.privacy.discrete.rounding import squared_norm, unwrap
from privfed.privacy.discrete.skellam import skellam_rdp

DELTA = 1e-5


def params(**changes):
    fields = {
        "length": 1000, "l2_clip_norm": 1.0, "contribution_norm": 1.0, "scale": 200.0, "ring_bits": 24,
        "local_variance": 900.0, "n": 10, "n_min": 7, "corrupt": 0.2, "dropped": 0.3, "unit": "client",
    }  # fmt: skip
    return DiscreteParams(**{**fields, **changes})


def vectors(clients, length, norm=1.0):
    drawn = np.random.default_rng(1).normal(size=(clients, length))
    return (norm * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def ring_sum(residues, bits):
    return np.sum(np.array(residues, dtype=np.uint64), axis=0) % np.uint64(2**bits)


# encode and decode


def test_without_noise_the_sum_is_the_exact_sum_of_the_integers():
    one = params(local_variance=0.0)
    integers = np.random.default_rng(2).integers(-3, 4, size=(10, 1000))
    encoded = [encode(x / 200.0, one, stream("exact", i)) for i, x in enumerate(integers)]
    assert all(part.dtype == np.uint32 and part.shape == (1000,) for part in encoded)
    decoded = decode_sum(ring_sum(encoded, 24), one, 10)
    assert np.array_equal(np.rint(decoded * 200).astype(int), integers.sum(axis=0))
    assert decoded == pytest.approx(integers.sum(axis=0) / 200)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("unit", ["client", "example"])
def test_without_noise_the_sum_is_the_sum_up_to_rounding(rotate, unit):
    one = params(
        local_variance=0.0, unit=unit, rotate=rotate, rotation_seed=b"r" * rotate, scale=2000.0, ring_bits=32,
        contribution_norm=1.0 if unit == "client" else 3.0,
    )  # fmt: skip
    inputs = vectors(10, 1000, one.contribution_norm)
    encoded = [encode(x, one, stream("rounded", i)) for i, x in enumerate(inputs)]
    assert encoded[0].size == (1024 if rotate else 1000)
    error = decode_sum(ring_sum(encoded, 32), one, 10) - inputs.sum(axis=0)
    # each rounding has a variance of at most a quarter of a step
    assert np.sqrt(np.mean(error**2)) * 2000 == pytest.approx(math.sqrt(10 / 6), rel=0.15)


@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize("rotate", [False, True])
def test_the_noise_of_the_sum_has_the_promised_variance(noise, rotate):
    """The end-to-end test; it rejects a noise off by 3% and one share too few."""
    one = params(length=60_000, scale=2000.0, noise=noise, rotate=rotate, rotation_seed=b"r" * rotate)
    inputs, survivors = vectors(8, 60_000), 8
    encoded = [encode(x, one, stream("noise", noise, i)) for i, x in enumerate(inputs)]
    error = (decode_sum(ring_sum(encoded, 24), one, survivors) - inputs.sum(axis=0)) * one.scale
    rounding = survivors / 6  # the mean variance of rounding; exact enough beside 7,200
    statistic = float(np.sum(error**2))

    def plausible(variance):
        law = stats.chi2(error.size)
        return min(law.cdf(statistic / variance), law.sf(statistic / variance)) > 1e-6

    assert plausible(survivors * 900.0 + rounding)
    for wrong in (0.97**2, 1.03**2, 7 / 8):
        assert not plausible(survivors * 900.0 * wrong + rounding)


def test_skellam_shares_sum_to_skellam_noise():
    one = params(length=200_000, local_variance=2.0, scale=1.0)
    zero = np.zeros(200_000)
    total = unwrap(ring_sum([encode(zero, one, stream("share", i)) for i in range(9)], 24), 24)
    assert fit(total, "skellam", math.sqrt(18.0)) > 1e-6
    assert fit(total, "skellam", math.sqrt(16.0)) < 1e-6


def test_what_leaves_a_client_is_within_the_bound_whatever_goes_in():
    one = params(local_variance=0.0, length=50, scale=20.0)
    for i, size in enumerate((0.01, 1.0, 100.0)):
        sent = unwrap(encode(vectors(1, 50, size)[0], one, stream("bound", i)), 24)
        assert squared_norm(sent) <= one.integer_l2_squared
        assert np.abs(sent).sum() <= one.integer_l1


def test_encoding_repeats_and_depends_on_the_stream():
    x = vectors(1, 1000)[0]
    first = encode(x, params(), stream("repeat"))
    assert np.array_equal(first, encode(x, params(), stream("repeat")))
    assert not np.array_equal(first, encode(x, params(), stream("another")))


@given(st.integers(0, 2**32 - 1), st.sampled_from([16, 20, 24, 32]), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_any_sum_inside_the_ring_comes_back(seed, bits, clients):
    one = params(local_variance=0.0, ring_bits=bits, length=20, n_min=1, corrupt=0.0)
    assert one.overflow_probability(clients) == 0.0
    integers = np.random.default_rng(seed).integers(-40, 41, size=(clients, 20))
    encoded = [encode(x / 200.0, one, stream(seed, i)) for i, x in enumerate(integers)]
    decoded = decode_sum(ring_sum(encoded, bits), one, clients)
    assert np.array_equal(np.rint(decoded * 200).astype(int), integers.sum(axis=0))


# what it is worth


def honest_epsilon(one, survivors):
    """Epsilon by hand: the noise of survivors that are not corrupt, at this clip norm."""
    variance = (survivors - round(one.corrupt * one.n)) * one.local_variance
    orders = np.arange(2, 200)
    rdp = skellam_rdp(orders, variance, one.integer_l1, one.integer_l2)
    return float(np.min(rdp + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1)))


def agrees(one, survivors):
    return epsilon([one.event(survivors)], DELTA) == pytest.approx(honest_epsilon(one, survivors), rel=1e-6)


def test_epsilon_is_that_of_the_honest_survivors():
    assert all(agrees(params(), survivors) for survivors in (7, 8, 10))


def test_a_mutant_that_forgets_the_corrupt_clients_is_caught(monkeypatch):
    monkeypatch.setattr(params_module, "corrupt_clients", lambda n, corrupt: 0)
    assert not any(agrees(params(), survivors) for survivors in (7, 8, 10))
    assert epsilon([params().event(8)], DELTA) < honest_epsilon(params(), 8)  # and it errs on the unsafe side


@given(
    st.integers(2, 30), st.floats(0, 0.45), st.floats(1, 1e5), st.sampled_from(["skellam", "discrete_gaussian"]),
    st.sampled_from([0.05, 1.0]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_more_survivors_never_cost_more_and_corrupt_ones_never_less(n, corrupt, variance, noise, q):
    lost = math.ceil(corrupt * n - 1e-9)
    one = params(n=n, n_min=lost + 1, corrupt=corrupt, dropped=0.0, local_variance=variance, noise=noise)
    spent = [epsilon([one.event(k, sampling_probability=q)], DELTA) for k in range(lost + 1, n + 1)]
    assert all(a >= b for a, b in itertools.pairwise(spent))
    trusted = replace(one, corrupt=0.0)
    assert epsilon([trusted.event(n, sampling_probability=q)], DELTA) <= spent[-1]


@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize(("unit", "q", "steps"), [("client", 1.0, 10), ("example", 0.05, 200)])
def test_calibrated_noise_meets_the_target_at_n_min(noise, unit, q, steps):
    one = params(local_variance=0.0, noise=noise, unit=unit, contribution_norm=1.0 if unit == "client" else 8.0)
    share = calibrate_local_variance(one, target_epsilon=3.0, delta=DELTA, steps=steps, sampling_probability=q)
    ready = replace(one, local_variance=share)
    event = ready.event(7, sampling_probability=q, steps=steps)
    assert 2.999 < epsilon([event], DELTA) <= 3.0
    assert event.variance == pytest.approx(share * (1 - 0.3 - 0.2) * 10)  # total / ((1 - dropped - corrupt) n) each
    assert epsilon([ready.event(10, sampling_probability=q, steps=steps)], DELTA) < 3.0


def test_example_level_charges_the_rounding_to_delta():
    plain = params(unit="example", contribution_norm=4.0, beta=1e-8)
    assert plain.event(7).rounding_delta == 1e-8 and params().event(7).rounding_delta == 0.0
    assert plain.integer_l2_squared > params(unit="example", contribution_norm=4.0, beta=1e-2).integer_l2_squared
    assert epsilon([plain.event(7, steps=2000)], DELTA) == math.inf


def test_rotation_pads_and_lets_a_smaller_ring_do():
    plain = params(contribution_norm=1.0, scale=1e4, ring_bits=17, local_variance=100.0)
    rotated = replace(plain, rotate=True, rotation_seed=b"r")
    assert (plain.encoded_length, rotated.encoded_length) == (1000, 1024)
    assert plain.overflow_probability(10) > 0.5 > 1e-9 > rotated.overflow_probability(10)


# refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupt": 0.7, "dropped": 0.2}, "n_min = 7 survivors may all be among the 7 clients declared corrupt"),
        ({"dropped": 0.5}, "n_min = 7 is more than the 5 clients left"),
        ({"corrupt": 0.6, "dropped": 0.4}, "leave honest survivors, got 0.6 and 0.4"),
        ({"noise": "discrete_gaussian", "local_variance": 0.3}, "expected at least 0.5"),
        ({"contribution_norm": 2.0}, "contribution_norm is the clip norm"),
        ({"contribution_norm": 0.5, "unit": "example"}, "at least l2_clip_norm"),
        ({"ring_bits": 33}, "ring_bits from 2 to 32, got 33"),
        ({"n_min": 11}, "n_min from 1 to n = 10, got 11"),
        ({"n_min": 0}, "n_min from 1 to n = 10, got 0"),
        ({"scale": 0.0}, "positive, finite scale"),
        ({"scale": math.nan}, "positive, finite scale"),
        ({"scale": 2e9}, "fits no ring"),
        ({"local_variance": -1.0}, "local_variance"),
        ({"unit": "none"}, "unit 'client' or 'example', got 'none'"),
        ({"rotate": True}, "rotation_seed"),
        ({"beta": 1.0}, "beta"),
        ({"length": 0}, "length of at least 1"),
    ],
)
def test_parameters_that_cannot_hold_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        params(**changes)


def test_vectors_and_sums_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"shape \(5,\), expected \(1000,\)"):
        encode(np.zeros(5), params(), stream())
    with pytest.raises(ClientError, match="not finite"):
        encode(np.full(1000, np.nan), params(), stream())
    with pytest.raises(RoundError, match="6 survivors, expected 7 to 10"):
        decode_sum(np.zeros(1000, dtype=np.uint64), params(), 6)
    with pytest.raises(RoundError, match="6 survivors, expected 7 to 10"):
        params().event(6)
    with pytest.raises(ConfigError, match="shape"):
        decode_sum(np.zeros(5, dtype=np.uint64), params(), 8)
    with pytest.raises(ConfigError, match="no honest noise is left"):
        calibrate_local_variance(params(), target_epsilon=1.0, delta=DELTA, steps=1, survivors=2)
