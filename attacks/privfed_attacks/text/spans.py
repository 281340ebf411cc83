"""The span of what was observed, with the noise that is in it taken into account.

The rows of all matrices are stacked, each divided by its own noise (float32 rounding, quantisation steps, DP noise: all
known to the adversary), so that the stack is signal plus noise of standard deviation 1. Singular values above the
largest that such noise has, about sqrt(n) + sqrt(d), belong to the signal and give a basis of its span.

For a vector x of the true span the distance to the estimated one is then known too, to first order: the noise moves the
basis vector u_i by about 1 / s_i in each of the d - k directions outside, so that

    E ||x - U Uᵀ x||² = (d - k) * sum_i (u_i . x / s_i)²                                            (*)

and a candidate is accepted if its distance is no more than a few times that. Without noise (*) is near 0 and the test
is that of DAGER; with much noise (*) is as large as the distance of any other vector, and nothing is accepted.

Shape suffixes: n stacked rows, d width, k rank of the signal, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from privfed_attacks.codec_noise import codec_noise
from privfed_attacks.observation import Observation

Array = NDArray[np.float64]
_CANCELLED = 0.05  # relative distances below this lose digits in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The estimated span of the inputs.

    Attributes:
        basis_dk: Orthonormal columns.
        values_k: Their singular values, in multiples of the noise.
        floor: The largest singular value that noise alone would have.
        rows: n.
    """

    basis_dk: torch.Tensor = field(repr=False)
    values_k: torch.Tensor = field(repr=False)
    floor: float
    rows: int

    @property
    def rank(self) -> int:
        """Return k."""
        return self.basis_dk.shape[1]

    @property
    def width(self) -> int:
        """Return d."""
        return self.basis_dk.shape[0]

    @property
    def saturated(self) -> bool:
        """True where nothing lies outside, or nothing was seen: no test is possible."""
        return self.rank == 0 or self.rank >= self.width

    def distances(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (relative distance from the span, what it would be of a member by the noise) of vectors [..., d].

        Both in float32, but for distances that are small beside the vector: those are computed anew without
        cancellation.
        """
        size = x.norm(dim=-1).clamp_min(1e-12)
        inside = x @ self.basis_dk.float()
        distance = (size**2 - inside.norm(dim=-1) ** 2).clamp_min(0).sqrt() / size
        expected = (self.width - self.rank) ** 0.5 * (inside / self.values_k).norm(dim=-1) / size
        near = distance < _CANCELLED
        close = x[near].double()
        distance[near] = (self.outside(close).norm(dim=-1) / close.norm(dim=-1).clamp_min(1e-12)).to(distance.dtype)
        return distance, expected

    def outside(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part of vectors [..., d] (float64) that lies outside the span."""
        return x - (x @ self.basis_dk) @ self.basis_dk.T


def span_of(stacks: Sequence[tuple[Array, float]], margin: float = 1.05) -> Span:
    """Return the span of matrices of rows.

    Args:
        stacks: (rows [n, d], standard deviation of the noise in each of their values).
        margin: How far above the noise's largest singular value the signal's begin.
    """
    parts = [rows / max(noise, 1e-30) for rows, noise in stacks if np.abs(rows).max(initial=0.0) > 0]
    if not parts:
        width = stacks[0][0].shape[1] if stacks else 1
        return Span(basis_dk=torch.zeros(width, 0, dtype=torch.float64), values_k=torch.zeros(0), floor=0.0, rows=0)
    stacked = np.concatenate(parts)
    rows, width = stacked.shape
    values, right = _svd(stacked)
    floor = margin * (np.sqrt(rows) + np.sqrt(width))
    kept = int((values > max(floor, values[0] * 1e-10)).sum())
    return Span(
        basis_dk=torch.from_numpy(np.ascontiguousarray(right[:kept].T)),
        values_k=torch.from_numpy(values[:kept].copy()).float(),
        floor=float(floor),
        rows=rows,
    )


def _svd(stacked: Array) -> tuple[Array, Array]:
    """Return singular values and right singular vectors (rows)."""
    if len(stacked) > 2 * stacked.shape[1]:  # the same values and right vectors, in less time
        stacked = np.asarray(np.linalg.qr(stacked, mode="r"))
    _, values, right = np.linalg.svd(stacked, full_matrices=False)
    return values, right


def noise_of(observation: Observation, name: str) -> float:
    """Return the standard deviation of what is not gradient in each value of a payload's tensor.

    * float32: a client subtracts two parameters of which each step rounded the second; the average of several clients
      is rounded less often than once per client.
    * compression: the public codec is run on values of the same size (``privfed_attacks.codec_noise``); where it is the
      identity, values of a masked sum still lie on a grid, and its step is read off them.
    * DP noise of the clients themselves: from the public configuration.
    """
    side, value = observation.side, observation.payload[name]
    steps = side.client.local_steps if side.client is not None else 1
    before = observation.params.get(name, value)
    rounding = steps * np.mean(np.spacing(np.abs(before)).astype(np.float64) ** 2) / 12
    added = codec_noise(observation).get(name)
    if added is None:  # the average of n messages lies on a grid n times finer than theirs
        added = grid_step(value) * float(np.sqrt(observation.contributors / 12))
    return float(np.sqrt(rounding + added**2 + _private(observation) ** 2))


def grid_step(value: NDArray[np.float32]) -> float:
    """Return the step of the grid that values lie on; about 0 for values that lie on none."""
    found = np.unique(np.abs(value[value != 0]).astype(np.float64))
    if len(found) < 2:
        return 0.0 if not len(found) else float(found[0])
    gaps = np.diff(found)
    gaps = gaps[gaps > found[-1] * 1e-9]
    return float(gaps.min()) if len(gaps) else 0.0


def _private(observation: Observation) -> float:
    """Return the standard deviation of DP-SGD's noise in an update by plain SGD, in one value; 0 without."""
    side = observation.side
    if side.noise_multiplier is None or side.l2_clip_norm is None or side.client is None or side.unit != "example":
        return 0.0
    batch = side.client.batch_size or 32
    each = side.client.learning_rate * side.noise_multiplier * side.l2_clip_norm / batch
    return each * float(np.sqrt(side.client.local_steps / observation.contributors))
