from __future__ import annotations

import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privfed.errors import AuthenticityError, MessageError
from privfed.secagg.identity import Identity, check_signature
from privfed.secagg.keys import (
    agree,
    commit_seed,
    confirmation,
    generate_keys,
    load_private,
    message_key,
    pack,
    pairwise_mask_key,
    seal,
    sealing_key,
    self_mask_key,
    tag,
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
            sealing_key(bytes(32), scope, "a", "b"),
            sealing_key(bytes(32), scope, "b", "a"),
            message_key(bytes(32), scope, "a", 3),
            message_key(bytes(32), scope, "a", 5),
            confirmation(bytes(32), scope, "a", "b", b"1"),
            confirmation(bytes(32), scope, "b", "a", b"1"),
            confirmation(bytes(32), scope, "a", "b", b"2"),
            self_mask_key(a.seed, scope, "a"),
            self_mask_key(a.seed, scope, "b"),
            commit_seed(a.seed, scope, "a"),
        }
    assert len(keys) == 5 * 11


def test_pack_tells_parts_apart() -> None:
    assert len({pack("ab", "c"), pack("a", "bc"), pack(b"ab", "c"), pack("abc"), pack("ab", "c", 1)}) == 5


def test_a_seal_opens_only_as_it_was_closed() -> None:
    key, text = bytes(32), b"shares"
    sealed = seal(key, text, b"ad")
    assert seal(bytes([1]) * 32, text, b"ad") != sealed
    assert unseal(key, sealed, b"ad", "a") == text
    wrong = [(bytes([1]) * 32, sealed, b"ad"), (key, sealed, b"other")]
    wrong += [(key, sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :], b"ad") for i in range(len(sealed))]
    for case in wrong:
        with pytest.raises(AuthenticityError, match="'a'"):
            unseal(*case, "a")


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), (2**255 - 19).to_bytes(32, "little")])
def test_degenerate_public_keys_are_refused(public: bytes) -> None:
    with pytest.raises(MessageError, match="'mallory' advertised a degenerate"):
        agree(X25519PrivateKey.generate(), public, "mallory")


def test_a_signature_is_worth_nothing_elsewhere() -> None:
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign(b"context", b"message")

    def check(public: bytes, signed: bytes, context: bytes, message: bytes) -> None:
        check_signature(public, signed, context, message, who="a", what="key")

    check(one.public, signature, b"context", b"message")
    flipped = [signature[:i] + bytes([signature[i] ^ 1]) + signature[i + 1 :] for i in range(64)]
    for bad in (
        (other.public, signature, b"context", b"message"),
        (one.public, signature, b"contexu", b"message"),
        (one.public, signature, b"context", b"messagf"),
        (one.public, b"", b"context", b"message"),
        (b"\xff" * 32, signature, b"context", b"message"),
        *((one.public, each, b"context", b"message") for each in flipped),
    ):
        with pytest.raises(AuthenticityError, match="key of client 'a'"):
            check(*bad)


def test_an_identity_is_its_seed_and_shows_and_pickles_nothing() -> None:
    one = Identity.from_seed(b"s" * 32)
    assert one.public == Identity.from_seed(b"s" * 32).public != Identity.generate().public
    assert "ssss" not in repr(one) and "Ed25519PrivateKey" not in repr(one)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(one)


def test_a_tag_covers_every_byte_and_does_not_care_how_they_are_cut() -> None:
    key, text = b"k" * 32, b"some message"
    assert tag(key, text) == tag(key, text[:5], memoryview(text)[5:])
    others = {tag(key, text[:i] + bytes([text[i] ^ 1]) + text[i + 1 :]) for i in range(len(text))}
    assert tag(key, text) not in others and len(others) == len(text)
    assert tag(b"l" * 32, text) != tag(key, text)


def test_keys_are_fresh_and_hidden() -> None:
    one, two = generate_keys(SCOPE, "a"), generate_keys(SCOPE, "a")
    assert one.seed != two.seed and one.public != two.public
    assert load_private(one.masking.private_bytes_raw()).public_key().public_bytes_raw() == one.public.masking
    shown = repr(one)
    for secret in (one.seed, one.masking.private_bytes_raw(), one.channel.private_bytes_raw()):
        assert repr(secret) not in shown and secret.hex() not in shown
