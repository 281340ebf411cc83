"""Malformed and oversized messages are refused before anything large is made of them."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.errors import ProtocolError
from privfed.secagg.frame import CHECKSUM, HEADER, MAGIC, VERSION, Stage
from privfed.secagg.wire import Reveal, Wire

DECODERS = {
    Stage.ADVERTISE: Wire.decode_advertise,
    Stage.ROSTER: Wire.decode_roster,
    Stage.SHARE: Wire.decode_share,
    Stage.SHARES: Wire.decode_shares,
    Stage.MASKED: Wire.decode_masked,
    Stage.SURVIVORS: Wire.decode_survivors,
    Stage.UNMASK: Wire.decode_unmask,
}
KEY, SEALED, SHARE = b"k" * 32, b"s" * 94, b"x" * 32 + b"\0"


def build(wire: Wire, stage: Stage, packed: bytes, sizes: tuple[int, int, int] | None = None) -> bytes:
    """Return a message whose checksum is right, with these packed fields and these claimed sizes."""
    sender = b"c0" if stage % 2 else b""
    payload = bytes(20) if stage is Stage.MASKED else b""
    claim = sizes or (len(sender), len(packed), len(payload))
    head = HEADER.pack(MAGIC, VERSION, stage, *claim, wire._context) + sender + packed + payload
    return head + CHECKSUM.pack(zlib.crc32(head))


@pytest.fixture(scope="module")
def wire(make_params: Any) -> Wire:
    return Wire(make_params())


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("field", range(3))
def test_a_claimed_size_is_refused_before_allocation(wire: Wire, stage: Stage, field: int) -> None:
    tracemalloc.start()
    for size in (2**31, 2**32 - 1, 40_000, 3):
        sizes = [0, 0, 0]
        sizes[field] = min(size, 2**16 - 1) if field == 0 else size
        message = build(wire, stage, msgpack.packb([]), (sizes[0], sizes[1], sizes[2]))
        with pytest.raises(ProtocolError):
            DECODERS[stage](wire, message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


BOMBS = {
    "array": b"\xdd" + struct.pack(">I", 2**31),
    "nested": b"\xdc\x03\xff" * 300,
    "deep": b"\x91" * 1000 + b"\xc0",
    "bin": b"\xc6" + struct.pack(">I", 2**31),
    "text": b"\xdb" + struct.pack(">I", 2**31),
    "map": b"\xdf" + struct.pack(">I", 2**31),
    "ext": b"\xc9" + struct.pack(">I", 2**31) + b"\1",
    "small map": b"\x81\xa1a\xa1b",
    "timestamp": b"\xd6\xff\0\0\0\1",
    "not utf-8": b"\x91\xa2\xff\xfe",
    "two values": b"\x90\x90",
    "nothing": b"",
    "reserved": b"\xc1",
    "long form": b"\xdc\x00\x00",
    "nan": b"\xcb\x7f\xf8\0\0\0\0\0\1",
}


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("name", BOMBS)
def test_hostile_fields_are_refused_cheaply(wire: Wire, stage: Stage, name: str) -> None:
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        DECODERS[stage](wire, build(wire, stage, BOMBS[name]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


FORMS: list[tuple[Stage, Any]] = [
    (Stage.ADVERTISE, [KEY, b"c" * 32]),
    (Stage.ADVERTISE, [KEY, KEY, KEY]),
    (Stage.ADVERTISE, [KEY, b"c" * 32, b"short"]),
    (Stage.ADVERTISE, [KEY, b"c" * 32, "x" * 32]),
    (Stage.ROSTER, [["c0", KEY, b"c" * 32]]),
    (Stage.ROSTER, [["zz", KEY, b"c" * 32, KEY]]),
    (Stage.ROSTER, [[["c0"], KEY, b"c" * 32, KEY]]),
    (Stage.ROSTER, [["c1", KEY, b"c" * 32, KEY], ["c0", b"d" * 32, b"e" * 32, KEY]]),
    (Stage.SHARE, [KEY, [["c1", SEALED], ["c1", SEALED]]]),
    (Stage.SHARE, [KEY, [["c1", SEALED + b"!"]]]),
    (Stage.SHARE, [KEY, 7]),
    (Stage.SHARES, ["zz", [["c1", SEALED]]]),
    (Stage.SHARES, [b"c0", [["c1", SEALED]]]),
    (Stage.MASKED, [KEY]),
    (Stage.MASKED, [KEY, b"short"]),
    (Stage.SURVIVORS, ["c1", "c0"]),
    (Stage.SURVIVORS, ["c0", "c0"]),
    (Stage.SURVIVORS, ["c0", 1]),
    (Stage.SURVIVORS, "c0"),
    (Stage.UNMASK, [[["c0", SHARE]], [["c0", SHARE]]]),
    (Stage.UNMASK, [[["c0", b"\xff" * 33]], []]),
    (Stage.UNMASK, [[["c0", SHARE[:-1]]], []]),
    (Stage.UNMASK, [[]]),
]


@pytest.mark.parametrize(("stage", "fields"), FORMS)
def test_fields_of_the_wrong_form_are_refused(wire: Wire, stage: Stage, fields: Any) -> None:
    with pytest.raises(ProtocolError):
        DECODERS[stage](wire, build(wire, stage, msgpack.packb(fields)))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["c0", "c1", KEY, SEALED, SHARE])
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@given(stage=st.sampled_from(list(Stage)), fields=VALUES, tail=st.binary(max_size=3))
def test_arbitrary_fields_give_values_or_a_typed_error(wire: Wire, stage: Stage, fields: Any, tail: bytes) -> None:
    try:
        DECODERS[stage](wire, build(wire, stage, msgpack.packb(fields) + tail))
    except ProtocolError:
        return
    assert not tail


@given(stage=st.sampled_from(list(Stage)), raw=st.binary(max_size=300))
def test_arbitrary_bytes_give_a_typed_error(wire: Wire, stage: Stage, raw: bytes) -> None:
    for message in (raw, build(wire, stage, raw)[:40] + raw):
        with pytest.raises(ProtocolError):
            DECODERS[stage](wire, message)


def test_senders_are_checked(wire: Wire, make_params: Any) -> None:
    stranger = Wire(make_params(clients=("c0", "c1", "zz")))
    stranger._context = wire._context
    for sender in ("zz", "", "c0\0"):
        with pytest.raises(ProtocolError, match="cohort"):
            wire.decode_unmask(stranger.encode_unmask(sender, Reveal(seed_shares={}, key_shares={})))
    message = HEADER.pack(MAGIC, VERSION, Stage.UNMASK, 1, 3, 0, wire._context) + b"\xff" + msgpack.packb([[], []])
    with pytest.raises(ProtocolError, match="UTF-8"):
        wire.decode_unmask(message + CHECKSUM.pack(zlib.crc32(message)))
