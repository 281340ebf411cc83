"""Examples whose gradient is given: canaries for audits, planted behind the ordinary ones.

The loss of such an example is linear in the trained values, so autograd gives the gradient: a multiple of one value,
or of a random direction over all of them. From there on it is an example like any other: it is sampled, clipped, added
up and noised by the code that trains. Its norm is ``BEYOND`` times the clip, so that after clipping it is the clip
exactly, and without clipping it stands out.

Shape suffixes: M planted examples, B examples of a microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privfed.errors import ModelError
from privfed.privacy.per_example import flat_gradients
from privfed.tuning.layout import layout_of, trained
from privfed.types import Float32, ParamLayout

if TYPE_CHECKING:
    from privfed.models.examples import Examples, Rows

BEYOND = 10.0
"""The norm of a given gradient, in multiples of the clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenGradients:
    """Gradients with one value that is not 0.

    Attributes:
        tensors_M: The number of the trained tensor that the value is in.
        places_M: Where it is in that tensor, flat.
        values_M: What it is.
        flat_M: Where it is among all trained values.
    """

    tensors_M: NDArray[np.int64] = field(repr=False)
    places_M: NDArray[np.int64] = field(repr=False)
    values_M: NDArray[np.float32] = field(repr=False)
    flat_M: NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.flat_M)

    def loss(self, tensors: Sequence[torch.Tensor], number: int) -> torch.Tensor:
        """Return the loss of one example."""
        value: torch.Tensor = tensors[self.tensors_M[number]].reshape(-1)[int(self.places_M[number])]
        return value * float(self.values_M[number])

    def components(
        self, vector_D: NDArray[np.floating[Any]], rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        """Return a vector's component along each gradient, or along those of ``rows`` [M]."""
        chosen = slice(None) if rows is None else rows
        return np.asarray(vector_D[self.flat_M[chosen]] * np.sign(self.values_M[chosen]), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomDirections:
    """Gradients along random unit vectors over all trained values, made anew from their seeds each time.

    Two of them are nearly orthogonal: their product has a standard deviation of 1 / sqrt(D) (Andrew et al. 2024,
    "One-shot Empirical Privacy Estimation for Federated Learning", arXiv 2302.03098, section 4).

    Attributes:
        seeds_M: Of each direction.
        norm: Of each gradient.
        size: Trained values.
    """

    seeds_M: NDArray[np.uint64] = field(repr=False)
    norm: float
    size: int

    def __len__(self) -> int:
        return len(self.seeds_M)

    def direction(self, number: int) -> Float32:
        """Return a unit vector [D]."""
        found_D = np.random.default_rng(int(self.seeds_M[number])).standard_normal(self.size, dtype=np.float32)
        return np.asarray(found_D / np.linalg.norm(found_D), dtype=np.float32)

    def loss(self, tensors: Sequence[torch.Tensor], number: int) -> torch.Tensor:
        """Return the loss of one example."""
        parts = torch.split(torch.from_numpy(self.norm * self.direction(number)), [t.numel() for t in tensors])
        products = [(tensor.reshape(-1) * part.to(tensor)).sum() for tensor, part in zip(tensors, parts, strict=True)]
        return torch.stack(products).sum()

    def components(
        self, vector_D: NDArray[np.floating[Any]], rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        """Return a vector's component along each gradient, or along those of ``rows``: each is made anew [M]."""
        return np.array([float(self.direction(n) @ vector_D) for n in (range(len(self)) if rows is None else rows)])


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimisedDirections(RandomDirections):
    """Random directions without their part in the span of mock gradients: orthogonal to what such records send.

    Attributes:
        span_KD: Orthonormal rows that span the mock gradients.
    """

    span_KD: Float32 = field(repr=False)

    def direction(self, number: int) -> Float32:
        """Return a unit vector [D]."""
        found_D = RandomDirections.direction(self, number)
        found_D -= (self.span_KD @ found_D) @ self.span_KD
        return np.asarray(found_D / np.linalg.norm(found_D), dtype=np.float32)


Given = GivenGradients | RandomDirections


@dataclass(frozen=True, slots=True)
class DirectBatch:
    """A microbatch of planted examples.

    Attributes:
        inputs: Their numbers among the planted examples [B].
    """

    inputs: torch.Tensor
    direct: ClassVar[bool] = True

    def to(self, device: torch.device) -> DirectBatch:  # noqa: ARG002
        """Return itself: the numbers stay on the CPU."""
        return self


class PlantedExamples:
    """Ordinary examples, of which those from ``first_direct`` on have given gradients.

    Args:
        inner: The ordinary examples; what they say of the planted ones is not read.
        first_direct: The first planted example.
        gradients: Of the planted ones.
    """

    def __init__(self, inner: Examples, first_direct: int, gradients: Given) -> None:
        self.inner = inner
        self.first_direct = first_direct
        self.gradients = gradients
        self.lengths = np.concatenate([inner.lengths[:first_direct], np.ones(len(gradients), dtype=np.int64)])

    def __len__(self) -> int:
        return self.first_direct + len(self.gradients)

    def batch(self, rows: Rows) -> Any:
        """Return a batch of ordinary examples, or of planted ones.

        Raises:
            ModelError: If the rows are of both kinds.
        """
        planted = rows >= self.first_direct
        if planted.all():
            return DirectBatch(torch.from_numpy(rows - self.first_direct))
        if planted.any():
            raise ModelError("A microbatch mixes planted and ordinary examples: their losses are had in other ways.")
        return self.inner.batch(rows)

    def losses(self, module: nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss of each example [B]."""
        if not getattr(batch, "direct", False):
            return self.inner.losses(module, batch)
        tensors = [parameter for _, parameter in trained(module)]
        return torch.stack([self.gradients.loss(tensors, number) for number in batch.inputs.tolist()])

    def probe(self, classes: int) -> Examples:
        """Return three made-up ordinary examples."""
        return self.inner.probe(classes)


def given_gradients(layout: ParamLayout, count: int, clip: float, rng: np.random.Generator) -> GivenGradients:
    """Return ``count`` gradients at different values, spread evenly over the tensors as far as their sizes go.

    At most half of a tensor's values are used: the others show what the noise and the ordinary examples do there.

    Args:
        layout: The trained tensors.
        count: How many.
        clip: The norm that each is to have after clipping.
        rng: Draws values and signs.

    Raises:
        ModelError: If that is more than half of all values.
    """
    room = np.array(layout.sizes) // 2
    if count > room.sum():
        raise ModelError(
            f"audit.canaries = {count} of given gradients need twice as many trained values, and this tuning trains "
            f"{layout.size}: set audit.canaries to {int(room.sum())} or fewer."
        )
    taken = _evenly(room, count)
    starts = np.cumsum([0, *layout.sizes[:-1]])
    tensors = np.repeat(np.arange(len(room)), taken)
    places = np.concatenate([rng.choice(size, n, replace=False) for size, n in zip(layout.sizes, taken, strict=True)])
    order = rng.permutation(count)
    tensors, places = tensors[order], places[order].astype(np.int64)
    values = (BEYOND * clip * rng.choice([-1.0, 1.0], count)).astype(np.float32)
    return GivenGradients(tensors_M=tensors, places_M=places, values_M=values, flat_M=starts[tensors] + places)


def random_directions(layout: ParamLayout, count: int, clip: float, rng: np.random.Generator) -> RandomDirections:
    """Return ``count`` gradients along random directions.

    Args:
        layout: The trained tensors.
        count: How many.
        clip: The norm that each is to have after clipping.
        rng: Draws the directions' seeds.

    Raises:
        ModelError: If there are more than half as many as values: they would drown one another.
    """
    if 2 * count > layout.size:
        raise ModelError(
            f"audit.canaries = {count} along random directions need twice as many trained values, and this tuning "
            f"trains {layout.size}: set audit.canaries to {layout.size // 2} or fewer."
        )
    seeds_M = rng.integers(0, 2**63, size=count, dtype=np.uint64)
    return RandomDirections(seeds_M=seeds_M, norm=BEYOND * clip, size=layout.size)


def optimised_directions(
    layout: ParamLayout, count: int, clip: float, rng: np.random.Generator, mock_KD: Float32
) -> OptimisedDirections:
    """Return ``count`` gradients along random directions that are orthogonal to mock gradients.

    Args:
        layout: The trained tensors.
        count: How many.
        clip: The norm that each is to have after clipping.
        rng: Draws the directions' seeds.
        mock_KD: Gradients of records like those of ordinary clients.

    Raises:
        ModelError: As :func:`random_directions`, or if the mock gradients leave no direction.
    """
    found = random_directions(layout, count, clip, rng)
    _, sizes_K, span_KD = np.linalg.svd(mock_KD, full_matrices=False)
    span_KD = span_KD[sizes_K > 1e-6 * max(float(sizes_K[0]), 1e-30)]
    if 2 * len(span_KD) > layout.size:
        raise ModelError(
            f'audit.canary = "optimised_direction" leaves out what {len(mock_KD)} records send, which is most of the '
            f'{layout.size} values that this tuning trains: use "random_direction".'
        )
    return OptimisedDirections(seeds_M=found.seeds_M, norm=found.norm, size=found.size, span_KD=span_KD)


def example_gradients(module: nn.Module, examples: Examples, size: int = 8) -> Float32:
    """Return each example's gradient by all that is trained, flat [N, D]."""
    from privfed.models.examples import losses, microbatches

    found = np.empty((len(examples), layout_of(module).size), dtype=np.float32)
    batches = ((rows, examples.batch(rows)) for rows in microbatches(examples, np.arange(len(examples)), size))
    for rows, flat_BD in flat_gradients(module, lambda m, b: losses(examples, m, b), batches):
        found[rows] = flat_BD.float().cpu().numpy()
    return found


def _evenly(room: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return how many each gets so that all together get ``count``, none more than its room, and all others alike."""
    taken = np.zeros_like(room)
    while (left := count - int(taken.sum())) > 0:
        open_ = np.flatnonzero(taken < room)
        each = max(1, left // len(open_))
        for i in open_[: left if left < len(open_) else None]:
            taken[i] += min(each, room[i] - taken[i])
    return taken
