"""Which part of a model hands over which tensor's gradients.

A tensor belongs to the smallest module around it that is really called: a known layer has a closed form, any
other is a unit. ``level`` 1 takes peft's whole tuner layer instead, for tensors that are also used beside the
layer that owns them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from privfed.privacy.per_example.prompt import PromptSite, prompt_models
from privfed.privacy.per_example.sites import Site, leaf_site
from privfed.privacy.per_example.tap import Recorder
from privfed.privacy.per_example.tuners import tuner_site
from privfed.privacy.per_example.units import UnitSite

NEAREST, TUNER_LAYER, WHOLE_VMAP, WHOLE_LOOP = range(4)


def called_modules(module: nn.Module, run: Callable[[], Any]) -> set[nn.Module]:
    """Return the modules that ``run`` calls; it is run without gradients."""
    called: set[nn.Module] = set()

    def note(part: nn.Module, _args: Any) -> None:
        called.add(part)

    handles = [part.register_forward_pre_hook(note) for part in module.modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return called


def choose(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    levels: Sequence[int],
    called: set[nn.Module],
    recorder: Recorder,
) -> list[Site]:
    """Return the sites that together hand over every trained tensor.

    Args:
        module: The model.
        parameters: Its trained tensors.
        levels: For each of them, ``NEAREST`` or ``TUNER_LAYER``.
        called: The modules that a pass calls.
        recorder: Where gradients go.
    """
    number = {id(p): i for i, p in enumerate(parameters)}
    sites: list[Site] = []
    taken: set[int] = set()
    for model in prompt_models(module):
        indices = _own(model.prompt_encoder, number)
        if indices:
            taken |= set(indices.values())
            sites.append(PromptSite(model, {f"prompt_encoder.{n}": i for n, i in indices.items()}, recorder))
    owners = _owners(module, number, levels, called, taken)
    for unit, wanted in _by_unit(owners).items():
        sites += _sites_of(unit, wanted, number, recorder)
    return sites


def _own(module: nn.Module, number: Mapping[int, int]) -> dict[str, int]:
    return {name: number[id(p)] for name, p in module.named_parameters() if id(p) in number}


def _owners(
    module: nn.Module,
    number: Mapping[int, int],
    levels: Sequence[int],
    called: set[nn.Module],
    taken: set[int],
) -> dict[int, list[nn.Module]]:
    """Return, by tensor, the modules that may be its unit; one for each place where it is registered."""
    found: dict[int, list[nn.Module]] = {}
    for path in _paths(module):
        for parameter in path[-1]._parameters.values():
            index = number.get(id(parameter), -1)
            if index >= 0 and index not in taken:
                unit = _unit(path, levels[index], called)
                if unit not in found.setdefault(index, []):
                    found[index].append(unit)
    return found


def _paths(module: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """Yield every module with the chain of modules above it; shared modules once for each place."""
    stack: list[tuple[nn.Module, ...]] = [(module,)]
    while stack:
        path = stack.pop()
        yield path
        stack += [(*path, child) for child in path[-1]._modules.values() if child is not None and child not in path]


def _unit(path: tuple[nn.Module, ...], level: int, called: set[nn.Module]) -> nn.Module:
    candidates = [part for part in reversed(path) if part in called]
    if level == TUNER_LAYER:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [part for part in candidates if isinstance(part, BaseTunerLayer)]
        candidates = layers or candidates[1:] or candidates
    return candidates[0] if candidates else path[0]


def _by_unit(owners: Mapping[int, list[nn.Module]]) -> dict[nn.Module, set[int]]:
    """Return the tensors of each unit; where one unit lies within another, the inner one has the tensor."""
    units: dict[nn.Module, set[int]] = {}
    inside = {unit: set(unit.modules()) for found in owners.values() for unit in found if len(found) > 1}
    for index, found in owners.items():
        for unit in found:
            if not any(other is not unit and other in inside[unit] for other in found if len(found) > 1):
                units.setdefault(unit, set()).add(index)
    return units


def _sites_of(unit: nn.Module, wanted: set[int], number: Mapping[int, int], recorder: Recorder) -> list[Site]:
    direct = {
        name: number[id(p)] for name, p in unit._parameters.items() if p is not None and number.get(id(p)) in wanted
    }
    kind = leaf_site(unit) if direct else None
    if kind is not None:
        return [kind(unit, direct, recorder)]
    indices = {name: i for name, i in _own(unit, number).items() if i in wanted}
    special = tuner_site(unit, indices)
    return [(special or UnitSite)(unit, indices, recorder)]
