"""The values that flow between the stages of a round; all frozen, slotted and keyword-only.

Shape suffixes: D trained parameters, M encoded values, N examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Task = Literal["sequence_classification", "causal_lm", "image_classification"]
Unit = Literal["example", "client"]
Relation = Literal["add_or_remove_one", "replace_one"]
View = Literal["individual", "aggregate", "release"]
VIEWS: tuple[View, ...] = ("individual", "aggregate", "release")
Float32 = NDArray[np.float32]
EVERYONE = "*"
"""The client of a charge that falls on all clients alike."""
SCORES = "scores"
"""Last part of the name of a trained tensor that holds the log-odds of a random mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamLayout:
    """How trained tensors lie in one flat float32 vector: names and shapes in order, and their digest."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    digest: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        return tuple(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    @property
    def size(self) -> int:
        """D, the length of the flat vector."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One client's data: row numbers of the training split."""

    client_id: str
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyEvent:
    """What happened to the data, never an epsilon: at most ``steps`` Poisson-sampled Gaussian mechanisms.

    Attributes:
        unit: What one neighbouring data set adds or removes.
        mechanism: What was done: ``"gaussian"``, or a mechanism that so many Gaussian ones dominate.
        noise_multiplier: Standard deviation of the noise over the L2 sensitivity.
        sampling_probability: Probability with which each unit takes part in a step; 1 means all do.
        steps: How often the mechanism ran.
        relation: The neighbouring relation that the noise multiplier is stated for.
        parameters: What the mechanism did besides, by name and sorted: the noise multiplier follows from it.
    """

    unit: Unit
    mechanism: str = "gaussian"
    noise_multiplier: float
    sampling_probability: float
    steps: int
    relation: Relation = "add_or_remove_one"
    parameters: tuple[tuple[str, float | tuple[float, ...]], ...] = ()

    def one_step(self) -> PrivacyEvent:
        """Return one step of this event."""
        return replace(self, steps=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """A client's local result before encoding.

    Attributes:
        delta_D: New minus old parameters, flat.
        l2_bound: A bound on the L2 norm of ``delta_D`` that holds by construction, or None.
        weight: The client's aggregation weight.
    """

    client_id: str
    delta_D: Float32 = field(repr=False)
    layout_digest: str
    l2_bound: float | None
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A codec's output for one vector.

    Attributes:
        values_M: Unsigned integers below 2^num_bits (uint32), or floats for a codec that sends them: float32 (with
            num_bits = 16 they are exact in bfloat16) or float16.
        num_bits: Bits of a value on the wire.
        scale: What one integer step is worth; 1 for floats. Shared by all clients where the codec is summable.
        length: D, the length of the vector that was encoded.
        saturated: How many values lay outside the codec's range and were cut to it.
        indices_M: For a sparse message, where in the vector its values lie, ascending; else None.
    """

    values_M: NDArray[np.uint32] | Float32 | NDArray[np.float16] = field(repr=False)
    codec: str
    num_bits: int
    scale: float
    length: int
    l2_bound: float | None
    saturated: int = 0
    indices_M: NDArray[np.int64] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSum:
    """The sum of the survivors' encodings: all that the server learns under secure aggregation.

    Attributes:
        sum_M: Sums as uint64 (residues of the ring), int64 (integers added without a ring) or float64.
    """

    sum_M: NDArray[np.uint64] | NDArray[np.int64] | NDArray[np.float64] = field(repr=False)
    codec: str
    scale: float
    length: int
    survivors: int
    total_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """The decoded sum of weighted updates, with what the server needs to average it."""

    sum_D: NDArray[np.float64] = field(repr=False)
    survivors: int
    total_weight: float
