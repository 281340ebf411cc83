"""Malformed and oversized messages are refused before anything large is made of them."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.errors import MessageError, ProtocolError
from privfed.secagg.frame import HEADER, MAGIC, TRAILER_BYTES, VERSION, Stage
from privfed.secagg.wire import Wire

DECODERS: dict[Stage, Callable[[Wire, bytes], Any]] = {
    Stage.ADVERTISE: Wire.decode_advertise,
    Stage.ROSTER: Wire.decode_roster,
    Stage.SHARE: Wire.decode_share,
    Stage.SHARES: Wire.decode_shares,
    Stage.MASKED: Wire.decode_masked,
    Stage.SURVIVORS: Wire.decode_survivors,
    Stage.AGREE: Wire.decode_agree,
    Stage.AGREEMENT: Wire.decode_agreement,
    Stage.UNMASK: lambda wire, message: wire.decode_unmask(message, range(3)),
}
KEY, ALL, TAG = b"k" * 32, b"\x07", b"t" * 16
FUZZED = int(os.environ.get("PRIVFED_FUZZ_MESSAGES", "2000"))
"""Mutated messages per decoder; 100000 takes minutes."""


def build(
    wire: Wire, stage: Stage, packed: bytes, sizes: tuple[int, int] | None = None, payload: bytes = b"", party: int = 0
) -> bytes:
    """Return a message whose checksum is right, with these packed fields and these claimed sizes."""
    payload = payload or (bytes(20) if stage is Stage.MASKED else b"")
    claim = sizes or (len(packed), len(payload))
    head = HEADER.pack(MAGIC, VERSION, stage, party, *claim, wire.context[:16]) + packed + payload
    return head + (bytes(TRAILER_BYTES[stage]) if stage % 2 else zlib.crc32(head).to_bytes(4, "little"))


@pytest.fixture(scope="module")
def wire(make_params: Any) -> Wire:
    return Wire(make_params())


@pytest.fixture(scope="module")
def seen(make_params: Any, make_drive: Any) -> dict[Stage, bytes]:
    """One true message of each stage."""
    drive = make_drive(make_params())
    drive.run()
    return {stage: drive.seen[stage.name.lower(), "c1"] for stage in Stage}


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("field", range(2))
def test_a_claimed_size_is_refused_before_allocation(wire: Wire, stage: Stage, field: int) -> None:
    tracemalloc.start()
    for size in (2**31, 2**32 - 1, 40_000, 3):
        sizes = [0, 0]
        sizes[field] = size
        with pytest.raises(MessageError):
            DECODERS[stage](wire, build(wire, stage, msgpack.packb([]), (sizes[0], sizes[1])))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


BOMBS = {
    "array": b"\xdd" + struct.pack(">I", 2**31),
    "nested": b"\xdc\x03\xff" * 300,
    "deep": b"\x91" * 100 + b"\xc0",
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
    with pytest.raises(MessageError):
        DECODERS[stage](wire, build(wire, stage, BOMBS[name]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


FORMS: list[tuple[Stage, Any, int]] = [
    (Stage.ADVERTISE, [KEY, b"c" * 32], 0),
    (Stage.ADVERTISE, [KEY, KEY, b"short"], 0),
    (Stage.ADVERTISE, [KEY, KEY, "x" * 32], 0),
    (Stage.ADVERTISE, KEY, 0),
    (Stage.ROSTER, [KEY], 0),
    (Stage.ROSTER, [KEY, ALL], 160),
    (Stage.ROSTER, [KEY, ALL], 321),
    (Stage.ROSTER, [KEY, b"\x0f"], 320),
    (Stage.ROSTER, [KEY, ALL + b"\0"], 320),
    (Stage.ROSTER, [KEY[1:], ALL], 320),
    (Stage.SHARE, [ALL], 82),
    (Stage.SHARE, [7], 164),
    (Stage.SHARES, [ALL], 163),
    (Stage.SHARES, [ALL, ALL], 164),
    (Stage.MASKED, [ALL], 20),
    (Stage.MASKED, [ALL, TAG], 20),
    (Stage.MASKED, [ALL, "t" * 32], 20),
    (Stage.MASKED, [ALL, TAG * 2], 19),
    (Stage.MASKED, [ALL, TAG * 2], 21),
    (Stage.SURVIVORS, [ALL, TAG * 3], 0),
    (Stage.SURVIVORS, ["\7", TAG * 2], 0),
    (Stage.AGREE, [ALL], 0),
    (Stage.AGREEMENT, [b"\x01"], 64),
    (Stage.AGREEMENT, [ALL], 128),
    (Stage.AGREEMENT, [b"\x03"], 127),
    (Stage.UNMASK, [ALL], 99),
    (Stage.UNMASK, [], 98),
    (Stage.UNMASK, [], 66),
]


@pytest.mark.parametrize(("stage", "fields", "payload"), FORMS)
def test_fields_of_the_wrong_form_are_refused(wire: Wire, stage: Stage, fields: Any, payload: int) -> None:
    with pytest.raises(MessageError):
        DECODERS[stage](wire, build(wire, stage, msgpack.packb(fields), payload=bytes(payload)))


def test_a_share_outside_the_field_is_refused(wire: Wire) -> None:
    with pytest.raises(MessageError, match="outside the field"):
        DECODERS[Stage.UNMASK](wire, build(wire, Stage.UNMASK, msgpack.packb([]), payload=b"\xff" * 99))


@pytest.mark.parametrize("stage", list(Stage))
def test_parties_are_checked(wire: Wire, stage: Stage) -> None:
    with pytest.raises(MessageError, match="number 3 of a cohort of 3"):
        DECODERS[stage](wire, build(wire, stage, msgpack.packb([]), party=3))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([KEY, ALL, TAG, TAG * 2, b""])
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@given(stage=st.sampled_from(list(Stage)), fields=VALUES, tail=st.binary(max_size=3), payload=st.binary(max_size=330))
def test_arbitrary_fields_give_values_or_a_typed_error(
    wire: Wire, stage: Stage, fields: Any, tail: bytes, payload: bytes
) -> None:
    try:
        DECODERS[stage](wire, build(wire, stage, msgpack.packb(fields) + tail, payload=payload))
    except ProtocolError:
        return
    assert not tail


@given(stage=st.sampled_from(list(Stage)), raw=st.binary(max_size=300))
def test_arbitrary_bytes_give_a_typed_error(wire: Wire, stage: Stage, raw: bytes) -> None:
    for message in (raw, build(wire, stage, raw)[:36] + raw):
        with pytest.raises(ProtocolError):
            DECODERS[stage](wire, message)


@given(data=st.data(), stage=st.sampled_from(list(Stage)))
@settings(max_examples=200)
def test_true_messages_that_were_altered_give_a_typed_error_or_their_values(
    wire: Wire, seen: dict[Stage, bytes], data: st.DataObject, stage: Stage
) -> None:
    raw = bytearray(seen[data.draw(st.sampled_from(list(Stage)))])
    raw[5] = stage
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        DECODERS[stage](wire, bytes(raw))
    except ProtocolError:
        return


def mutated(rng: random.Random, corpus: list[bytes], stage: Stage) -> bytes:
    """Return a message that was cut, joined, stretched and flipped at random, mostly with a checksum that fits."""
    raw = bytearray(rng.choice(corpus))
    for _ in range(rng.randrange(4)):
        kind, at = rng.randrange(5), rng.randrange(len(raw) + 1)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            raw[at:at] = rng.randbytes(rng.randrange(40))
        elif kind == 3:
            raw[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**16, 2**31, 2**32 - 1]))
        else:
            other = rng.choice(corpus)
            raw[at:] = other[rng.randrange(len(other)) :]
    if len(raw) >= HEADER.size and rng.random() < 0.8:
        raw[:6] = MAGIC + bytes([VERSION, stage])
        if rng.random() < 0.5:  # lengths that fit, so that the fields are reached
            trailer = TRAILER_BYTES[stage]
            inner = len(raw) - HEADER.size - trailer
            fields = rng.randrange(max(inner, 0) + 1)
            raw[8:20] = struct.pack("<IQ", fields, max(inner, 0) - fields)
    if stage % 2 == 0 and rng.random() < 0.9:
        raw[-4:] = zlib.crc32(bytes(raw[:-4])).to_bytes(4, "little")
    return bytes(raw)


@pytest.mark.parametrize("stage", list(Stage))
def test_fuzzed_messages_give_values_or_a_typed_error_in_bounded_memory(
    wire: Wire, seen: dict[Stage, bytes], stage: Stage
) -> None:
    """PRIVFED_FUZZ_MESSAGES=100000 for the long run; the seed is fixed, so that a failure repeats."""
    rng, corpus = random.Random(int(stage)), list(seen.values())
    refused, peak = 0, 0
    tracemalloc.start()
    for number in range(FUZZED):
        message = mutated(rng, corpus, stage)
        if number % 50 == 0:
            tracemalloc.reset_peak()
        try:
            DECODERS[stage](wire, message)
        except ProtocolError:
            refused += 1
        if number % 50 == 49:
            peak = max(peak, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert refused > FUZZED // 2
    assert peak < 5_000_000
