"""Ed25519 signatures of receipts: who stands for one, checked offline.

What is signed is the receipt without its signature as canonical JSON: keys sorted, no white space, UTF-8. The file
itself must be byte for byte what privfed writes for that content, so that no byte of it can be changed unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from privfed.errors import ConfigError

SIGNATURE = "signature"
ALGORITHM = "ed25519"
_CONTEXT = b"privfed receipt 1\n"


def canonical(receipt: Mapping[str, Any]) -> bytes:
    """Return the bytes that a signature is over."""
    content = {key: value for key, value in receipt.items() if key != SIGNATURE}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return _CONTEXT + text.encode("utf-8", errors="replace")


def make_key(path: Path) -> Path:
    """Write a new private key to ``path``, for its owner only, and its public half beside it; return the latter.

    Raises:
        ConfigError: If there is a file, or it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = path.with_name(f"{path.name}.pub")
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(private)
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    except FileExistsError:
        raise ConfigError(f"There is a key at {path} already: sign with it, or name another file.") from None
    except OSError as error:
        raise ConfigError(f"The key cannot be written to {path}: {error}.") from error
    return public


def signed(receipt: Mapping[str, Any], key_path: Path) -> dict[str, Any]:
    """Return the receipt with a signature; one that it had is replaced.

    Raises:
        ConfigError: If the file is not an Ed25519 private key without a password.
    """
    key = _private(key_path)
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    value = key.sign(canonical(receipt))
    content = {name: field for name, field in receipt.items() if name != SIGNATURE}
    return {**content, SIGNATURE: {"algorithm": ALGORITHM, "public_key": public.hex(), "value": value.hex()}}


def unsigned(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the receipt without a signature."""
    return {name: field for name, field in receipt.items() if name != SIGNATURE}


def problem_of(receipt: Mapping[str, Any], key_path: Path | None = None) -> str | None:
    """Return what is wrong with a receipt's signature in a sentence, or None.

    Args:
        receipt: The receipt.
        key_path: The public (or private) key of whoever should have signed it; None: whoever did.

    Raises:
        ConfigError: If the key file is no key.
    """
    entry = receipt.get(SIGNATURE)
    if entry is None:
        return "The receipt is not signed: sign it with `privfed report RUN --sign KEYFILE`."
    if not isinstance(entry, dict) or set(entry) != {"algorithm", "public_key", "value"}:
        return "The receipt's signature is garbled: it needs algorithm, public_key and value, and nothing else."
    if entry["algorithm"] != ALGORITHM:
        return f"The receipt's signature is of the algorithm {entry['algorithm']!r}, expected {ALGORITHM!r}."
    try:
        raw, value = _hex(entry["public_key"]), _hex(entry["value"])
        Ed25519PublicKey.from_public_bytes(raw).verify(value, canonical(receipt))
    except (ValueError, TypeError) as error:
        return f"The receipt's signature is garbled: {error}."
    except InvalidSignature:
        return "The receipt's signature does not fit its content: one of the two was changed after signing."
    if key_path is not None and _public(key_path) != raw:
        return f"The receipt is signed by the key {fingerprint(receipt)}, not by the one in {key_path}."
    return None


def fingerprint(receipt: Mapping[str, Any]) -> str | None:
    """Return the first 16 hexadecimal digits of the SHA-256 of the public key that signed, or None without one."""
    entry = receipt.get(SIGNATURE)
    if not isinstance(entry, dict):
        return None
    try:
        return hashlib.sha256(_hex(entry.get("public_key"))).hexdigest()[:16]
    except (ValueError, TypeError):
        return None


def _hex(text: Any) -> bytes:
    """Return the bytes of lower-case hexadecimal digits; no other spelling, so that each value has one."""
    found = bytes.fromhex(text)
    if found.hex() != text:
        raise ValueError("expected lower-case hexadecimal digits")
    return found


def _private(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no key {path}: make one with --new-key, or name the file that holds yours."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a private key without a password ({error}): make one with --new-key."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key: make one with --new-key.")
    return key


def _public(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if b"PRIVATE" in data:
            return _private(path).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        key = load_pem_public_key(data)
    except FileNotFoundError:
        raise ConfigError(f"There is no key {path}: pass the .pub file that the signer gave you.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a public key in PEM format: {error}.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is not an Ed25519 key.")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)
