"""What the server hears: the right sum, and under masking nothing of a single client.

Shape suffixes: D values of an update, M encoded values.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pytest

from privfed.compression import CODECS, Ring
from privfed.compression.fixed_point import from_ring
from privfed.compression.message import pack_bits
from privfed.errors import ProtocolError, ThresholdError
from privfed.federation.collect import Link, MaskedLink, PlainLink
from privfed.rng import PrivateStream
from privfed.secagg import Identity, Requirements, ServerSession
from privfed.secagg.ring import READ_AHEAD, add_packed
from privfed.types import Encoded

SIZE = 301
RING = Ring(bits=32, clients=8)
CLIENTS = tuple(f"c{number}" for number in range(5))
TABLES: dict[str, dict[str, Any]] = {
    "identity": {"name": "identity"},
    "stochastic_quantizer": {"name": "stochastic_quantizer", "bits": 8, "max_value": 4.0},
}


def _codec(name: str, *, masked: bool, ring: Ring = RING) -> Any:
    plugin = CODECS.get(name)
    return plugin.build(plugin.config.model_validate(TABLES[name]), ring if masked else None)


def _link(
    name: str, *, masked: bool, weighted: bool = False, clients: tuple[str, ...] = CLIENTS, ring: Ring = RING
) -> Any:
    if not masked:
        return PlainLink(_codec(name, masked=False), SIZE)
    return MaskedLink(
        {client: Identity.generate() for client in clients},
        requirements=Requirements(),
        round_id=b"round",
        config_digest=bytes(32),
        codec=name,
        length=SIZE,
        weighted=weighted,
        ring_bits=ring.bits,
    )


def _updates(clients: tuple[str, ...] = CLIENTS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {client: rng.standard_normal(SIZE).astype(np.float32) for client in clients}


def _encode(codec: Any, updates: dict[str, np.ndarray]) -> dict[str, Encoded]:
    return {client: codec.encode(each, PrivateStream(bytes(32), client)) for client, each in updates.items()}


def _send_all(link: Link, encoded: dict[str, Encoded], weights: dict[str, float] | None = None) -> Any:
    link.open()
    for client, message in encoded.items():
        link.send(client, message, (weights or {}).get(client, 1.0))
    return link.close()


# the sum


@pytest.mark.parametrize("name", list(TABLES))
def test_the_masked_sum_is_the_plain_sum(name: str) -> None:
    updates = _updates()
    true_D = np.sum([each.astype(np.float64) for each in updates.values()], axis=0)
    found = {}
    for masked in (True, False):
        codec = _codec(name, masked=masked)
        collected = _send_all(_link(name, masked=masked), _encode(codec, updates))
        assert collected.survivors == CLIENTS
        assert collected.total.survivors == len(CLIENTS) == collected.total.total_weight
        assert collected.bytes_up > 0
        found[masked] = codec.decode_sum(collected.total)
    step = {"identity": 16.0 / (2**31 // 8), "stochastic_quantizer": 4.0 / 127}[name]
    # n roundings: to nearest for the identity, up or down for the quantizer, whose draws both links share
    allowed = len(CLIENTS) * step * (0.5 if name == "identity" else 1.0)
    assert np.abs(found[True] - true_D).max() <= allowed * (1 + 1e-6)
    if name == "identity":
        np.testing.assert_allclose(found[False], true_D, rtol=1e-12)
    else:
        np.testing.assert_allclose(found[True], found[False], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("bits", [16, 20, 24])
def test_smaller_rings_sum_exactly_and_send_fewer_bytes(name: str, bits: int) -> None:
    ring = Ring(bits=bits, clients=8)
    updates, codec = _updates(), _codec(name, masked=True, ring=ring)
    encoded = _encode(codec, updates)
    collected = _send_all(_link(name, masked=True, ring=ring), encoded)
    found = codec.decode_sum(collected.total)
    np.testing.assert_allclose(found, np.sum([_decoded(each) for each in encoded.values()], axis=0), atol=1e-9)
    wide = _send_all(_link(name, masked=True), _encode(_codec(name, masked=True), updates))
    saved = (wide.bytes_up - collected.bytes_up) / len(CLIENTS)
    assert saved == 4 * SIZE - -(-SIZE * bits // 8)


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("bits", [16, 20, 24])
def test_the_largest_values_of_all_clients_do_not_wrap(name: str, bits: int) -> None:
    """The stated bound: n times the largest magnitude is at most 2^(bits - 1) - 1."""
    ring = Ring(bits=bits, clients=len(CLIENTS))
    codec, largest = _codec(name, masked=True, ring=ring), {"identity": 16.0, "stochastic_quantizer": 4.0}[name]
    for sign in (1.0, -1.0):
        encoded = _encode(codec, dict.fromkeys(CLIENTS, np.full(SIZE, sign * largest, dtype=np.float32)))
        total = codec.decode_sum(_send_all(_link(name, masked=True, ring=ring), encoded).total)
        np.testing.assert_allclose(total, sign * largest * len(CLIENTS), rtol=1e-9)


@pytest.mark.parametrize("bits", [16, 20, 24, 32])
def test_masked_weights_are_exact_in_every_ring(bits: int) -> None:
    clients = tuple(f"c{number:02d}" for number in range(40))
    ring = Ring(bits=bits, clients=40)
    codec = _codec("identity", masked=True, ring=ring)
    weights = {client: ((number * 7919) % 65536 + 1) / 65536 for number, client in enumerate(clients)}
    updates = {client: np.zeros(SIZE, dtype=np.float32) for client in clients}
    link = _link("identity", masked=True, weighted=True, clients=clients, ring=ring)
    collected = _send_all(link, _encode(codec, updates), weights)
    assert collected.total.total_weight == sum(weights.values())
    assert len(collected.total.sum_M) == SIZE


@pytest.mark.parametrize("masked", [True, False])
def test_weights_add_up_beside_the_values(masked: bool) -> None:
    weights = {client: (number + 1) / 8 for number, client in enumerate(CLIENTS)}
    codec = _codec("identity", masked=masked)
    collected = _send_all(_link("identity", masked=masked, weighted=True), _encode(codec, _updates()), weights)
    assert collected.total.total_weight == pytest.approx(sum(weights.values()), abs=1e-12)
    assert len(codec.decode_sum(collected.total)) == SIZE


@pytest.mark.parametrize("masked", [True, False])
def test_the_sum_is_over_those_who_sent(masked: bool) -> None:
    updates, codec = _updates(), _codec("identity", masked=masked)
    here = {client: updates[client] for client in CLIENTS[1:]}
    collected = _send_all(_link("identity", masked=masked), _encode(codec, here))
    assert collected.survivors == CLIENTS[1:]
    np.testing.assert_allclose(codec.decode_sum(collected.total), np.sum(list(here.values()), axis=0), atol=1e-6)


def test_too_few_survivors_reveal_nothing() -> None:
    codec = _codec("identity", masked=True)
    link = _link("identity", masked=True)
    few = dict(list(_encode(codec, _updates()).items())[:3])  # the threshold is four of five
    with pytest.raises(ThresholdError):
        _send_all(link, few)


def test_no_message_is_no_sum() -> None:
    assert _link("identity", masked=False).close().total is None


def test_plain_sums_of_other_scales_are_refused() -> None:
    link = _link("identity", masked=False)
    codec = _codec("identity", masked=False)
    encoded = _encode(codec, _updates())
    link.send("c0", encoded["c0"], 1.0)
    with pytest.raises(ProtocolError, match="another way"):
        link.send("c1", replace(encoded["c1"], scale=2.0), 1.0)


# what the server can see

_OPAQUE = (ModuleType, FunctionType, MethodType, FrameType, type)


def _reachable(*roots: object) -> Iterator[object]:
    """Yield every object that can be reached from ``roots`` (modules, classes and code left out)."""
    seen: set[int] = set()
    waiting = list(roots)
    keep = []  # holds what was seen, so that no id is used twice
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _OPAQUE):
            continue
        seen.add(id(one))
        keep.append(one)
        yield one
        waiting.extend(gc.get_referents(one))
        if isinstance(one, memoryview):
            waiting.append(one.obj)
        if isinstance(one, np.ndarray) and one.base is not None:
            waiting.append(one.base)


def _haystacks(*roots: object) -> Iterator[tuple[bytes, np.ndarray | None]]:
    for one in _reachable(*roots):
        if isinstance(one, (bytes, bytearray)):
            yield bytes(one), None
        elif isinstance(one, memoryview):
            yield one.tobytes(), None
        elif isinstance(one, np.ndarray) and one.dtype != object:
            yield one.tobytes(), one


def _decoded(encoded: Encoded) -> np.ndarray:
    if encoded.values_M.dtype == np.float32:
        return encoded.values_M.astype(np.float64)
    return from_ring(encoded.values_M.astype(np.uint64), encoded.num_bits) * encoded.scale


def _needles(encoded: Encoded) -> list[bytes]:
    """Return every way to write a client's vector, whole and as halves."""
    values = encoded.values_M
    written = [values, values.astype(np.float64), _decoded(encoded), _decoded(encoded).astype(np.float32)]
    if values.dtype == np.uint32:
        signed = from_ring(values.astype(np.uint64), encoded.num_bits)
        written += [signed, signed.astype(np.int32), values.astype(np.uint64), values.astype(">u4")]
    half = len(values) // 2
    found = [part.tobytes() for each in written for part in (each[:half], each[half:])]
    if values.dtype == np.uint32 and encoded.num_bits < 32:
        found.append(pack_bits(values, encoded.num_bits))
    return found


