"""Keys of one round: X25519 agreement, HKDF-SHA256 derivation, AES-256-GCM sealing and tags.

Every derived key and every associated data starts with the round id and the configuration's digest (the
*scope*) and with what the key is for, so a key of one round, configuration or purpose is none of another's.
The parts are packed as a msgpack list, which no two different lists share. Every sealing and every tagging key is
derived from fresh keys for one message, so its nonce is fixed at zero and no (key, nonce) pair repeats.

Python cannot wipe memory: secrets are dropped as early as the protocol allows, and never shown in a repr.

Source: Bonawitz et al. 2017, section 3 and figure 4 (two key pairs a client); RFC 7748 (X25519), RFC 5869
(HKDF), NIST SP 800-38D (GCM, and GMAC for the tags). The seed commitment is this project's: it lets the server
notice a wrong self-mask seed, as it notices a wrong masking key.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from hmac import compare_digest

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privfed.errors import AuthenticityError, MessageError

KEY_BYTES = 32
TAG_BYTES = 16
"""Length of a tag, and how much longer a sealed text is than the text."""
LABEL = "privfed secagg v2"
_NONCE = bytes(12)

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


def derive(secret: bytes, scope: Scope, purpose: str, *parts: bytes | str | int) -> bytes:
    """Return 32 bytes derived from ``secret`` for one purpose (HKDF-SHA256, no salt)."""
    info = pack(LABEL, *scope, purpose, *parts)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def commit_seed(seed: bytes, scope: Scope, client_id: str) -> bytes:
    """Return a commitment to a self-mask seed; it tells nothing about the mask, which has another purpose."""
    return derive(seed, scope, "seed commitment", client_id)


def self_mask_key(seed: bytes, scope: Scope, client_id: str) -> bytes:
    """Return the keystream key of a client's self mask."""
    return derive(seed, scope, "self mask", client_id)


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
        MessageError: If the peer's public key is degenerate.
    """
    (low_id, low_key), (high_id, high_key) = sorted([own, peer])
    secret = agree(private, peer[1], peer[0])
    return derive(secret, scope, "pairwise mask", low_id, high_id, low_key, high_key)


def sealing_key(shared: bytes, scope: Scope, src: str, dst: str) -> bytes:
    """Return the key that seals the shares which ``src`` sends ``dst``, from the secret of their channel keys."""
    return derive(shared, scope, "seal", src, dst)


def confirmation(shared: bytes, scope: Scope, src: str, dst: str, sharers: bytes) -> bytes:
    """Return the tag by which ``src`` tells ``dst`` against which clients it masked.

    Args:
        shared: The secret of their channel keys.
        scope: Round id and configuration digest.
        src: Who masked.
        dst: Who will check.
        sharers: The clients that shared, as ``src`` was told: a bitmap of the cohort.
    """
    return derive(shared, scope, "confirmation", src, dst, sharers)[:TAG_BYTES]


def message_key(shared: bytes, scope: Scope, client_id: str, stage: int) -> bytes:
    """Return the key that tags one client's message of one stage for the server, from their shared secret."""
    return derive(shared, scope, "message", client_id, stage)


def agree(private: X25519PrivateKey, peer_public: bytes, peer_id: str) -> bytes:
    """Return the X25519 shared secret.

    Raises:
        MessageError: If the peer's public key has small order, so the secret would be known to everyone.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(peer_public))
    except ValueError as error:
        raise MessageError(f"Client {peer_id!r} advertised a degenerate public key; leave it out.") from error


def seal(key: bytes, text: bytes, associated: bytes) -> bytes:
    """Return ``text`` encrypted and authenticated with AES-256-GCM under a key that seals nothing else."""
    return AESGCM(key).encrypt(_NONCE, text, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes, src: str) -> bytes:
    """Return the text that ``seal`` was given.

    Raises:
        AuthenticityError: If the key, the text or the associated data is not the sender's; the message names
            ``src``.
    """
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, associated)
    except InvalidTag as error:
        raise AuthenticityError(f"The shares from client {src!r} are not authentic; nothing was sent.") from error


def tag(key: bytes, *parts: bytes | memoryview) -> bytes:
    """Return the tag of ``parts``, put together, (AES-256-GMAC) under a key that tags nothing else."""
    mac = Cipher(algorithms.AES(key), modes.GCM(_NONCE)).encryptor()
    for part in parts:
        mac.authenticate_additional_data(part)
    mac.finalize()
    return mac.tag


def same(left: bytes, right: bytes) -> bool:
    """Return whether two tags or commitments are equal, in a time that does not depend on where they differ."""
    return compare_digest(left, right)
