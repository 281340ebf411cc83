"""Keys of one round: X25519 agreement, HKDF-SHA256 derivation and AES-256-GCM sealing.

Every derived key and every associated data starts with the round id and the configuration's digest (the
*scope*) and with what the key is for, so a key of one round, configuration or purpose is none of another's.
The parts are packed as a msgpack list, which no two different lists share.

Python cannot wipe memory: secrets are dropped as early as the protocol allows, and never shown in a repr.

Source: Bonawitz et al. 2017, section 3 and figure 4 (two key pairs a client); RFC 7748 (X25519), RFC 5869
(HKDF), NIST SP 800-38D (GCM). The seed commitment and the tag are this project's: they let the server
notice a wrong self-mask seed, as it notices a wrong masking key, and an altered masked vector.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privfed.errors import ProtocolError

KEY_BYTES = 32
NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16
"""How much longer a sealed text is than the text: nonce and tag."""
LABEL = "privfed secagg v1"

Scope = tuple[bytes, bytes]
"""Round id and configuration digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKeys:
    """What a client advertises: two X25519 public keys and a commitment to its self-mask seed."""

    masking: bytes
    channel: bytes
    seed_commitment: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientKeys:
    """A client's secrets of one round, and what it advertises of them.

    Attributes:
        masking: Agrees on pairwise masks; shared among the cohort so that a dropped client's masks can be
            removed.
        channel: Agrees on the keys that seal the shares; never shared.
        seed: Expands to the self mask; shared among the cohort.
    """

    masking: X25519PrivateKey = field(repr=False)
    channel: X25519PrivateKey = field(repr=False)
    seed: bytes = field(repr=False)
    public: PublicKeys


def generate_keys(scope: Scope, client_id: str) -> ClientKeys:
    """Return fresh keys for one client and one round, drawn from the operating system's CSPRNG."""
    masking, channel = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    seed = secrets.token_bytes(KEY_BYTES)
    public = PublicKeys(
        masking=masking.public_key().public_bytes_raw(),
        channel=channel.public_key().public_bytes_raw(),
        seed_commitment=commit_seed(seed, scope, client_id),
    )
    return ClientKeys(masking=masking, channel=channel, seed=seed, public=public)


def load_private(raw: bytes) -> X25519PrivateKey:
    """Return the private key with these 32 bytes."""
    return X25519PrivateKey.from_private_bytes(raw)


def pack(*parts: bytes | str | int) -> bytes:
    """Return ``parts`` as one byte string from which they can be told apart again."""
    return bytes(msgpack.packb(list(parts), use_bin_type=True))


def derive(secret: bytes, scope: Scope, purpose: str, *parts: bytes | str) -> bytes:
    """Return 32 bytes derived from ``secret`` for one purpose (HKDF-SHA256, no salt)."""
    info = pack(LABEL, *scope, purpose, *parts)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def commit_seed(seed: bytes, scope: Scope, client_id: str) -> bytes:
    """Return a commitment to a self-mask seed; it tells nothing about the mask, which has another purpose."""
    return derive(seed, scope, "seed commitment", client_id)


def self_mask_key(seed: bytes, scope: Scope, client_id: str) -> bytes:
    """Return the keystream key of a client's self mask."""
    return derive(seed, scope, "self mask", client_id)


def masked_tag(seed: bytes, scope: Scope, client_id: str, sharers: bytes, vector: bytes) -> bytes:
    """Return a client's tag on its masked vector, which the server can check once it has the client's seed.

    Args:
        seed: The client's self-mask seed.
        scope: Round id and configuration digest.
        client_id: The client.
        sharers: Digest of the clients it masked against.
        vector: Digest of the masked vector.
    """
    return derive(seed, scope, "masked tag", client_id, sharers, vector)


def pairwise_mask_key(
    private: X25519PrivateKey, scope: Scope, own: tuple[str, bytes], peer: tuple[str, bytes]
) -> bytes:
    """Return the keystream key that two clients share; the same from both sides.

    Args:
        private: One side's private masking key.
        scope: Round id and configuration digest.
        own: Id and public masking key of that side.
        peer: Id and public masking key of the other side.

    Raises:
        ProtocolError: If the peer's public key is degenerate.
    """
    (low_id, low_key), (high_id, high_key) = sorted([own, peer])
    secret = agree(private, peer[1], peer[0])
    return derive(secret, scope, "pairwise mask", low_id, high_id, low_key, high_key)


def channel_key(private: X25519PrivateKey, scope: Scope, src: str, dst: str, peer: tuple[str, bytes]) -> bytes:
    """Return the key that seals what ``src`` sends ``dst``; each direction has its own.

    Raises:
        ProtocolError: If the peer's public key is degenerate.
    """
    return derive(agree(private, peer[1], peer[0]), scope, "channel", src, dst)


def agree(private: X25519PrivateKey, peer_public: bytes, peer_id: str) -> bytes:
    """Return the X25519 shared secret.

    Raises:
        ProtocolError: If the peer's public key has small order, so the secret would be known to everyone.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(peer_public))
    except ValueError as error:
        raise ProtocolError(f"Client {peer_id!r} advertised a degenerate public key; leave it out.") from error


def check_public(public: bytes, client_id: str) -> None:
    """Refuse a public key of small order before anyone else meets it.

    Raises:
        ProtocolError: If agreeing with the key would give a secret that everyone knows.
    """
    agree(X25519PrivateKey.generate(), public, client_id)


def seal(key: bytes, text: bytes, associated: bytes) -> bytes:
    """Return a random nonce followed by ``text`` encrypted and authenticated with AES-256-GCM."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, text, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes, src: str) -> bytes:
    """Return the text that ``seal`` was given.

    Raises:
        ProtocolError: If the key, the text or the associated data is not the sender's; the message names
            ``src``.
    """
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except InvalidTag as error:
        raise ProtocolError(
            f"The shares from client {src!r} are not authentic, or it saw another roster; nothing was sent."
        ) from error
