"""Per-example gradients through Opacus, clipped one by one and summed.

Shape suffixes: B examples of a microbatch, D trained values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from privfed.errors import ClientError, ModelError

# keeps the rounding of norms, below 5e-6 with float32 sums of this length, from lifting a clipped norm above the bound
_SLACK = 1.0 - 1e-5
_NORM_BLOCK = 1024
_SUM_BLOCK = 1 << 14


class PerExampleModel:
    """A module whose backward pass leaves ``grad_sample`` [B, ...] on every trained parameter.

    Opacus hooks (Yousefpour et al. 2021, arXiv 2109.12298) compute them. Embeddings that a model looks up once
    for the whole batch (position and token-type tables with a batch dimension of 1) would come out as *one*
    gradient for all examples; their input is expanded to the batch first.

    Args:
        module: The model; its forward gets a dict of tensors whose first dimension is the batch.

    Raises:
        ModelError: If Opacus cannot handle a trained layer of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        from opacus import GradSampleModule
        from opacus.validators.errors import UnsupportedModuleError

        self.module = module
        self._batch = 0
        self._handles = [
            m.register_forward_pre_hook(self._expand)
            for m in module.modules()
            if isinstance(m, nn.Embedding) and m.weight.requires_grad
        ]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.wrapped = GradSampleModule(module, loss_reduction="sum")
        except (UnsupportedModuleError, NotImplementedError) as error:
            raise ModelError(f"Per-example gradients are not available for this model and tuning: {error}") from error
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def close(self) -> None:
        """Remove every hook; the module is then as it came."""
        self.wrapped.to_standard_module()
        for handle in self._handles:
            handle.remove()

    def gradients(self, loss: Callable[[nn.Module, Any], torch.Tensor], batch: Any, size: int) -> list[torch.Tensor]:
        """Return each trained parameter's per-example gradient [B, ...].

        Args:
            loss: Maps (module, batch) to the B per-example losses.
            batch: The microbatch.
            size: B.

        Raises:
            ClientError: If a parameter got no gradient, or one of a wrong batch size.
        """
        self._batch = size
        self._forget()
        with warnings.catch_warnings():
            # a module fed by frozen layers has no input gradient; Opacus needs only the output's
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss(self.wrapped, batch).sum().backward()  # type: ignore[no-untyped-call]
        found = [getattr(p, "grad_sample", None) for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        if any(not isinstance(g, torch.Tensor) or g.shape[0] != size for g in found):
            raise ClientError(
                "A trained tensor has no gradient for each example: this model cannot be trained privately."
            )
        return [g for g in found if isinstance(g, torch.Tensor)]

    def _forget(self) -> None:
        """Drop what a pass that an exception (such as a deadline) cut short left on layers and tensors.

        Opacus counts passes and stacks activations there: one left over would cost every later client its gradients.
        """
        for module in self.module.modules():
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
        for parameter in self.parameters:
            vars(parameter).pop("_current_grad_sample", None)
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def _expand(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        index = args[0]
        if index.shape[0] == 1 and self._batch > 1:
            return (index.expand(self._batch, *index.shape[1:]), *args[1:])
        return None


def clipped_sum(gradients: list[torch.Tensor], l2_clip_norm: float) -> tuple[torch.Tensor, int]:
    """Clip each example's gradient, over all tensors jointly, and add them up.

    Adding or removing one example changes the result by at most ``l2_clip_norm`` in L2 norm: each example
    contributes its own gradient scaled to norm <= l2_clip_norm, and nothing else depends on it (Abadi et al.
    2016, arXiv 1607.00133, Algorithm 1).

    Args:
        gradients: Per-example gradients, each [B, ...].
        l2_clip_norm: The bound, > 0.

    Returns:
        The sum as float64 [D], and how many examples were above the bound.

    Raises:
        ClientError: If a gradient is not finite; adding it would destroy the bound.
    """
    flat = [g.flatten(1) for g in gradients]
    norms_B = torch.stack([_norms(g) for g in flat]).norm(dim=0)
    if not bool(torch.isfinite(norms_B).all()):
        raise ClientError("The gradient of an example is not finite (NaN or infinity): lower the learning rate.")
    factors_B = (l2_clip_norm / norms_B.clamp(min=l2_clip_norm)) * _SLACK
    total_D = torch.cat([factors_B @ part.double() for g in flat for part in torch.split(g, _SUM_BLOCK, dim=1)])
    return total_D, int((norms_B > l2_clip_norm).sum())


def _norms(gradients_BD: torch.Tensor) -> torch.Tensor:
    """Return the L2 norms [B] as float64, summed block by block.

    One float32 sum over millions of squares comes out too small by up to a percent, and a clip by such a norm lets
    an example through above the bound.
    """
    size, width = gradients_BD.shape
    whole = width // _NORM_BLOCK * _NORM_BLOCK
    blocks = gradients_BD[:, :whole].reshape(size, whole // _NORM_BLOCK, _NORM_BLOCK)
    return torch.hypot(blocks.norm(dim=2).double().norm(dim=1), gradients_BD[:, whole:].norm(dim=1).double())
