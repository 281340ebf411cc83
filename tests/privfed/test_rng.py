"""Random streams: separated by name, uniform, repeatable under one key, secret in print."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from privfed.rng import (
    KEY_BYTES,
    PrivateStream,
    experiment_rng,
    experiment_seed,
    reproducible_key,
    secret_key,
)

KEY = bytes(range(KEY_BYTES))
COUNT = 100_000


def test_equal_names_give_equal_bytes_however_they_are_read():
    whole = PrivateStream(KEY, "a", 1).bytes(1000)
    stream = PrivateStream(KEY, "a", 1)
    assert b"".join(stream.bytes(n) for n in (0, 1, 15, 16, 17, 951)) == whole
    assert stream.bytes(16) != whole[:16]  # a stream moves on


def test_raw_bytes_are_the_same_bytes():
    count = 300_001  # more than two blocks of the cipher
    whole = PrivateStream(KEY, "raw").bytes(count + 5)
    stream = PrivateStream(KEY, "raw")
    parts = [stream.raw(0), stream.raw(3), stream.raw(count - 3)]
    assert b"".join(part.tobytes() for part in parts) + stream.bytes(5) == whole
    assert all(part.flags.writeable for part in parts)


def test_streams_differ_by_key_and_by_every_name():
    streams = [
        PrivateStream(KEY, "a", 1), PrivateStream(KEY, "a", 2), PrivateStream(KEY, "b", 1), PrivateStream(KEY, "a"),
        PrivateStream(KEY, 1, "a"), PrivateStream(KEY), PrivateStream(bytes(KEY_BYTES), "a", 1),
        PrivateStream(KEY, "a", 1, ""), PrivateStream(KEY, "a1"), PrivateStream(KEY, "a", "", 1),
    ]  # fmt: skip
    found = [stream.bytes(4096) for stream in streams]
    for first, second in itertools.combinations(found, 2):
        a, b = (np.unpackbits(np.frombuffer(x, dtype=np.uint8)) for x in (first, second))
        assert abs(int((a == b).sum()) - len(a) / 2) < 6 * np.sqrt(len(a)) / 2


def test_uniform_values_are_uniform_inside_the_open_interval():
    values = PrivateStream(KEY, "uniform").uniform(COUNT)
    assert values.dtype == np.float64 and values.min() > 0 and values.max() < 1
    counts, _ = np.histogram(values, bins=100, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-6
    pairs, *_ = np.histogram2d(values[:-1:2], values[1::2], bins=10, range=[(0, 1), (0, 1)])
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-6
    counts, _ = np.histogram(values**1.05, bins=100, range=(0, 1))  # the test can tell
    assert stats.chisquare(counts).pvalue < 1e-6


def test_uniform_never_touches_the_ends():
    class Ends(PrivateStream):
        def bytes(self, count):
            return b"\0" * (count // 2) + b"\xff" * (count // 2)

    low, high = Ends(KEY).uniform(2)
    assert 0 < low < 1e-15 and 1 - 1e-15 < high < 1


@pytest.mark.parametrize("probability", [0.0, 0.03, 0.5, 1.0])
def test_bernoulli(probability):
    hits = int(PrivateStream(KEY, "coins", probability).bernoulli(probability, COUNT).sum())
    if probability in (0.0, 1.0):
        assert hits == probability * COUNT
        return
    assert stats.binomtest(hits, COUNT, probability).pvalue > 1e-6
    assert stats.binomtest(hits, COUNT, probability * 1.1).pvalue < 1e-6


def test_a_generator_of_the_stream_permutes_and_repeats():
    first, again, other = (PrivateStream(KEY, n).generator().permutation(50) for n in ("p", "p", "q"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_secrets_do_not_show():
    stream = PrivateStream(KEY, "name of a client")
    for text in (repr(stream), str(stream), f"{stream!r}"):
        assert text == "PrivateStream(<secret>)"
    assert not any(isinstance(value, bytes) for value in vars(stream).values())


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_keys_of_another_length_are_refused(length):
    with pytest.raises(ValueError, match=f"Expected a key of 32 bytes, got {length}"):
        PrivateStream(bytes(length), "a")


def test_keys():
    assert len(secret_key()) == KEY_BYTES and secret_key() != secret_key()
    assert reproducible_key(7) == reproducible_key(7) != reproducible_key(8)
    assert len(reproducible_key(7)) == KEY_BYTES


def test_experiment_streams_repeat_and_are_separated_by_name():
    assert experiment_seed(1, "a", 2) == experiment_seed(1, "a", 2)
    seeds = [
        experiment_seed(*args)
        for args in [(1, "a", 2), (2, "a", 2), (1, "a", 3), (1, "b", 2), (1, "a"), (1,), (12,), (1, 2)]
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert np.array_equal(experiment_rng(3, "x").random(5), experiment_rng(3, "x").random(5))
    assert not np.array_equal(experiment_rng(3, "x").random(5), experiment_rng(3, "y").random(5))


def test_the_two_kinds_never_meet():
    """An experiment's seed that anyone may know gives no byte of a private stream under a secret key."""
    private = PrivateStream(secret_key(), "init").bytes(32)
    assert private != experiment_rng(7, "init").bytes(32)
    assert reproducible_key(7)[:8] != experiment_seed(7).to_bytes(8, "little")
