"""Known answers for every derivation and message, so that a change of the wire is never an accident.

``python tests/privfed/secagg/test_vectors.py`` writes the files anew; do that only together with a new
version number in the header or a new label in the derivations.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.secagg import SessionParams
from privfed.secagg import keys as k
from privfed.secagg.keystream import apply_masks
from privfed.secagg.shamir import PRIME, combine, evaluate, lagrange_weights
from privfed.secagg.wire import Reveal, Wire, ids_digest, roster_digest, vector_digest

VECTORS = Path(__file__).parents[2] / "vectors"
PARAMS = SessionParams(
    round_id=b"round-7", config_digest=bytes(range(32)), clients=("ann", "bob", "zoë"), threshold=2, length=3
)


def fixed(name: str, size: int = 32) -> bytes:
    """Return bytes that depend on the name only; never used outside this file."""
    return hashlib.shake_256(name.encode()).digest(size)


def keystream_vectors() -> dict[str, Any]:
    cases = []
    for length in (0, 1, 5, 17):
        values = np.arange(length, dtype=np.uint32)
        apply_masks(values, [fixed("plus")], [fixed("minus")])
        cases.append({"length": length, "masked": values.tolist()})
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


def derivation_vectors() -> dict[str, Any]:
    scope = PARAMS.scope
    ann, bob, seed = k.load_private(fixed("ann")), k.load_private(fixed("bob")), fixed("seed")
    publics = {name: key.public_key().public_bytes_raw() for name, key in (("ann", ann), ("bob", bob))}
    pairs = list(publics.items())
    return {
        "ann": fixed("ann").hex(),
        "bob": fixed("bob").hex(),
        "seed": seed.hex(),
        "ann_public": publics["ann"].hex(),
        "bob_public": publics["bob"].hex(),
        "pairwise_mask_key": k.pairwise_mask_key(ann, scope, pairs[0], pairs[1]).hex(),
        "channel_key_ann_to_bob": k.channel_key(ann, scope, "ann", "bob", pairs[1]).hex(),
        "channel_key_bob_to_ann": k.channel_key(ann, scope, "bob", "ann", pairs[1]).hex(),
        "self_mask_key": k.self_mask_key(seed, scope, "ann").hex(),
        "seed_commitment": k.commit_seed(seed, scope, "ann").hex(),
        "masked_tag": k.masked_tag(seed, scope, "ann", fixed("sharers"), fixed("vector")).hex(),
    }


def message_vectors() -> dict[str, Any]:
    wire = Wire(PARAMS)
    roster = {
        name: k.PublicKeys(
            masking=fixed(f"{name} masking"),
            channel=fixed(f"{name} channel"),
            seed_commitment=fixed(f"{name} seed"),
        )
        for name in PARAMS.clients
    }
    sealed = {name: fixed(f"sealed {name}", 94) for name in ("bob", "zoë")}
    masked_M = np.array([0, 1, 2**32 - 1], dtype=np.uint32)
    reveal = Reveal(
        seed_shares={name: fixed(f"share {name}", 32) + b"\0" for name in ("ann", "bob")},
        key_shares={"zoë": bytes(32) + b"\1"},
    )
    messages = {
        "advertise": wire.encode_advertise("ann", roster["ann"]),
        "roster": wire.encode_roster(roster),
        "share": wire.encode_share("ann", roster_digest(roster), sealed),
        "shares": wire.encode_shares("ann", sealed),
        "masked": wire.encode_masked("ann", ids_digest(PARAMS.clients), fixed("tag"), masked_M),
        "survivors": wire.encode_survivors(["ann", "bob"]),
        "unmask": wire.encode_unmask("ann", reveal),
    }
    return {"vector_digest": vector_digest(masked_M).hex()} | {name: one.hex() for name, one in messages.items()}


MAKERS = {
    "secagg_keystream": keystream_vectors,
    "secagg_shamir": shamir_vectors,
    "secagg_derivations": derivation_vectors,
    "secagg_messages": message_vectors,
}


def stored(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", MAKERS)
def test_answers_are_the_known_ones(name: str) -> None:
    assert MAKERS[name]() == stored(name)


def test_stored_messages_decode() -> None:
    wire, messages = (
        Wire(PARAMS),
        {name: bytes.fromhex(one) for name, one in stored("secagg_messages").items()},
    )
    assert wire.decode_advertise(messages["advertise"])[0] == "ann"
    assert list(wire.decode_roster(messages["roster"])) == ["ann", "bob", "zoë"]
    assert list(wire.decode_share(messages["share"])[2]) == ["bob", "zoë"]
    assert wire.decode_shares(messages["shares"])[0] == "ann"
    assert wire.decode_masked(messages["masked"])[3].tolist() == [0, 1, 2**32 - 1]
    assert wire.decode_survivors(messages["survivors"]) == ("ann", "bob")
    assert list(wire.decode_unmask(messages["unmask"])[1].key_shares) == ["zoë"]


def test_stored_shares_reconstruct() -> None:
    known = stored("secagg_shamir")
    weights = [int(one, 16) for one in known["weights_of_first_three"]]
    shares = [int(one, 16) for one in known["shares"][:3]]
    assert combine(weights, shares) == int(known["coefficients"][0], 16)


def test_the_derivation_is_hkdf_over_a_msgpack_list() -> None:
    """The seed commitment again, from the two formulas of RFC 5869 and bytes written by hand."""
    known = stored("secagg_derivations")
    parts = [b"privfed secagg v1", PARAMS.round_id, PARAMS.config_digest, b"seed commitment", b"ann"]
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
