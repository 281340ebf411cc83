"""Gradient matching on the pixels of images: pictures whose simulated update is the observed one.

Geiping, Bauermeister, Dröge, Moeller 2020, "Inverting Gradients - How easy is it to break privacy in federated
learning?", NeurIPS, arXiv 2003.14053: one minus the cosine of the updates plus total variation, within the range of
pixels; by L-BFGS, as Zhu, Liu, Han 2019 (arXiv 1906.08935) do. Hatamizadeh et al. 2022, "GradViT", CVPR,
arXiv 2203.11894, do so for vision transformers. Local training is simulated step by step. Of several random starts the
one with the least loss at the end is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from privfed.errors import ConfigError
from privfed.table import Table
from privfed_attacks.inversion import ATTACKS, Attack, Reconstruction, Setting

if TYPE_CHECKING:
    import torch

    from privfed_attacks.observation import Observation
    from privfed_attacks.public_model import PublicModel


class PixelsConfig(Table):
    """Options.

    Attributes:
        objective: What is made small; ``cosine`` is of each tensor for itself.
        steps: Steps of L-BFGS.
        variation: Weight of total variation.
        starts: Starts, near grey.
        rounds: At most so many observed rounds are matched, the last ones.
    """

    name: Literal["pixels"] = "pixels"
    objective: Literal["l2", "tag", "cosine"] = "cosine"
    steps: int = Field(default=300, ge=1)
    variation: float = Field(default=1e-4, ge=0)
    starts: int = Field(default=2, ge=1)
    rounds: int = Field(default=2, ge=1)


def run(
    observations: Sequence[Observation], model: PublicModel, setting: Setting, config: PixelsConfig
) -> Reconstruction:
    """Return the pictures whose simulated updates are nearest to the observed ones.

    Raises:
        ConfigError: If the number of examples or the local training is not known, or the model reads no images.
    """
    import torch

    from privfed_attacks.images import pixel_range
    from privfed_attacks.text.simulate import Simulation

    if not setting.sequences:
        raise ConfigError("Gradient matching needs the number of examples: set Setting.sequences.")
    labels = setting.labels or _labels(observations, model, setting)
    module = model.at(observations[-1])
    simulations = [Simulation(module, each) for each in observations[-config.rounds :]]
    low, high = pixel_range(model)
    draw = torch.Generator().manual_seed(setting.seed)
    starts = [0.05 * torch.randn(len(labels), *low.shape[1:], generator=draw) for _ in range(config.starts)]
    found = [_descent(simulations, torch.tensor(labels), start, (low, high), config) for start in starts]
    images, loss = min(found, key=lambda each: each[1])
    return Reconstruction(images=images.numpy(), labels=dict(Counter(labels)), facts={"loss": round(loss, 6)})


def _descent(
    simulations: Sequence[Any],
    labels_B: torch.Tensor,
    start_BCHW: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    config: PixelsConfig,
) -> tuple[torch.Tensor, float]:
    """Return (pictures, their loss) at the end of one search; pixels are a sigmoid's values between their bounds."""
    import torch

    from privfed_attacks.text.matching import distance
    from privfed_attacks.text.simulate import twice_differentiable

    low, high = bounds
    span = float((high - low).max())
    z = start_BCHW.clone().requires_grad_(True)
    search = torch.optim.LBFGS([z], max_iter=config.steps, history_size=50, line_search_fn="strong_wolfe")
    scale = 100.0  # L-BFGS stops at absolute changes, which of a loss below 1 are small too soon

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with twice_differentiable():
            made = [(each.update(x, None, labels_B), each.observed) for each in simulations]
        far = torch.stack([distance(a, b, config.objective, 0.01) for a, b in made]).mean()
        return far + config.variation * total_variation(x) / span

    def closure() -> torch.Tensor:
        loss = scale * loss_of(low + (high - low) * torch.sigmoid(z))
        (z.grad,) = torch.autograd.grad(loss, z)
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    x = (low + (high - low) * torch.sigmoid(z)).detach()
    return x, float(loss_of(x).detach())


def total_variation(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of neighbouring pixels, along both axes (Rudin, Osher, Fatemi 1992)."""
    return x_BCHW.diff(dim=-1).abs().mean() + x_BCHW.diff(dim=-2).abs().mean()


def _labels(observations: Sequence[Observation], model: PublicModel, setting: Setting) -> list[int]:
    attack = ATTACKS.get("labels")
    found = attack.run(observations, model, setting, attack.config()).labels
    return [label for label, count in sorted(found.items()) for _ in range(count)]


ATTACKS.register("pixels")(Attack(config=PixelsConfig, run=run, reads="images"))
