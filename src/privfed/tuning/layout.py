"""Trained tensors as one flat float32 vector and back, bit-exact.

Shape suffix: D, the number of trained values.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from privfed.errors import ModelError
from privfed.types import Float32, ParamLayout

if TYPE_CHECKING:
    import torch
    from torch import nn


def trained(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the trained parameters by name, in the module's own order."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def layout_of(module: nn.Module) -> ParamLayout:
    """Return the layout of the trained parameters of ``module``.

    Raises:
        ModelError: If nothing is trained, or a trained tensor is not float32 (the flat vector would round it).
    """
    parameters = trained(module)
    if not parameters:
        raise ModelError("This tuning trains no parameter of this model: choose another tuning.name.")
    for name, parameter in parameters:
        if str(parameter.dtype) != "torch.float32":
            raise ModelError(
                f"The trained tensor {name} is {parameter.dtype}, expected float32: load the model in float32."
            )
    names = tuple(name for name, _ in parameters)
    shapes = tuple(tuple(p.shape) for _, p in parameters)
    digest = hashlib.sha256(json.dumps([names, shapes]).encode()).hexdigest()
    return ParamLayout(names=names, shapes=shapes, digest=digest)


def read_flat(module: nn.Module) -> Float32:
    """Return a copy of the trained parameters as one float32 vector [D]."""
    return np.concatenate([p.detach().cpu().numpy().ravel() for _, p in trained(module)]).astype(np.float32, copy=False)


def write_flat(module: nn.Module, values_D: Float32) -> None:
    """Set the trained parameters from one float32 vector [D], bit for bit.

    Raises:
        ValueError: If the vector has another length or type.
    """
    import torch

    parameters = trained(module)
    size = sum(p.numel() for _, p in parameters)
    if values_D.shape != (size,) or values_D.dtype != np.float32:
        raise ValueError(f"Expected {size} float32 values, got {values_D.dtype} of shape {values_D.shape}.")
    offset = 0
    with torch.no_grad():
        for _, p in parameters:
            part = values_D[offset : offset + p.numel()].reshape(p.shape)
            p.copy_(torch.from_numpy(np.ascontiguousarray(part)))
            offset += p.numel()
