"""Gradient matching on the pixels of images: pictures whose simulated update is the observed one.

Geiping, Bauermeister, Dröge, Moeller 2020, "Inverting Gradients - How easy is it to break privacy in federated
learning?", NeurIPS, arXiv 2003.14053: one minus the cosine of the updates plus total variation, by Adam, within the
range of pixels. Hatamizadeh et al. 2022, "GradViT", CVPR, arXiv 2203.11894, do so for vision transformers. Local
training is simulated step by step. Of several random starts the one with the least loss at the end is kept.
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
        steps: Steps of Adam.
        learning_rate: Of Adam, as a share of the range of pixels, decaying to a tenth.
        variation: Weight of total variation.
        starts: Random starts.
        rounds: At most so many observed rounds are matched, the last ones.
    """

    name: Literal["pixels"] = "pixels"
    objective: Literal["l2", "tag", "cosine"] = "cosine"
    steps: int = Field(default=300, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)
    variation: float = Field(default=1e-3, ge=0)
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
    low, high = (bound.expand(len(labels), -1, -1, -1) for bound in pixel_range(model))
    draw = torch.Generator().manual_seed(setting.seed)
    starts = [low + (high - low) * torch.rand(low.shape, generator=draw) for _ in range(config.starts)]
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
    """Return (pictures, their loss) at the end of one search."""
    import torch

    from privfed_attacks.text.matching import distance
    from privfed_attacks.text.simulate import twice_differentiable

    span = float((bounds[1] - bounds[0]).max())
    rate = config.learning_rate * span
    x = start_BCHW.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps, eta_min=rate / 10)
    loss = torch.zeros(())
    for _ in range(config.steps):
        with twice_differentiable():
            made = [(each.update(x, None, labels_B), each.observed) for each in simulations]
        loss = torch.stack([distance(a, b, config.objective, 0.01) for a, b in made]).mean()
        loss = loss + config.variation * total_variation(x) / span
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        decay.step()
        with torch.no_grad():
            x.clamp_(*bounds)
    return x.detach(), float(loss.detach())


def total_variation(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of neighbouring pixels, along both axes (Rudin, Osher, Fatemi 1992)."""
    return x_BCHW.diff(dim=-1).abs().mean() + x_BCHW.diff(dim=-2).abs().mean()


def _labels(observations: Sequence[Observation], model: PublicModel, setting: Setting) -> list[int]:
    attack = ATTACKS.get("labels")
    found = attack.run(observations, model, setting, attack.config()).labels
    return [label for label, count in sorted(found.items()) for _ in range(count)]


ATTACKS.register("pixels")(Attack(config=PixelsConfig, run=run, reads="images"))
