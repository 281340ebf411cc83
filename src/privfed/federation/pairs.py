"""The LoRA pairs of a peft model, and its tensors by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from privfed.errors import ModelError
from privfed.rules import Pair, Rule
from privfed.types import Float32

ADAPTER = "default"


def find_pairs(module: nn.Module) -> tuple[Pair, ...]:
    """Return every LoRA pair of ``module``, trained or frozen, in the module's order."""
    names = {name for name, _ in module.named_parameters()}
    found = []
    for place, layer in module.named_modules():
        scale = getattr(layer, "scaling", None)
        if not isinstance(scale, Mapping) or ADAPTER not in scale:
            continue
        linear, embedding = (f"{place}.lora_A.{ADAPTER}.weight", f"{place}.lora_embedding_A.{ADAPTER}")
        a = linear if linear in names else embedding
        core = f"{place}.lora_B.{ADAPTER}.R.weight"
        b = a.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        pair = Pair(
            a=a,
            b=f"{place}.lora_B.{ADAPTER}.B" if core in names else b,
            core=core if core in names else None,
            weight=f"{place}.base_layer.weight",
            scale=float(scale[ADAPTER]),
            transposed=bool(getattr(layer, "fan_in_fan_out", False)) or a == embedding,
        )
        if {pair.a, pair.b} <= names:
            found.append(pair)
    return tuple(found)


def check_pairs(module: nn.Module, rule: Rule, pairs: Collection[Pair], name: str) -> None:
    """Refuse a model whose pairs are not what the rule computes with.

    Raises:
        ModelError: If there are none, one is a variant such as DoRA, or a carried tensor is not float32.
    """
    if rule.takes is None:
        return
    if not pairs:
        raise ModelError(f'server.aggregation = {name!r} works on LoRA pairs and this model has none: use "fedavg".')
    layers = dict(module.named_modules())
    tensors = dict(module.named_parameters())
    for pair in pairs:
        place = pair.weight.removesuffix(".base_layer.weight")
        if ADAPTER in getattr(layers[place], "lora_variant", {}):
            raise ModelError(
                f"server.aggregation = {name!r} computes with B A, and {place} is a variant of LoRA (such as DoRA) "
                'that is more than B A: use a plain "lora" tuning, or aggregation = "fedavg".'
            )
    for each in rule.carried(tuple(pairs)):
        if tensors[each].dtype != torch.float32:
            raise ModelError(
                f"server.aggregation = {name!r} changes {each}, which is {tensors[each].dtype}: it needs float32 "
                'weights; use aggregation = "rolora" with a quantised or half-precision model.'
            )


def read_named(module: nn.Module, names: Collection[str]) -> dict[str, Float32]:
    """Return copies of the parameters called ``names``."""
    tensors = dict(module.named_parameters()) if names else {}
    return {name: tensors[name].detach().cpu().numpy().copy() for name in names}


def write_named(module: nn.Module, values: Mapping[str, Float32]) -> None:
    """Set parameters by name, bit for bit; names that the module lacks (a rule's own vectors) are left out."""
    if not values:
        return
    tensors = dict(module.named_parameters())
    with torch.no_grad():
        for name in values.keys() & tensors.keys():
            tensors[name].copy_(torch.from_numpy(np.ascontiguousarray(values[name])))


@contextmanager
def only_training(module: nn.Module, active: frozenset[str] | None) -> Iterator[None]:
    """Freeze every trained parameter but the ``active`` ones in the body; None leaves all as they are."""
    resting = [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and active is not None and name not in active
    ]
    for parameter in resting:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)
