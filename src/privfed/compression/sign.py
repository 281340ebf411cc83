"""One bit a value: its sign; the server takes the majority, or the mean of the votes.

signSGD with majority vote (Bernstein et al. 2018, arXiv 1802.04434; 2019, arXiv 1810.05291); with error feedback
EF-signSGD (Karimireddy et al. 2019, arXiv 1901.09847), its scale being public and shared instead of each client's own.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.compression import CODECS, BaseCodec, CodecPlugin, CodecState, Properties, Ring, Wire
from privfed.compression.fixed_point import check_finite, least_ring
from privfed.compression.one_bit import signs, sum_of_signs
from privfed.rng import PrivateStream
from privfed.table import Table
from privfed.types import Encoded, EncodedSum, Float32


class SignConfig(Table):
    """Options.

    Attributes:
        magnitude: What a sign is worth: the size of the step in each value.
        vote: ``majority``: each value moves by ``magnitude`` the way most clients say. ``mean``: by the mean of their
            signs times it.
        error_feedback: Whether a client keeps what its signs left out and adds it to its next update.
    """

    name: Literal["sign"] = "sign"
    magnitude: float = Field(default=0.001, gt=0)
    vote: Literal["majority", "mean"] = "majority"
    error_feedback: bool = False


class Sign(BaseCodec):
    """Sends +1 or -1 for each value; zeros get a fair coin. Weights of clients do not reach the votes.

    ``l2_bound``: every value of a message counts +magnitude or -magnitude in the sum of votes, whatever the update was:
    the norm is magnitude * sqrt(D). The majority is taken of the (noised) sum.
    """

    name = "sign"

    def __init__(self, config: SignConfig, ring: Ring | None) -> None:
        self._config = config
        self._ring = ring
        self.properties = _declare(config, ring is not None)

    def l2_bound(self, bound: float, length: int) -> float:  # noqa: ARG002
        """Return the bound; see the class."""
        return float(self._config.magnitude * length**0.5)

    def encode(self, vector_D: Float32, stream: PrivateStream) -> Encoded:
        """Return the message.

        Raises:
            ClientError: If a value is not finite.
        """
        check_finite(vector_D)
        negative_D = vector_D < 0
        zeros = np.flatnonzero(vector_D == 0)
        if zeros.size:
            negative_D[zeros] = np.unpackbits(stream.raw(-(-zeros.size // 8)), count=zeros.size)
        return Encoded(
            values_M=signs(negative_D, self._ring),
            codec=self.name,
            num_bits=1 if self._ring is None else self._ring.bits,
            scale=self._config.magnitude,
            length=len(vector_D),
            l2_bound=None,
        )

    def wire(self, length: int) -> Wire:
        """Return D bits, or D values of the ring's size."""
        return Wire(values=length, num_bits=1 if self._ring is None else self._ring.bits, kind="integer")

    def linear_sum(self, encoded_sum: EncodedSum) -> NDArray[np.float64]:
        """Return the sum of the votes times the magnitude [D]."""
        return sum_of_signs(encoded_sum, self._ring) * encoded_sum.scale

    def expand(
        self,
        mean_M: NDArray[np.float64],
        state: CodecState,
        length: int,  # noqa: ARG002
    ) -> tuple[NDArray[np.float64], CodecState]:
        """Return the mean vote, or the majority (no move where it is a tie) [D]."""
        return (np.sign(mean_M) * self._config.magnitude if self._config.vote == "majority" else mean_M), state


def _declare(config: SignConfig, _masked: bool) -> Properties:
    return Properties(
        summable=True,
        shared_support=True,
        unbiased=False,
        linear=config.vote == "mean",
        stateful=config.error_feedback,
        scales=False,
    )


CODECS.register("sign")(
    CodecPlugin(
        config=SignConfig, build=Sign, declare=_declare, ring_bits=lambda _config, clients: least_ring(1, clients)
    )
)
