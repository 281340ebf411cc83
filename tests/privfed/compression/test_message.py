"""The plain message: exact both ways for every width, its length is what is counted, damage is refused."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.compression import CODECS
from privfed.compression.message import pack_bits, signed_values, to_bytes, unpack_bits
from privfed.errors import ProtocolError
from privfed.rng import PrivateStream


def encoded(name="stochastic_quantizer", length=101, **options):
    plugin = CODECS.get(name)
    vector_D = np.random.default_rng(3).uniform(-0.05, 0.05, length).astype(np.float32)
    return plugin.build(plugin.config(**options), None).encode(vector_D, PrivateStream(bytes(32), "message"))


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


@pytest.mark.parametrize("bits", range(2, 17))
def test_round_trip_of_every_width(bits):
    one = encoded(bits=bits)
    client, weight, scale, values_D = signed_values(to_bytes(one, client_id="c", weight=0.5), length=101)
    assert (client, weight, scale) == ("c", 0.5, one.scale)
    original_D = np.random.default_rng(3).uniform(-0.05, 0.05, 101).astype(np.float32)
    assert np.abs(values_D * scale - original_D).max() < scale


def test_round_trip_of_floats():
    one = encoded("identity")
    client, weight, scale, values_D = signed_values(to_bytes(one, client_id="hospital é", weight=1.0), length=101)
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
    signed_values(whole, length=23)
    for size in range(len(whole)):
        with pytest.raises(ProtocolError):
            signed_values(whole[:size], length=23)
    with pytest.raises(ProtocolError):
        signed_values(whole + b"\0", length=23)


def test_a_message_of_another_length_is_refused():
    for length in (0, 100, 102):
        with pytest.raises(ProtocolError, match="expected"):
            signed_values(message(), length=length)


def forged(fields, payload=bytes(12)):
    header = msgpack.packb(fields)
    return len(header).to_bytes(2, "little") + header + payload


GOOD = [1, "c", "identity", 32, 1.0, 3, 1.0, True]


def changed(place, value):
    return [*GOOD[:place], value, *GOOD[place + 1 :]]


@pytest.mark.parametrize(
    "fields",
    [
        GOOD[:-1], [*GOOD, 0], "text", 7, None, {"a": 1}, {1: 2},
        changed(0, 2), changed(0, "1"), changed(1, 5),
        changed(3, 0), changed(3, 33), changed(3, "8"), changed(3, None), changed(3, 8.5),
        changed(4, "x"), changed(4, None), changed(4, float("nan")), changed(4, 0.0), changed(4, -1.0),
        changed(5, "3"), changed(5, -1), changed(5, 3.0),
        changed(6, None), changed(6, "1"), changed(6, float("nan")), changed(6, float("inf")), changed(6, -1.0),
        changed(7, 1), changed(7, None),
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_header_is_refused_by_name(fields):
    """Whatever a client sends, the server answers with a ProtocolError, never with another exception."""
    signed_values(forged(GOOD), length=3)
    with pytest.raises(ProtocolError):
        signed_values(forged(fields), length=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_floats_that_are_not_finite_are_refused_on_arrival_too(bad):
    payload = np.array([0.0, bad, 1.0], dtype="<f4").tobytes()
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        signed_values(forged(GOOD, payload), length=3)


@given(noise=st.binary(max_size=80))
def test_random_bytes_are_refused(noise):
    with pytest.raises(ProtocolError):
        signed_values(noise, length=3)


@given(place=st.integers(0, 200), flip=st.integers(1, 255))
def test_a_changed_byte_gives_a_message_or_a_protocol_error(place, flip):
    damaged = bytearray(message(length=23, bits=5))
    damaged[place % len(damaged)] ^= flip
    try:
        client, weight, scale, values_D = signed_values(bytes(damaged), length=23)
    except ProtocolError:
        return
    assert isinstance(client, str) and weight >= 0 and np.isfinite(scale)
    assert len(values_D) == 23
    assert np.abs(values_D).max() <= 2**31
