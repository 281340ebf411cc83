"""What a masked message of a round holds: the encoded values, and behind them the weights that travel masked.

Client and server work out the same description by themselves, whichever engine carries the messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError, ProtocolError
from privfed.federation.collected import Collected, Flags
from privfed.secagg import Requirements, SessionParams
from privfed.types import Encoded, EncodedSum

# weights travel as integers of this resolution beside the values, so that their sum is masked too
WEIGHT_STEPS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """The masked messages of one round.

    Attributes:
        clients: At most so many of them are added.
        ring_bits: Size of the ring.
        codec: Name of the codec.
        length: D, the number of values that each client gave to the codec.
        values: The number of values that it made of them.
        weighted: Whether a masked weight travels beside the values.
        tensors: T, the number of tensors, where clients train different ones: then a masked weight of each travels, 0
            for one that the client did not train. Else 0.

    Raises:
        ConfigError: If the ring cannot sum the weights of so many clients.
    """

    clients: int
    ring_bits: int
    codec: str
    length: int
    values: int
    weighted: bool
    tensors: int = 0

    def __post_init__(self) -> None:
        self._digits()

    @property
    def weights(self) -> int:
        """How many weights travel behind the values."""
        return self.tensors or int(self.weighted)

    def params(
        self, roster: Mapping[str, bytes], requirements: Requirements, *, round_id: bytes, config_digest: bytes
    ) -> SessionParams:
        """Return the parameters of a session of these clients.

        Args:
            roster: The cohort's pinned identities: client to Ed25519 public key.
            requirements: What the session has to stand.
            round_id: Unique for the round; bound into every message.
            config_digest: Bound into every message.

        Raises:
            ConfigError: If no session of this cohort meets the requirements.
        """
        digits = self._digits()
        return SessionParams.plan(
            roster,
            requirements,
            round_id=round_id,
            config_digest=config_digest,
            length=self.values + (self.weights * digits.count if digits else 0),
            ring_bits=self.ring_bits,
        )

    def vector(self, encoded: Encoded, weight: float, trained_T: Flags | None = None) -> NDArray[np.uint32]:
        """Return what a client masks: its values, then the digits of its weights.

        Raises:
            ProtocolError: If ``trained_T`` is not of as many tensors as there are.
        """
        if (0 if trained_T is None else len(trained_T)) != self.tensors:
            raise ProtocolError(f"Got which tensors were trained as {trained_T!r}, expected {self.tensors} of them.")
        values_M: NDArray[np.uint32] = encoded.values_M.astype(np.uint32, copy=False)
        digits = self._digits()
        if digits is None:
            return values_M
        weights = weight * (np.ones(1) if trained_T is None else trained_T)
        return np.concatenate([values_M, *map(digits.split, weights)])

    def collected(
        self, sum_M: NDArray[np.uint32], names: tuple[str, ...], *, scale: float, bytes_up: int, bytes_down: int
    ) -> Collected:
        """Return what an unmasked sum over ``names`` stands for."""
        weight, weights_T = float(len(names)), None
        digits = self._digits()
        if digits is not None:
            found = np.array([digits.join(each) for each in np.split(sum_M[self.values :], self.weights)])
            sum_M = sum_M[: self.values]
            weight, weights_T = (weight, found) if self.tensors else (float(found[0]), None)
        total = EncodedSum(
            sum_M=sum_M.astype(np.uint64),
            codec=self.codec,
            scale=scale,
            length=self.length,
            survivors=len(names),
            total_weight=weight,
        )
        return Collected(total=total, survivors=names, bytes_up=bytes_up, bytes_down=bytes_down, weights_T=weights_T)

    def _digits(self) -> _WeightDigits | None:
        if not self.weights:
            return None
        return _WeightDigits(self.clients, self.ring_bits, WEIGHT_STEPS if self.weighted else 1)


def weight_values(clients: int, ring_bits: int) -> int:
    """Return how many values of the ring a masked weight takes.

    Raises:
        ConfigError: If the ring is too small for the weights of so many clients.
    """
    return _WeightDigits(clients, ring_bits, WEIGHT_STEPS).count


class _WeightDigits:
    """A weight as values of the ring: digits so short that those of all clients add up without wrapping.

    Args:
        clients: At most so many weights are added.
        ring_bits: Size of the ring.
        steps: A weight of at most 1 is a multiple of 1 / steps; 1 for weights that only say whether a client counts.
    """

    def __init__(self, clients: int, ring_bits: int, steps: int) -> None:
        self._steps = steps
        self._bits = ring_bits - clients.bit_length()
        if self._bits < 1:
            raise ConfigError(
                f"A ring of {ring_bits} bits cannot sum the weights of {clients} clients: raise ring_bits."
            )
        self.count = -(-steps.bit_length() // self._bits)

    def split(self, weight: float) -> NDArray[np.uint32]:
        """Return a weight of at most 1 as digits, the lowest first."""
        steps, low = round(weight * self._steps), (1 << self._bits) - 1
        return np.array([steps >> (place * self._bits) & low for place in range(self.count)], dtype=np.uint32)

    def join(self, sums: NDArray[np.uint32]) -> float:
        """Return the sum of the weights from the sums of their digits."""
        return sum(int(digit) << (place * self._bits) for place, digit in enumerate(sums)) / self._steps
