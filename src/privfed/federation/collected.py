"""What a round's exchange gives the server."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.types import EncodedSum

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a round's exchange gave the server.

    Attributes:
        single: The encoding of each survivor, where a rule needs them and nothing is masked.
        weights_T: By tensor, the sum of the weights of the survivors that trained it, where clients train different
            ones; else None.
    """

    total: EncodedSum | None
    survivors: tuple[str, ...]
    bytes_up: int
    bytes_down: int
    single: tuple[EncodedSum, ...] = ()
    weights_T: NDArray[np.float64] | None = field(default=None, repr=False)
