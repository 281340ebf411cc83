"""CANIFE: an example made so that its gradient is large and points where no client's update does.

Maddock, Sablayrolles and Stock 2023, "CANIFE: Crafting Canaries for Empirical Privacy Measurement in Federated
Learning", arXiv 2210.02912, Algorithm 1 and equation 2. A client that holds it is then found by one dot product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Floats, attack
from privfed_attacks.membership.gradient_dot import unit

if TYPE_CHECKING:
    import torch


@attack("canife")
def canife(updates_RD: Floats, canaries_QD: Floats) -> Floats:
    """Return the mean over rounds of the dot product of the update with each canary's unit update.

    The adversary controls a client that holds the canary in half of the trials, knows the update it would send, and
    sees the sum of the clipped updates. Divided by clip / cohort size this is near N(0, z^2) or N(1, z^2).

    Args:
        updates_RD: Sums or means of the clients' clipped updates.
        canaries_QD: The update that the canary alone would lead to; minus its gradient for one step.
    """
    return np.asarray((updates_RD @ unit(canaries_QD).T).mean(axis=0), dtype=np.float64)


def optimise_canary(
    gradient: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    others_ND: torch.Tensor,
    *,
    l2_clip_norm: float,
    steps: int = 200,
    learning_rate: float = 0.05,
) -> torch.Tensor:
    """Return an example that minimises sum_i <u_i, g>^2 + max(clip - ||g||, 0)^2 (equation 2).

    Args:
        gradient: Maps the example (pixels, features or embeddings) to its flat gradient [D], differentiably.
        start: The example to start from.
        others_ND: Updates of mock clients on public data, as the adversary can make them itself; scaled to length 1.
        l2_clip_norm: The clip that the canary's gradient is to reach.
        steps: Of Adam.
        learning_rate: Of Adam.

    Raises:
        ConfigError: If the canary's gradient is not finite.
    """
    import torch

    canary = start.detach().clone().requires_grad_(True)
    units_ND = others_ND / others_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
    optimizer = torch.optim.Adam([canary], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        g_D = gradient(canary)
        loss = (units_ND @ g_D).square().sum() + (l2_clip_norm - g_D.norm()).clamp_min(0).square()
        (canary.grad,) = torch.autograd.grad(loss, [canary])
        optimizer.step()
    if not bool(torch.isfinite(canary).all()):
        raise ConfigError("The canary's gradient is not finite: lower the learning rate.")
    return canary.detach()
