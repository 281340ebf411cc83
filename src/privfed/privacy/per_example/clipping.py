"""Clip each example's gradient over all tensors jointly, and add them up.

Shape suffixes: B examples of a microbatch, D trained values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from privfed.errors import ClientError
from privfed.privacy.per_example.contributions import Contribution, Dense

# keeps the rounding of norms, below 5e-6 with the block sums of contributions.py, and of the sum itself, which grows
# with the number of examples that were added up in float32, from lifting one example's influence above the bound
_SLACK = 1e-5
_SLACK_PER_EXAMPLE = 2.0**-20
# tensors with fewer values in a microbatch than this are clipped as one
_SMALL_VALUES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """Attributes:
    sum_D: The clipped gradients' sum, float64, tensor after tensor.
    norms_B: Each example's norm before clipping, float64, over all tensors jointly.
    """

    sum_D: torch.Tensor
    norms_B: torch.Tensor


def clipped_sum(gradients: Sequence[torch.Tensor], l2_clip_norm: float) -> Clipped:
    """Clip per-example gradients that are at hand; see :func:`clip`.

    Args:
        gradients: Per-example gradients, each [B, ...].
        l2_clip_norm: The bound, > 0.
    """
    return clip([Dense(g) for g in gradients], [g.shape[1:] for g in gradients], l2_clip_norm)


def clip(
    found: Sequence[Contribution],
    shapes: Sequence[torch.Size],
    l2_clip_norm: float,
    into_D: torch.Tensor | None = None,
) -> Clipped:
    """Clip each example's gradient, over all tensors jointly, and add them up.

    Adding or removing one example changes the result by at most ``l2_clip_norm`` in L2 norm: each example
    contributes its own gradient scaled to norm <= l2_clip_norm, and nothing else depends on it (Abadi et al.
    2016, arXiv 1607.00133, Algorithm 1).

    Args:
        found: Each tensor's per-example gradients.
        shapes: The tensors' shapes.
        l2_clip_norm: The bound, > 0.
        into_D: Add to this float64 vector [D] and return it, rather than a new one.

    Raises:
        ClientError: If a gradient is not finite; adding it would destroy the bound.
    """
    sizes = [shape.numel() for shape in shapes]
    joined = _joined(found)
    norms_B = torch.stack([part.squares() for part, _ in joined]).sum(dim=0).sqrt()
    if not bool(torch.isfinite(norms_B).all()):
        raise ClientError("The gradient of an example is not finite (NaN or infinity): lower the learning rate.")
    slack = 1.0 - _SLACK - _SLACK_PER_EXAMPLE * len(norms_B)
    factors_B = (l2_clip_norm / norms_B.clamp(min=l2_clip_norm)) * max(slack, 0.0)
    sum_D = norms_B.new_zeros(sum(sizes)) if into_D is None else into_D
    pieces = [piece.view(shape) for piece, shape in zip(torch.split(sum_D, sizes), shapes, strict=True)]
    for part, indices in joined:
        if len(indices) == 1:
            part.add_to(pieces[indices[0]], factors_B)
            continue
        whole = sum_D.new_zeros(sum(sizes[i] for i in indices))
        part.add_to(whole, factors_B)
        for i, values in zip(indices, torch.split(whole, [sizes[i] for i in indices]), strict=True):
            pieces[i] += values.view(shapes[i])
    return Clipped(sum_D=sum_D, norms_B=norms_B)


def _joined(found: Sequence[Contribution]) -> list[tuple[Contribution, list[int]]]:
    """Return the contributions with the numbers of their tensors; many small ones cost less as one."""
    small = {
        i: part.flat().float()
        for i, part in enumerate(found)
        if isinstance(part, Dense) and part.gradients.numel() <= _SMALL_VALUES
    }
    rest = [(part, [i]) for i, part in enumerate(found) if i not in small]
    return [(Dense(torch.cat(list(small.values()), dim=1)), list(small)), *rest] if small else rest
