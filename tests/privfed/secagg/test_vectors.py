"""Known answers for every derivation and message, so that a change of the wire is never an accident.

``python tests/privfed/secagg/test_vectors.py`` writes the files anew; do that only together with a new
version number in the header or a new label in the derivations.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed import errors
from privfed.secagg import Identity, SessionParams
from privfed.secagg import keys as k
from privfed.secagg.degree import find_degree
from privfed.secagg.frame import VERSION
from privfed.secagg.graph import Graph
from privfed.secagg.keystream import apply_masks
from privfed.secagg.ring import RING_BITS, pack, pack_into, word_type
from privfed.secagg.shamir import PRIME, combine, evaluate, lagrange_weights
from privfed.secagg.wire import CARD_BYTES, SEALED_BYTES, Card, Wire

VECTORS = Path(__file__).parents[2] / "vectors"


def fixed(name: str, size: int = 32) -> bytes:
    """Return bytes that depend on the name only; never used outside this file."""
    return hashlib.shake_256(name.encode()).digest(size)


NAMES = ("ann", "bob", "zoë")
PEOPLE = {name: Identity.from_seed(fixed(f"identity {name}")) for name in NAMES}
PARAMS = SessionParams(
    round_id=b"round-7",
    config_digest=bytes(range(32)),
    clients=NAMES,
    identities=tuple(person.public for person in PEOPLE.values()),
    degree=2,
    threshold=2,
    n_min=2,
    corrupt=0,
    length=3,
    ring_bits=20,
)


def keystream_vectors() -> dict[str, Any]:
    cases = []
    for ring_bits in RING_BITS:
        for length in (0, 1, 5, 17):
            values = np.arange(length).astype(word_type(ring_bits))
            apply_masks(values, [fixed("plus")], [fixed("minus")])
            cases.append({"ring_bits": ring_bits, "length": length, "packed": pack(values, ring_bits).hex()})
    return {"plus": fixed("plus").hex(), "minus": fixed("minus").hex(), "cases": cases}


def shamir_vectors() -> dict[str, Any]:
    coefficients = [int.from_bytes(fixed(f"coefficient {i}"), "little") for i in range(3)]
    points = [1, 2, 5, 9]
    return {
        "prime": hex(PRIME),
        "coefficients": [hex(one) for one in coefficients],
        "points": points,
        "shares": [hex(one) for one in evaluate(coefficients, points)],
        "weights_of_first_three": [hex(one) for one in lagrange_weights(points[:3])],
    }


def graph_vectors() -> dict[str, Any]:
    cases = [
        {"context": fixed("context").hex(), "n": n, "degree": degree, "neighbours_of_0_and_1": near}
        for n, degree in ((7, 4), (60, 6))
        for near in [[list(Graph(fixed("context"), n, degree).neighbours(i)) for i in (0, 1)]]
    ]
    found = []
    for server in ("curious", "malicious"):
        for n in (60, 100, 1000):
            one = find_degree(n, corrupt=n // 10, dropped=3 * n // 10, server=server)  # type: ignore[arg-type]
            found.append({"server": server, "n": n, "degree": one.degree, "threshold": one.threshold})
    return {"rings": cases, "a_tenth_corrupt_three_tenths_dropped": found}


def derivation_vectors() -> dict[str, Any]:
    scope = PARAMS.scope
    ann, bob, seed = k.load_private(fixed("ann")), k.load_private(fixed("bob")), fixed("seed")
    publics = {name: key.public_key().public_bytes_raw() for name, key in (("ann", ann), ("bob", bob))}
    pairs = list(publics.items())
    shared = k.agree(ann, publics["bob"], "bob")
    return {
        "ann": fixed("ann").hex(),
        "bob": fixed("bob").hex(),
        "seed": seed.hex(),
        "ann_public": publics["ann"].hex(),
        "bob_public": publics["bob"].hex(),
        "shared": shared.hex(),
        "pairwise_mask_key": k.pairwise_mask_key(ann, scope, pairs[0], pairs[1]).hex(),
        "sealing_key_ann_to_bob": k.sealing_key(shared, scope, "ann", "bob").hex(),
        "sealing_key_bob_to_ann": k.sealing_key(shared, scope, "bob", "ann").hex(),
        "confirmation_ann_to_bob": k.confirmation(shared, scope, "ann", "bob", b"\x07").hex(),
        "message_key_of_stage_5": k.message_key(shared, scope, "ann", 5).hex(),
        "self_mask_key": k.self_mask_key(seed, scope, "ann").hex(),
        "seed_commitment": k.commit_seed(seed, scope, "ann").hex(),
        "sealed": k.seal(fixed("key"), b"text", k.pack(*scope, 3, "ann", "bob")).hex(),
        "tag": k.tag(fixed("key"), b"message").hex(),
        "context": PARAMS.context().hex(),
        "identity_seed_of_ann": fixed("identity ann").hex(),
        "identity_of_ann": PEOPLE["ann"].public.hex(),
        "signature": PEOPLE["ann"].sign(PARAMS.context(), b"message").hex(),
    }


def good_messages() -> dict[str, bytes]:
    """Return one message of each stage, from or to client 0."""
    wire = Wire(PARAMS)
    cards = {}
    for number, (name, person) in enumerate(PEOPLE.items()):
        keys = k.PublicKeys(
            masking=fixed(f"{name} masking"), channel=fixed(f"{name} channel"), seed_commitment=fixed(f"{name} seed")
        )
        cards[number] = Card(keys=keys, signature=wire.encode_advertise(number, keys, person)[-64:])
    sealed = {number: fixed(f"sealed {number}", SEALED_BYTES) for number in (1, 2)}
    confirmed = {number: fixed(f"confirmed {number}", 16) for number in (1, 2)}
    masked_M = np.array([0, 1, 2**20 - 1], dtype=np.uint32)

    def put(out: np.ndarray) -> None:
        pack_into(masked_M, 20, out)

    agreed = {
        number: wire.encode_agree(number, range(3), [0, 1], person)[-64:]
        for number, person in enumerate(PEOPLE.values())
        if number < 2
    }
    return {
        "advertise": wire.encode_advertise(0, cards[0].keys, PEOPLE["ann"]),
        "roster": wire.encode_roster(0, fixed("server"), cards),
        "share": wire.encode_share(0, fixed("tag key 3"), range(3), sealed),
        "shares": wire.encode_shares(0, range(3), sealed),
        "masked": wire.encode_masked(
            0, fixed("tag key 5"), range(3), confirmed, lambda out: pack_into(masked_M, 20, out)
        ),
        "survivors": wire.encode_survivors(0, [0, 1], {1: confirmed[1]}),
        "agree": wire.encode_agree(0, range(3), [0, 1], PEOPLE["ann"]),
        "agreement": wire.encode_agreement(0, agreed),
        "unmask": wire.encode_unmask(0, fixed("tag key 9"), {i: fixed(f"share {i}") + b"\0" for i in range(3)}),
    }


def decoders(wire: Wire) -> dict[str, Callable[[bytes], Any]]:
    """Return what a receiver does with each message until it believes it."""

    def tagged(stage: int, decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def check(message: bytes) -> Any:
            got = decode(message)
            wire.check_tag(got.frame if stage == 5 else got[0], fixed(f"tag key {stage}"))
            return got

        return check

    def roster(message: bytes) -> Any:
        got = wire.decode_roster(message)
        for number, card in got[3].items():
            wire.check_card(number, card)
        return got

    def agreement(message: bytes) -> Any:
        got = wire.decode_agreement(message)
        for number, signature in got[1].items():
            wire.check_agree(number, range(3), [0, 1], signature)
        return got

    return {
        "advertise": wire.decode_advertise,
        "roster": roster,
        "share": tagged(3, wire.decode_share),
        "shares": wire.decode_shares,
        "masked": tagged(5, wire.decode_masked),
        "survivors": wire.decode_survivors,
        "agree": wire.decode_agree,
        "agreement": agreement,
        "unmask": tagged(9, lambda message: wire.decode_unmask(message, range(3))),
    }


def bad_messages(good: dict[str, bytes]) -> list[dict[str, str]]:
    """Return messages that have to be refused, each with why and with which error."""

    def flip(raw: bytes, at: int) -> bytes:
        at %= len(raw)
        return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    def resummed(raw: bytes) -> bytes:
        return raw[:-4] + zlib.crc32(raw[:-4]).to_bytes(4, "little")

    cases = []
    for name, raw in good.items():
        server = name in ("roster", "shares", "survivors", "agreement")
        seal = resummed if server else bytes
        alter = [
            ("empty", b""),
            ("cut", raw[:-1]),
            ("one byte more", raw + b"\0"),
            ("another magic", seal(flip(raw, 0))),
            ("another version", seal(flip(raw, 4))),
            ("another stage", seal(flip(raw, 5))),
            ("a client beyond the cohort", seal(raw[:6] + b"\x03" + raw[7:])),
            ("a longer field claimed", seal(flip(raw, 11))),
            ("a longer payload claimed", seal(flip(raw, 19))),
            ("another round", seal(flip(raw, 20))),
            ("a trailer that does not fit", flip(raw, -1)),
        ]
        for why, message in alter:
            kind = "MessageError"
            if not server and why == "a trailer that does not fit":
                kind = "AuthenticityError"
            cases.append({"message": name, "why": why, "bytes": message.hex(), "error": kind})
    swapped = {
        "advertise": ("a key that was swapped", flip(good["advertise"], 40)),
        "roster": ("a neighbour's key that was swapped", resummed(flip(good["roster"], -5 - CARD_BYTES))),
        "masked": ("a value that was altered", flip(good["masked"], -20)),
        "unmask": ("a share that was altered", flip(good["unmask"], -30)),
        "agree": ("other survivors", flip(good["agree"], -65)),
        "agreement": ("a signature that was altered", resummed(flip(good["agreement"], -10))),
    }
    for name, (why, message) in swapped.items():
        cases.append({"message": name, "why": why, "bytes": message.hex(), "error": "AuthenticityError"})
    return cases


def message_vectors() -> dict[str, Any]:
    good = good_messages()
    return {
        "session": {
            "round_id": PARAMS.round_id.hex(),
            "config_digest": PARAMS.config_digest.hex(),
            "clients": list(PARAMS.clients),
            "identity_seeds": [fixed(f"identity {name}").hex() for name in NAMES],
            "degree": PARAMS.degree,
            "threshold": PARAMS.threshold,
            "n_min": PARAMS.n_min,
            "corrupt": PARAMS.corrupt,
            "length": PARAMS.length,
            "ring_bits": PARAMS.ring_bits,
            "tag_keys": {str(stage): fixed(f"tag key {stage}").hex() for stage in (3, 5, 9)},
            "sharers": [0, 1, 2],
            "survivors": [0, 1],
        },
        "good": {name: one.hex() for name, one in good.items()},
        "bad": bad_messages(good),
    }


MAKERS = {
    "secagg_keystream": keystream_vectors,
    "secagg_shamir": shamir_vectors,
    "secagg_graph": graph_vectors,
    "secagg_derivations": derivation_vectors,
    "secagg_messages": message_vectors,
}


def stored(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", MAKERS)
def test_answers_are_the_known_ones(name: str) -> None:
    assert MAKERS[name]() == stored(name)


def test_stored_messages_are_taken_and_bad_ones_refused_with_their_error() -> None:
    known = stored("secagg_messages")
    read = decoders(Wire(PARAMS))
    assert known["good"].keys() == read.keys() == {case["message"] for case in known["bad"]}
    for name, message in known["good"].items():
        read[name](bytes.fromhex(message))
        assert bytes.fromhex(message)[4] == VERSION
    for case in known["bad"]:
        with pytest.raises(errors.ProtocolError) as caught:
            read[case["message"]](bytes.fromhex(case["bytes"]))
        assert caught.type.__name__ == case["error"], (case["message"], case["why"])


def test_stored_messages_hold_what_was_put_in() -> None:
    read, known = decoders(Wire(PARAMS)), stored("secagg_messages")["good"]
    got = {name: read[name](bytes.fromhex(message)) for name, message in known.items()}
    assert got["advertise"][0] == 0 and got["roster"][2] == (0, 1, 2) and list(got["roster"][3]) == [1, 2]
    assert list(got["share"][2]) == [1, 2] == list(got["shares"][2])
    assert bytes(got["masked"].frame.payload).hex() == "0000100000" + "ffff0f"
    assert got["survivors"][1] == (0, 1) and got["agree"][1:3] == ((0, 1, 2), (0, 1))
    assert list(got["agreement"][1]) == [0, 1] and list(got["unmask"][1]) == [0, 1, 2]


def test_stored_shares_reconstruct() -> None:
    known = stored("secagg_shamir")
    weights = [int(one, 16) for one in known["weights_of_first_three"]]
    shares = [int(one, 16) for one in known["shares"][:3]]
    assert combine(weights, shares) == int(known["coefficients"][0], 16)


def test_the_derivation_is_hkdf_over_a_msgpack_list() -> None:
    """The seed commitment again, from the two formulas of RFC 5869 and bytes written by hand."""
    known = stored("secagg_derivations")
    parts = [b"privfed secagg v2", PARAMS.round_id, PARAMS.config_digest, b"seed commitment", b"ann"]
    heads = [bytes([0xA0 + 17]), b"\xc4\x07", b"\xc4\x20", bytes([0xA0 + 15]), bytes([0xA0 + 3])]
    info = b"\x95" + b"".join(head + part for head, part in zip(heads, parts, strict=True))
    extracted = hmac.digest(bytes(32), bytes.fromhex(known["seed"]), "sha256")
    assert hmac.digest(extracted, info + b"\x01", "sha256").hex() == known["seed_commitment"]


def write() -> None:
    """Write all files anew."""
    VECTORS.mkdir(exist_ok=True)
    for name, make in MAKERS.items():
        text = json.dumps(make(), indent=2, ensure_ascii=False) + "\n"
        (VECTORS / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