def seen_clients(encoded: dict[str, Encoded], *roots: object) -> set[str]:
    """Return the clients whose own vector can be read from ``roots``."""
    needles = {client: _needles(each) for client, each in encoded.items()}
    plain = {client: _decoded(each) for client, each in encoded.items()}
    found = set()
    for data, array in _haystacks(*roots):
        for client in encoded:
            if any(needle in data for needle in needles[client]):
                found.add(client)
            if array is not None and array.dtype.kind in "fiu" and array.size == plain[client].size:
                values = array.ravel().astype(np.float64)
                for scale in (1.0, encoded[client].scale):
                    if np.allclose(values * scale, plain[client], rtol=1e-4, atol=1e-7):
                        found.add(client)
    return found


class Eavesdropper:
    """Keeps everything that servers are handed, and looks at what they hold after each message."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.servers: list[object] = []
        self.encoded: dict[str, Encoded] = {}
        self.seen_on_the_way: set[str] = set()
        for kind, method in (
            (ServerSession, "receive_advertise"),
            (ServerSession, "receive_share"),
            (ServerSession, "receive_masked"),
            (ServerSession, "receive_agree"),
            (ServerSession, "receive_unmask"),
            (PlainLink, "receive"),
        ):
            patch.setattr(kind, method, self._wrapped(method, getattr(kind, method)))

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def receive(server: object, message: bytes) -> Any:
            if not any(server is known for known in self.servers):
                self.servers.append(server)
            self.messages.append((name, message))
            answer = method(server, message)
            if len(self.messages) % 3 == 0:  # a look now and then is enough: the state only grows until the end
                self.seen_on_the_way |= self.look(server)
            return answer

        return receive

    def look(self, *roots: object) -> set[str]:
        """Return the clients whose vector is readable from ``roots``."""
        return seen_clients(self.encoded, *roots)

    def everything(self) -> set[str]:
        """Return the clients whose vector is readable from any message or server, now or on the way."""
        return self.seen_on_the_way | self.look(self.messages, self.servers)


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Eavesdropper:
    """A listener at every server."""
    return Eavesdropper(monkeypatch)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(TABLES))
def test_the_server_never_holds_a_single_update(name: str, weighted: bool, ear: Eavesdropper) -> None:
    codec = _codec(name, masked=True)
    ear.encoded = _encode(codec, _updates())
    weights = {client: (number + 1) / 8 for number, client in enumerate(CLIENTS)}
    collected = _send_all(_link(name, masked=True, weighted=weighted), ear.encoded, weights)
    assert len(ear.messages) == 5 * len(CLIENTS)
    assert {type(message) for _, message in ear.messages} == {bytes}
    assert ear.everything() == set()
    assert ear.look(collected) == set()
    np.testing.assert_allclose(  # and yet the sum is there
        codec.decode_sum(collected.total), np.sum([_decoded(each) for each in ear.encoded.values()], axis=0), atol=1e-9
    )


def test_a_dropped_clients_update_stays_hidden_too(ear: Eavesdropper) -> None:
    codec = _codec("identity", masked=True)
    ear.encoded = _encode(codec, _updates())
    sent = {client: each for client, each in ear.encoded.items() if client != "c2"}
    collected = _send_all(_link("identity", masked=True), sent)
    assert collected.survivors == ("c0", "c1", "c3", "c4")
    assert ear.everything() == set()


@pytest.mark.parametrize("name", list(TABLES))
def test_the_detector_sees_plain_updates(name: str, ear: Eavesdropper) -> None:
    codec = _codec(name, masked=False)
    ear.encoded = _encode(codec, _updates())
    _send_all(_link(name, masked=False), ear.encoded)
    assert ear.everything() == set(CLIENTS)


@pytest.mark.parametrize(
    "hide",
    [
        lambda values: {"deep": [("x", values)]},
        lambda values: values.tobytes(),
        lambda values: memoryview(values.astype("<u4").tobytes()),
        lambda values: from_ring(values.astype(np.uint64), 32),
        lambda values: b"header" + values[: SIZE // 2].tobytes(),
        lambda values: np.append(values, np.uint32(1))[:-1],
    ],
)
def test_the_detector_sees_what_is_hidden_in_a_server(hide: Callable[[Any], object], ear: Eavesdropper) -> None:
    codec = _codec("identity", masked=True)
    ear.encoded = _encode(codec, _updates())
    link = _link("identity", masked=True)
    _send_all(link, ear.encoded)
    assert ear.everything() == set()
    link._server._kept = hide(ear.encoded["c3"].values_M)
    assert ear.everything() == {"c3"}


def test_what_a_server_receives_says_nothing_of_the_vector(ear: Eavesdropper) -> None:
    codec = _codec("identity", masked=True)
    ear.encoded = _encode(codec, _updates())
    link = _link("identity", masked=True)
    _send_all(link, ear.encoded)
    received = 0
    for name, message in ear.messages:
        if name != "receive_masked":
            continue
        got = link._server._wire.decode_masked(message)
        masked_M = np.zeros(SIZE, dtype=np.uint32)
        add_packed(masked_M, message + bytes(READ_AHEAD), got.frame.payload_at, 32)
        plain_M = ear.encoded[CLIENTS[got.sender]].values_M
        assert (masked_M == plain_M).mean() < 0.02
        signed = masked_M.astype(np.int32).astype(np.float64)
        correlation = np.corrcoef(signed, from_ring(plain_M.astype(np.uint64), 32))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(SIZE)
        # uniform on the ring: the mean of |v| / 2^31 is a half, with deviation 0.29 / sqrt(M)
        assert abs(np.abs(signed).mean() / 2**31 - 0.5) < 5 * 0.29 / np.sqrt(SIZE)
        received += 1
    assert received == len(CLIENTS)


def test_equal_vectors_are_masked_differently_each_time(ear: Eavesdropper) -> None:
    codec = _codec("identity", masked=True)
    same = np.zeros(SIZE, dtype=np.float32)
    ear.encoded = {}
    for _ in range(2):
        _send_all(_link("identity", masked=True), _encode(codec, dict.fromkeys(CLIENTS, same)))
    sent = [message for name, message in ear.messages if name == "receive_masked"]
    assert len({message[-4 * SIZE :] for message in sent}) == 2 * len(CLIENTS)


@pytest.mark.parametrize("masked", [True, False])
def test_a_whole_round_shows_the_server_no_update(
    masked: bool, ear: Eavesdropper, federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(
        privacy={"unit": "none"}, secagg={"name": "masked" if masked else "none"}, server={"cohort_size": 4}
    )
    kind = type(run.phase.codec)
    encode = kind.encode
    sent: list[Encoded] = []
    monkeypatch.setattr(kind, "encode", lambda codec, *args: (sent.append(encode(codec, *args)), sent[-1])[1])
    state, report = run.round()
    ear.encoded = {str(number): each for number, each in enumerate(sent)}
    assert report.survivors == len(sent) == 4
    assert ear.look(ear.messages, ear.servers, state, report) == (set() if masked else set(ear.encoded))


def test_plain_sums_of_floats_and_integers_are_refused() -> None:
    link = _link("identity", masked=False)
    floats = _encode(_codec("identity", masked=False), _updates())
    link.send("c0", floats["c0"], 1.0)
    integers = replace(floats["c1"], values_M=floats["c1"].values_M.astype(np.uint32))
    with pytest.raises(ProtocolError, match=r"integer values.*expected 301 32-bit float32 values"):
        link.send("c1", integers, 1.0)
