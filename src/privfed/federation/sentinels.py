"""Self-checks that stop a run before a silent failure costs a budget.

* no example's loss or gradient depends on the others of its batch, nor on chance;
* every trained tensor gets a per-example gradient, equal to one-at-a-time autograd, on a probe batch;
* frozen weights are the same before and after training, by hash;
* every trained tensor that has a gradient has moved, in some round: one that moves by steps of one size, as the two
  values of a bias under a codec of signs, may well end where it began.

Shape suffixes: B examples of the probe, D trained values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from privfed.errors import SentinelError
from privfed.models.examples import Examples, losses
from privfed.privacy.per_example import PerExampleModel, clipped_sum
from privfed.privacy.per_example.coupling import VANISHING, check_independent
from privfed.rng import experiment_rng
from privfed.tuning.layout import read_flat, trained, write_flat
from privfed.types import Float32, ParamLayout

TOLERANCE = 1e-4
# norms without the gradients are rounded upwards where positions cancel
SUM_TOLERANCE = 1e-3


def probe_examples(like: Examples, classes: int) -> Examples:
    """Return three made-up examples of the kind of ``like``; no client's data is touched.

    Args:
        like: Examples of the kind that is wanted.
        classes: Number of classes; 0 where there are none.
    """
    return like.probe(max(1, classes))


def check_gradients(module: nn.Module, probe: Examples, *, private: bool) -> tuple[str, frozenset[str]]:
    """Compare per-example gradients with one-at-a-time autograd on ``probe``.

    Trained tensors are moved off their start first (a LoRA pair that starts at B = 0 hides A's gradient) and
    put back, bit for bit.

    Args:
        module: The model with its trained parameters.
        probe: Examples of different lengths.
        private: Whether per-example gradients are needed at all; otherwise only their existence is checked.

    Returns:
        A sentence for the receipt, and the names of tensors whose gradient vanishes.

    Raises:
        ModelError: If examples of a batch touch each other, or two passes differ.
        SentinelError: Naming the first tensor without a gradient, or with a wrong one.
    """
    if private:
        PerExampleModel(module).close()  # refuses layers without per-example gradients in its own words
    before = read_flat(module)
    noise = experiment_rng(0, "sentinel").standard_normal(len(before)).astype(np.float32)
    write_flat(module, before + np.float32(0.02) * noise)
    module.train()
    try:
        single = [_one_at_a_time(module, probe, row) for row in range(len(probe))]
        reference = [torch.stack(rows) for rows in zip(*single, strict=True)]
        names = [name for name, _ in trained(module)]
        vanishing = _vanishing(names, reference)
        if not private:
            return f"{len(names)} trained tensors have a gradient", vanishing
        check_independent(module, partial(_losses, probe), partial(_batch, probe), len(probe))
        worst, ways = _batched(module, probe, names, reference, vanishing)
    finally:
        write_flat(module, before)
        for _, parameter in trained(module):
            parameter.grad = None
    sentence = f"{len(names)} trained tensors: per-example gradients equal autograd's within {worst:.1e} ({ways})"
    if vanishing:
        sentence += f"; the gradient of {len(vanishing)} vanishes ({sorted(vanishing)[0]} is one)"
    return sentence, vanishing


def frozen_digests(module: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of every frozen parameter and buffer, by name."""
    frozen = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in [*frozen, *module.named_buffers()]}


