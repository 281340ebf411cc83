"""The plain message: exact both ways for every width, its length is what is counted, damage is refused."""

from __future__ import annotations

import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop import CASES, LENGTH, at, stream

from privfed.compression import CODECS
from privfed.compression.message import pack_bits, read, to_bytes, unpack_bits
from privfed.compression.positions import pack_positions, positions_size, unpack_positions
from privfed.errors import ProtocolError
from privfed.rng import PrivateStream


def codec_of(name="stochastic_quantizer", **options):
    plugin = CODECS.get(name)
    return plugin.build(plugin.config(**options), None)


def encoded(length=101, **options):
    vector_D = np.random.default_rng(3).uniform(-0.05, 0.05, length).astype(np.float32)
    return codec_of(**options).encode(vector_D, PrivateStream(bytes(32), "message"))


def received(data, *, length, **options):
    """Return (client id, weight, scale, values) of a message that is read as one of a codec with these options."""
    got = read(data, length=length, codec=codec_of(**options))
    return got.client_id, got.weight, got.scale, got.values


def message(**options):
    return to_bytes(encoded(**options), client_id="hospital é", weight=0.25)


@given(bits=st.integers(1, 32), data=st.data())
def test_packing_is_exact_and_has_no_gaps(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    values_M = np.array(values, dtype=np.uint32)
    packed = pack_bits(values_M, bits)
    assert len(packed) == -(-bits * len(values) // 8)
    assert np.array_equal(unpack_bits(packed, bits, len(values)), values_M)
    with pytest.raises(ProtocolError, match="expected"):
        unpack_bits(packed + b"\0", bits, len(values))


@pytest.mark.parametrize("bits", range(1, 17))
def test_round_trip_of_every_width(bits):
    one = encoded(bits=bits)
    client, weight, scale, values_D = received(to_bytes(one, client_id="c", weight=0.5), length=101, bits=bits)
    assert (client, weight, scale) == ("c", 0.5, one.scale)
    original_D = np.random.default_rng(3).uniform(-0.05, 0.05, 101).astype(np.float32)
    if bits == 1:  # a bit that is set stands for -1
        values_D = 1 + 2 * values_D
    assert np.abs(values_D * scale - original_D).max() < (2 if bits == 1 else 1.01) * scale


def test_round_trip_of_floats():
    one = encoded(name="identity")
    client, weight, scale, values_D = received(
        to_bytes(one, client_id="hospital é", weight=1.0), length=101, name="identity"
    )
    assert (client, weight, scale) == ("hospital é", 1.0, 1.0)
    assert np.array_equal(values_D.astype(np.float32), one.values_M)


def test_bytes_on_the_wire_shrink_with_the_bits():
    length = 4000
    sizes = [len(message(bits=bits, length=length)) for bits in range(2, 17)]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    floats = len(message(name="identity", length=length))
    header = floats - 4 * length
    assert 0 < header < 100
    for bits, size in zip(range(2, 17), sizes, strict=True):
        assert abs(size - bits * length / 8) < 100
    assert sizes[6] < floats / 3.9  # 8 bits


@pytest.mark.parametrize("options", [{"bits": 5}, {"bits": 8}, {"bits": 16}, {"name": "identity"}], ids=str)
def test_a_message_cut_anywhere_or_too_long_is_refused(options):
    whole = message(length=23, **options)
    received(whole, length=23, **options)
    for size in range(len(whole)):
        with pytest.raises(ProtocolError):
            received(whole[:size], length=23, **options)
    with pytest.raises(ProtocolError):
        received(whole + b"\0", length=23, **options)


def test_a_message_of_another_length_is_refused():
    for length in (0, 100, 102):
        with pytest.raises(ProtocolError, match="expected"):
            received(message(), length=length)


def forged(fields, payload=bytes(12)):
    header = msgpack.packb(fields)
    return len(header).to_bytes(2, "little") + header + payload


GOOD = [3, "c", "identity", 1, 32, 1.0, 3, 3, 1.0, False, b""]


def changed(place, value):
    return [*GOOD[:place], value, *GOOD[place + 1 :]]


@pytest.mark.parametrize(
    "fields",
    [
        GOOD[:-1], [*GOOD, 0], "text", 7, None, {"a": 1}, {1: 2},
        changed(0, 1), changed(0, "2"), changed(0, True), changed(1, 5), changed(2, None),
        changed(3, -1), changed(3, 4), changed(3, "1"), changed(3, True), changed(3, 2),
        changed(4, 0), changed(4, 33), changed(4, "8"), changed(4, None), changed(4, 8.5), changed(4, 16),
        changed(5, "x"), changed(5, None), changed(5, float("nan")), changed(5, 0.0), changed(5, -1.0),
        changed(6, "3"), changed(6, -1), changed(6, 3.0), changed(6, 4),
        changed(7, "3"), changed(7, -1), changed(7, 3.0), changed(7, 4), changed(7, 2**62),
        changed(8, None), changed(8, "1"), changed(8, float("nan")), changed(8, float("inf")), changed(8, -1.0),
        changed(9, 1), changed(9, None), changed(9, True), changed(10, None), changed(10, ""), changed(10, 0),
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_header_is_refused_by_name(fields):
    """Whatever a client sends, the server answers with a ProtocolError, never with another exception."""
    received(forged(GOOD), length=3, name="identity")
    with pytest.raises(ProtocolError):
        received(forged(fields), length=3, name="identity")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_floats_that_are_not_finite_are_refused_on_arrival_too(bad):
    payload = np.array([0.0, bad, 1.0], dtype="<f4").tobytes()
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        received(forged(GOOD, payload), length=3, name="identity")


@given(noise=st.binary(max_size=80))
def test_random_bytes_are_refused(noise):
    with pytest.raises(ProtocolError):
        received(noise, length=3, name="identity")


@given(place=st.integers(0, 200), flip=st.integers(1, 255))
def test_a_changed_byte_gives_a_message_or_a_protocol_error(place, flip):
    damaged = bytearray(message(length=23, bits=5))
    damaged[place % len(damaged)] ^= flip
    try:
        client, weight, scale, values_D = received(bytes(damaged), length=23, bits=5)
    except ProtocolError:
        return
    assert isinstance(client, str) and weight >= 0 and np.isfinite(scale)
    assert len(values_D) == 23
    assert np.abs(values_D).max() <= 2**31


# --- messages of every codec --------------------------------------------------------------------------------------


def vector(seed=1):
    return (np.random.default_rng(seed).standard_normal(LENGTH) / 20).astype(np.float32)


ALL = pytest.mark.parametrize("case", CASES)


@ALL
def test_every_message_is_read_as_it_was_written(case):
    made = at(case)
    one = made.encode(vector(), stream())
    sent = to_bytes(one, client_id="hospital é", weight=0.25)
    received = read(sent, length=LENGTH, codec=made)
    assert (received.client_id, received.weight) == ("hospital é", 0.25)
    assert "values" not in repr(received)
    assert len(received.values) == made.sum_length(LENGTH)
    header = len(sent) - wire_payload(made)
    assert 0 < header < 100


def wire_payload(made):
    wire = made.wire(LENGTH)
    return -(-wire.num_bits * wire.values // 8) + (positions_size(LENGTH, wire.values) if wire.sparse else 0)


@ALL
def test_every_message_cut_or_longer_is_refused_and_every_flipped_byte_is_refused_or_finite(case):
    made = at(case)
    whole = to_bytes(made.encode(vector(), stream()), client_id="c", weight=1.0)
    for size in {*range(len(whole))[:60], *range(60, len(whole), 41), len(whole) - 1}:
        with pytest.raises(ProtocolError):
            read(whole[:size], length=LENGTH, codec=made)
    with pytest.raises(ProtocolError):
        read(whole + b"\0", length=LENGTH, codec=made)
    flips = np.random.default_rng(3).integers(1, 256, len(whole))
    for place in {*range(len(whole))[:80], *range(80, len(whole), 17)}:
        damaged = bytearray(whole)
        damaged[place] ^= int(flips[place])
        try:
            received = read(bytes(damaged), length=LENGTH, codec=made)
        except ProtocolError:
            continue
        assert np.isfinite(received.values).all() and len(received.values) == made.sum_length(LENGTH)


@ALL
@given(noise=st.binary(max_size=80))
def test_random_bytes_are_refused_by_every_codec(case, noise):
    with pytest.raises(ProtocolError):
        read(noise, length=LENGTH, codec=at(case))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("count", [2**30, 2**62])
def test_a_header_that_claims_much_allocates_nothing(sparse, count):
    """A message of a few bytes says that it holds a gigabyte, or more than there is."""
    name = "top_k" if sparse else "identity"
    claim, made = forged([3, "c", name, 1, 32, 1.0, count, count, 1.0, sparse, b""]), at(name)
    tracemalloc.start()
    try:
        for length in (count, LENGTH):
            with pytest.raises(ProtocolError, match="payload has 12 bytes"):
                read(claim, length=length, codec=made)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# --- positions ----------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 300), data=st.data())
def test_positions_are_exact_both_ways_and_their_size_is_known(length, data):
    found = sorted(data.draw(st.sets(st.integers(0, length - 1))))
    indices_K = np.array(found, dtype=np.int64)
    packed = pack_positions(indices_K, length)
    assert len(packed) == positions_size(length, len(found)) <= -(-length // 8)
    assert np.array_equal(unpack_positions(packed, length, len(found)), indices_K)
    with pytest.raises(ProtocolError):
        unpack_positions(packed + b"\0", length, len(found))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
def test_positions_take_about_their_entropy(share):
    length, count = 100_000, int(100_000 * share)
    chosen = np.sort(np.random.default_rng(1).choice(length, count, replace=False))
    entropy = length * -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    assert entropy <= len(pack_positions(chosen, length)) < 1.2 * entropy + 8
    assert len(pack_positions(chosen, length)) <= min(4 * count, length / 8)


@given(length=st.integers(1, 200), count=st.integers(0, 200), data=st.data())
def test_damaged_positions_are_refused_or_in_range(length, count, data):
    count = min(count, length)
    size = positions_size(length, count)
    noise = data.draw(st.binary(min_size=size, max_size=size))
    try:
        found = unpack_positions(noise, length, count)
    except ProtocolError:
        return
    assert len(found) == count and (np.diff(found) > 0).all()
    assert count == 0 or 0 <= found[0] <= found[-1] < length


def test_more_positions_than_there_are_values_are_refused():
    for length, count in ((5, 6), (5, -1), (0, 1)):
        with pytest.raises(ProtocolError, match="positions"):
            unpack_positions(b"", length, count)
