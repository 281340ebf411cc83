"""Long-lived identities: the Ed25519 keys that a roster pins and that sign what a client stands for.

A signature covers a domain label, the session's whole context (round, configuration, cohort and parameters) and
the exact bytes of the message, so it is worth nothing in another round, stage or place.

Source: RFC 8032 (Ed25519); Bonawitz et al. 2017, section 6.2 (signed keys against an active server).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privfed.errors import AuthenticityError, StageError

PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64
_DOMAIN = b"privfed secagg v2 signature\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A client's signing key. Its public half goes into the roster, by a way the server cannot change."""

    private: Ed25519PrivateKey = field(repr=False)
    public: bytes
    _entered: set[bytes] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def generate(cls) -> Identity:
        """Return a new identity from the operating system's CSPRNG."""
        return cls._of(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """Return the identity that these 32 secret bytes stand for."""
        return cls._of(Ed25519PrivateKey.from_private_bytes(seed))

    def enter(self, context: bytes) -> None:
        """Take part in the session with this context, once: two sets of signatures under one would contradict.

        An identity that is loaded again has forgotten; so a round that is repeated has to get another round id.

        Raises:
            StageError: If this identity took part in it before.
        """
        if context in self._entered:
            raise StageError("This identity has taken part in this round before; repeat a round under a new round id.")
        self._entered.add(context)

    def sign(self, context: bytes, message: bytes) -> bytes:
        """Return the signature of ``message`` in the session with this context digest."""
        return self.private.sign(_DOMAIN + context + message)

    def __reduce__(self) -> NoReturn:
        raise TypeError("An identity is not pickled; store its seed where secrets are kept.")

    @classmethod
    def _of(cls, private: Ed25519PrivateKey) -> Identity:
        return cls(private=private, public=private.public_key().public_bytes_raw())


def check_signature(public: bytes, signature: bytes, context: bytes, message: bytes, *, who: str, what: str) -> None:
    """Refuse a message that the holder of ``public`` did not sign in this session.

    Raises:
        AuthenticityError: If the signature is another one; the text names ``who`` and ``what``.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _DOMAIN + context + message)
    except (InvalidSignature, ValueError) as error:
        raise AuthenticityError(
            f"The {what} of client {who!r} is not signed by the identity that the roster pins for it in this round."
        ) from error