def _bytes(tensor: torch.Tensor) -> bytes:
    """Return the tensor's bytes, whatever its type and device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Moves:
    """Which trained tensors were ever elsewhere than at their start.

    Args:
        layout: The trained tensors.
        start_D: Their values before training.
    """

    def __init__(self, layout: ParamLayout, start_D: Float32) -> None:
        ends = np.cumsum(layout.sizes)
        self._still = {
            name: slice(int(end - size), int(end))
            for name, end, size in zip(layout.names, ends, layout.sizes, strict=True)
        }
        self._start_D = start_D
        self._moved: set[str] = set()

    def saw(self, params_D: Float32) -> None:
        """Compare the values after a round with the start."""
        gone = [name for name, at in self._still.items() if not np.array_equal(self._start_D[at], params_D[at])]
        self._moved.update(gone)
        for name in gone:
            del self._still[name]

    @property
    def names(self) -> frozenset[str]:
        """The tensors that moved."""
        return frozenset(self._moved)


def check_moved(layout: ParamLayout, moved: Collection[str], vanishing: Collection[str], *, dense: bool = True) -> str:
    """Return a sentence for the receipt if every trained tensor with a gradient moved.

    Args:
        layout: The trained tensors.
        moved: Names of those that were ever elsewhere than at their start.
        vanishing: Names of those that need not move.
        dense: Whether all values of updates are sent; where some are left out, one moved tensor has to do.

    Raises:
        SentinelError: Naming the tensors that did not.
    """
    still = [name for name in layout.names if name not in vanishing and name not in moved]
    moving = len(layout.names) - len(vanishing)
    if still and (dense or len(still) == moving):
        raise SentinelError(f"Training did not move {', '.join(still[:5])}: nothing is released; check the tuning.")
    if not dense:
        return (
            f"{moving - len(still)} of {moving} trained tensors with a gradient moved, as clients send some values only"
        )
    return f"all {moving} trained tensors with a gradient moved"


def check_frozen(before: Mapping[str, str], after: Mapping[str, str], carried: Collection[str] = ()) -> str:
    """Return a sentence for the receipt if the frozen weights are the same.

    Args:
        before: ``frozen_digests`` before training.
        after: ``frozen_digests`` after training.
        carried: Names of frozen tensors that the aggregation rule changes on purpose.

    Raises:
        SentinelError: Naming the tensors that changed.
    """
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    wrong = sorted(changed - set(carried))
    if wrong:
        raise SentinelError(
            f"Training changed {', '.join(wrong[:5])}, which should be frozen: the adapter alone would not "
            "reproduce the model."
        )
    whole = hashlib.sha256("".join(f"{name}{digest}" for name, digest in after.items()).encode()).hexdigest()
    but = f" but for the {len(carried)} that the aggregation rule changes" if carried else ""
    return f"frozen weights unchanged{but} (SHA-256 {whole[:12]})"


def check_carried(before: Mapping[str, str], after: Mapping[str, str], carried: Collection[str]) -> None:
    """Refuse a run in which a tensor that the aggregation rule changes stayed as it was.

    Raises:
        SentinelError: Naming the tensors.
    """
    still = sorted(name for name in carried if before.get(name) == after.get(name))
    if still:
        raise SentinelError(f"The aggregation rule did not change {', '.join(still[:5])}: nothing is released.")


def _one_at_a_time(module: nn.Module, probe: Examples, row: int) -> list[torch.Tensor]:
    """Return the gradient of one example by a plain backward pass."""
    parameters = [p for _, p in trained(module)]
    for parameter in parameters:
        parameter.grad = None
    losses(probe, module, probe.batch(np.asarray([row]))).sum().backward()  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in parameters]
    for (name, _), gradient in zip(trained(module), found, strict=True):
        if gradient is None:
            raise SentinelError(f"The trained tensor {name} has no gradient: training would never move it.")
    return [g.detach().clone() for g in found if g is not None]


def _losses(probe: Examples, module: nn.Module, batch: Any) -> torch.Tensor:
    return losses(probe, module, batch)


def _batch(probe: Examples, rows: Sequence[int]) -> Any:
    return probe.batch(np.asarray(rows))


def _batched(
    module: nn.Module,
    probe: Examples,
    names: Sequence[str],
    reference: Sequence[torch.Tensor],
    vanishing: frozenset[str],
) -> tuple[float, str]:
    """Choose the engine's way of each tensor; return the largest error in two batches, and the ways in words."""
    model = PerExampleModel(module)
    loss = partial(_losses, probe)
    worst = 0.0
    try:
        everyone = list(range(len(probe)))
        model.prove(loss, _batch(probe, everyone), len(probe), reference, TOLERANCE)
        for rows in (everyone, [everyone[-1], 0]):
            found = model.gradients(loss, _batch(probe, rows), len(rows))
            wanted = [g[rows] for g in reference]
            worst = max(worst, _compare(names, found, wanted, vanishing))
            _compare_sum(model, loss, _batch(probe, rows), wanted)
        return worst, model.describe()
    finally:
        model.close()


def _compare_sum(model: PerExampleModel, loss: Any, batch: Any, wanted: Sequence[torch.Tensor]) -> None:
    """Show that the clipped sum, which never sees whole gradients, is the one of these gradients."""
    clip = float(clipped_sum(wanted, 1.0).norms_B.median())
    got, right = model.clipped_sum(loss, batch, len(wanted[0]), clip), clipped_sum(wanted, clip)
    errors = [
        float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        for found, expected in ((got.norms_B, right.norms_B), (got.sum_D, right.sum_D))
    ]
    if not max(errors) <= SUM_TOLERANCE:
        raise SentinelError(
            f"The clipped sum differs by {max(errors):.2g} from the one of one-at-a-time gradients "
            f"(allowed {SUM_TOLERANCE:g}): the clip would not be the one that is accounted."
        )


def _vanishing(names: Sequence[str], reference: Sequence[torch.Tensor]) -> frozenset[str]:
    total = float(torch.stack([g.norm() for g in reference]).norm())
    return frozenset(n for n, g in zip(names, reference, strict=True) if float(g.norm()) <= VANISHING * total)


def _compare(
    names: Sequence[str],
    found: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    vanishing: frozenset[str],
) -> float:
    worst = 0.0
    total = float(torch.stack([g.norm() for g in reference]).norm())
    for name, got, wanted in zip(names, found, reference, strict=True):
        scale = total if name in vanishing else float(wanted.norm())
        error = float((got - wanted).norm()) / scale
        if not error <= TOLERANCE:
            raise SentinelError(
                f"The per-example gradient of {name} differs from one-at-a-time autograd by {error:.2g} "
                f"(allowed {TOLERANCE:g}): its clipping would not bound one example's influence."
            )
        worst = max(worst, error)
    return worst
