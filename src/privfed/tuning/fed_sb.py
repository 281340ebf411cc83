"""Fed-SB: W + s B R A with B and A fixed from the singular directions of W and only R (r x r) trained.

Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", arXiv 2502.15436. The change is linear in R, so averaging R is exact at any rank and
noise has no product term; r^2 values a layer are trained, noised and sent whatever its width. The paper starts from
the singular value decomposition of a first full-model gradient; a gradient of private data would have to be paid for,
so B = U_r and A = V_r^T come from W itself here (as in LoRA-XS, arXiv 2405.17604) and R starts at 0.
Saved as a plain LoRA adapter whose B is B R.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from privfed.table import Table
from privfed.tuning import TUNINGS, TunedModel, Tuning

if TYPE_CHECKING:
    import torch

    from privfed.models.loading import LoadedModel


class FedSbConfig(Table):
    """Options, by peft's names where it has them.

    Attributes:
        r: Rank of B and A, side of R.
        lora_alpha: Scale; s = lora_alpha / r.
        target_modules: As :class:`privfed.tuning.lora_options.LoraOptions`.
        layers_to_transform: As there.
    """

    name: Literal["fed_sb"] = "fed_sb"
    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None


def apply(loaded: LoadedModel, config: FedSbConfig, seed: int) -> TunedModel:
    """Wrap the model with fixed B and A and a trained R between them, all of float32."""
    from privfed.tuning.adapters import lora_wrapped

    options = config.model_dump(exclude={"name"})
    return lora_wrapped(loaded, seed, name="fed_sb", prepare=_put_between, convert=_multiplied, **options)


def factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, A) [out, r] and [r, in]: the largest left and right singular vectors of a weight [out, in].

    The largest entry of each column of B is positive: singular vectors are otherwise free in sign, and B and A have
    to be the same for every client.
    """
    import torch

    left, _, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    B, A = left[:, :rank], right[:rank]
    signs = torch.sign(B.gather(0, B.abs().argmax(dim=0, keepdim=True)))[0]
    return (B * signs).to(weight.dtype), (A * signs[:, None]).to(weight.dtype)


def _put_between(model: Any) -> None:
    """Replace each LoRA layer's A and B by the fixed ones and put R in between."""
    import torch
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if "default" not in layer.lora_A:
            raise ValueError(f"{name} is no linear layer, and Fed-SB takes linear layers only")
        weight = layer.get_base_layer().weight
        B, A = factors(weight.T if layer.fan_in_fan_out else weight, layer.r["default"])
        layer.lora_A["default"].weight = torch.nn.Parameter(A.contiguous(), requires_grad=False)
        layer.lora_B["default"] = _between(B.contiguous())


def _between(B: torch.Tensor) -> torch.nn.Module:
    """Return x -> B R x, which peft takes for a linear layer of weight B R."""
    from torch import nn

    class Between(nn.Module):
        """B R with B [out, r] fixed and R [r, r] trained."""

        bias = None

        def __init__(self) -> None:
            super().__init__()
            self.R = nn.Linear(B.shape[1], B.shape[1], bias=False)
            nn.init.zeros_(self.R.weight)
            self.B = nn.Parameter(B, requires_grad=False)

        @property
        def weight(self) -> torch.Tensor:
            return self.B @ self.R.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.R(x), self.B)

    return Between()


def _multiplied(state: dict[str, Any], fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights of the plain LoRA adapter: B R in the place of B and R."""
    named = {key.replace(".lora_B.default.", ".lora_B."): value for key, value in state.items()}
    out = {key: value for key, value in named.items() if not key.endswith((".lora_B.B", ".lora_B.R.weight"))}
    for key, value in named.items():
        if key.endswith(".lora_B.B"):
            layer = key.removesuffix(".B")
            out[f"{layer}.weight"] = value @ named[f"{layer}.R.weight"]
    return out, fields


TUNINGS.register("fed_sb")(Tuning(config=FedSbConfig, apply=apply, linear=True))
