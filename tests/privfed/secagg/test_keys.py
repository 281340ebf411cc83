from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privfed.errors import ProtocolError
from privfed.secagg.keys import (
    agree,
    channel_key,
    check_public,
    commit_seed,
    generate_keys,
    load_private,
    pack,
    pairwise_mask_key,
    seal,
    self_mask_key,
    unseal,
)

SCOPE = (b"round", b"config")


def test_both_sides_derive_the_same_pairwise_key() -> None:
    a, b = generate_keys(SCOPE, "a"), generate_keys(SCOPE, "b")
    left, right = ("a", a.public.masking), ("b", b.public.masking)
    assert pairwise_mask_key(a.masking, SCOPE, left, right) == pairwise_mask_key(b.masking, SCOPE, right, left)


def test_every_key_depends_on_round_config_purpose_and_direction() -> None:
    a, b = generate_keys(SCOPE, "a"), generate_keys(SCOPE, "b")
    keys = set()
    for scope in (
        SCOPE,
        (b"round2", b"config"),
        (b"round", b"config2"),
        (b"roundconfig", b""),
        (b"", b"roundconfig"),
    ):
        keys |= {
            pairwise_mask_key(a.masking, scope, ("a", a.public.masking), ("b", b.public.masking)),
            channel_key(a.channel, scope, "a", "b", ("b", b.public.channel)),
            channel_key(a.channel, scope, "b", "a", ("b", b.public.channel)),
            self_mask_key(a.seed, scope, "a"),
            self_mask_key(a.seed, scope, "b"),
            commit_seed(a.seed, scope, "a"),
        }
    assert len(keys) == 5 * 6


def test_pack_tells_parts_apart() -> None:
    assert len({pack("ab", "c"), pack("a", "bc"), pack(b"ab", "c"), pack("abc"), pack("ab", "c", 1)}) == 5


def test_a_seal_opens_only_as_it_was_closed() -> None:
    key, text = bytes(32), b"shares"
    sealed = seal(key, text, b"ad")
    assert seal(key, text, b"ad") != sealed
    assert unseal(key, sealed, b"ad", "a") == text
    wrong = [(bytes([1]) * 32, sealed, b"ad"), (key, sealed, b"other")]
    wrong += [(key, sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :], b"ad") for i in range(len(sealed))]
    for case in wrong:
        with pytest.raises(ProtocolError, match="'a'"):
            unseal(*case, "a")


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), (2**255 - 19).to_bytes(32, "little")])
def test_degenerate_public_keys_are_refused(public: bytes) -> None:
    with pytest.raises(ProtocolError, match="'mallory'"):
        agree(X25519PrivateKey.generate(), public, "mallory")
    with pytest.raises(ProtocolError, match="degenerate"):
        check_public(public, "mallory")


def test_keys_are_fresh_and_hidden() -> None:
    one, two = generate_keys(SCOPE, "a"), generate_keys(SCOPE, "a")
    assert one.seed != two.seed and one.public != two.public
    assert load_private(one.masking.private_bytes_raw()).public_key().public_bytes_raw() == one.public.masking
    shown = repr(one)
    for secret in (one.seed, one.masking.private_bytes_raw(), one.channel.private_bytes_raw()):
        assert repr(secret) not in shown and secret.hex() not in shown
