"""Scores of a random mask over fixed random adapter weights: W + s (m * B) A with only the scores of m trained.

Isik et al. 2023, "Sparse Random Networks for Communication-Efficient Federated Learning" (FedPM), ICLR, arXiv
2209.15328, on LoRA's B in the place of a whole network: A and B stay as they were drawn, each value of B is there with
probability sigmoid(score), and the gradient goes straight through the draw to the probability. Evaluated and saved is
the likelier mask (score > 0), as a plain LoRA adapter whose B is m * B; all scores start at 0, so that is the base.

In training the draw is a fixed function of the scores and the seed: every example of a step meets the same mask, so
that each has a gradient of its own, and any change of the scores draws anew. The draw costs no privacy beyond that of
the scores.

With ``compression.name = "bernoulli_mask"`` clients send a draw of their mask, one bit a value, and the server averages
those, as in the paper. Any other codec sends changes of the scores, which are averaged as such.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    import torch

    from privfed.models.loading import LoadedModel

# of a bijection of 64 bits with good avalanche: Steele et al. 2014, "Fast splittable pseudorandom number generators"
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_DRAW_BITS = 24  # float32 has them all


class BernoulliMaskConfig(Table):
    """Options, by peft's names where it has them.

    Attributes:
        r: Rank of B and A.
        lora_alpha: Scale; s = lora_alpha / r.
        magnitude: Size of every value of B; the signs are random.
        target_modules: As :class:`privfed.tuning.lora_options.LoraOptions`.
        layers_to_transform: As there.
    """

    name: Literal["bernoulli_mask"] = "bernoulli_mask"
    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    magnitude: float = Field(default=0.1, gt=0)
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None


def apply(loaded: LoadedModel, config: BernoulliMaskConfig, seed: int) -> TunedModel:
    """Wrap the model with fixed A and B and a trained score of each value of B."""
    from privfed.tuning.adapters import lora_wrapped

    options = config.model_dump(exclude={"name", "magnitude"})
    prepare = partial(_mask, magnitude=config.magnitude, seed=seed)
    return lora_wrapped(loaded, seed, name="bernoulli_mask", prepare=prepare, convert=_applied, **options)


def drawn(scores: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a mask of zeros and ones, each 1 with probability sigmoid(score): a function of scores and seed alone.

    A digest of all the scores with their places keys the draw of each place.
    """
    import torch

    plain = scores.detach()
    places = torch.arange(plain.numel(), device=plain.device).reshape(plain.shape) * _signed(_GAMMA)
    key = _mixed(_mixed(plain.view(torch.int32).to(torch.int64) + places).sum() + seed)
    draws = (_mixed(places + key) >> (64 - _DRAW_BITS)) & ((1 << _DRAW_BITS) - 1)
    return (draws.to(plain.dtype) / (1 << _DRAW_BITS) < torch.sigmoid(plain)).to(plain.dtype)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's finaliser of int64 words, which wrap."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words = (words ^ _shifted(words, shift)) * _signed(factor)
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mask(model: Any, *, magnitude: float, seed: int) -> None:
    """Freeze each LoRA layer's A and replace its B by a masked one."""
    from peft.tuners.lora import LoraLayer

    for number, (name, layer) in enumerate(model.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        if "default" not in layer.lora_A:
            raise ValueError(f"{name} is no linear layer, and a Bernoulli mask takes linear layers only")
        layer.lora_A["default"].weight.requires_grad_(False)
        layer.lora_B["default"] = _masked(layer.lora_B["default"].weight, magnitude, seed + number)


def _masked(like: torch.Tensor, magnitude: float, seed: int) -> torch.nn.Module:
    """Return x -> (m * B) x, which peft takes for a linear layer of weight m * B."""
    import torch
    from torch import nn

    class Masked(nn.Module):
        """B [out, r] with fixed values of random signs, and the scores [out, r] of its mask."""

        bias = None

        def __init__(self) -> None:
            super().__init__()
            signs = 2 * torch.randint(0, 2, like.shape) - 1
            self.B = nn.Parameter((magnitude * signs).to(like), requires_grad=False)
            self.scores = nn.Parameter(torch.zeros_like(like, dtype=torch.float32))

        @property
        def weight(self) -> torch.Tensor:
            return self.B * (self.scores > 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                return nn.functional.linear(x, self.weight)
            chances = torch.sigmoid(self.scores)
            mask = drawn(self.scores, seed) + chances - chances.detach()  # its gradient is that of the chances
            return nn.functional.linear(x, self.B * mask.to(self.B.dtype))

    return Masked()


def _applied(state: dict[str, Any], fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights of the plain LoRA adapter: m * B in the place of B and the scores."""
    named = {key.replace(".lora_B.default.", ".lora_B."): value for key, value in state.items()}
    out = {key: value for key, value in named.items() if not key.endswith((".lora_B.B", ".lora_B.scores"))}
    for key, value in named.items():
        if key.endswith(".lora_B.B"):
            layer = key.removesuffix(".B")
            out[f"{layer}.weight"] = value * (named[f"{layer}.scores"] > 0)
    return out, fields


TUNINGS.register("bernoulli_mask")(Tuning(config=BernoulliMaskConfig, apply=apply, linear=False, scores=True))
