"""Explicit random streams, of two kinds that never mix.

*Experiment* streams (initialisation, partition, cohort order) derive from the run's seed by name and are meant
to be repeated. *Private* streams (privacy noise, Poisson sampling of examples, stochastic rounding) are AES-256
in counter mode under a 32-byte key drawn from the operating system, kept by the data holder, and never from the
experiment's seed; ``reproducible_key`` is the one exception, for runs whose receipt says *not private*.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEY_BYTES = 32
_BLOCK_BYTES = 128 * 1024
_ZEROS = memoryview(bytes(_BLOCK_BYTES))
_SLACK_BYTES = 15  # older releases of the library ask for a buffer one cipher block longer than the data


def experiment_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the stream called ``names`` of the run seeded by ``seed``."""
    text = "/".join(["privfed", str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def experiment_rng(seed: int, *names: str | int) -> np.random.Generator:
    """Return the experiment stream called ``names``; equal arguments give equal streams."""
    return np.random.Generator(np.random.PCG64(experiment_seed(seed, *names)))


def secret_key() -> bytes:
    """Return a fresh 32-byte key from the operating system's CSPRNG."""
    return secrets.token_bytes(KEY_BYTES)


def reproducible_key(seed: int) -> bytes:
    """Return a key that anyone who knows ``seed`` can compute: noise drawn under it protects nobody."""
    return hashlib.sha256(f"privfed reproducible noise, not private/{seed}".encode()).digest()


class PrivateStream:
    """A cryptographic random stream under ``key``, separated by name.

    Streams with different names are independent under the pseudorandomness of HMAC-SHA256 and AES-256. The same
    key and names give the same stream, so work that a crash interrupted is repeated to the same bits and releases
    nothing new. Callers therefore put *everything the computation depends on* (round, client, digest of the
    inputs) into the names: a different input must never meet the same noise.

    Args:
        key: 32 secret bytes.
        names: What the stream is for.

    Raises:
        ValueError: If the key does not have 32 bytes.
    """

    def __init__(self, key: bytes, *names: str | int) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}.")
        label = "\x1f".join(map(str, names)).encode()
        subkey = hmac.new(key, label, hashlib.sha256).digest()
        self._encryptor = Cipher(algorithms.AES(subkey), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "PrivateStream(<secret>)"

    def bytes(self, count: int) -> bytes:
        """Return the next ``count`` bytes of the stream."""
        return self._encryptor.update(bytes(count))

    def raw(self, count: int) -> NDArray[np.uint8]:
        """Return the next ``count`` bytes of the stream as a fresh array; the bytes are those of ``bytes(count)``.

        Several times as fast as ``bytes``: the cipher writes straight into the array.
        """
        words = np.empty(count + _SLACK_BYTES, dtype=np.uint8)
        target = words.data
        for start in range(0, count, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, count - start)
            self._encryptor.update_into(_ZEROS[:size], target[start:])
        return words[:count]

    def uniform(self, count: int) -> np.ndarray:
        """Return ``count`` float64 values, uniform on the open interval (0, 1), 52 random bits each."""
        raw = np.frombuffer(self.bytes(8 * count), dtype=np.uint64)
        return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        """Return ``count`` independent booleans, each true with ``probability`` (to within 2^-53)."""
        return self.uniform(count) < probability

    def generator(self) -> np.random.Generator:
        """Return a numpy generator whose bits are this stream's key stream (for permutations and the like)."""
        return np.random.Generator(np.random.PCG64(int.from_bytes(self.bytes(32), "little")))
