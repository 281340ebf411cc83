"""Planted bugs: what goes wrong in implementations of differential privacy, put into the code that trains.

Each mutant is a context manager that patches the shipped code while its body runs, and names the audit
(``privfed_audits.mutant_audits``) that catches it. Nothing in ``privfed`` knows of them.

Where a bug clips a mean instead of each example, noise stays what it was for sums that move by the clip at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from privfed.federation import local
from privfed.federation.local import LocalTrainer, in_head
from privfed.privacy import plan
from privfed.privacy.mechanisms.gaussian import GaussianAtWork
from privfed.privacy.noise import privatise_sum
from privfed.privacy.per_example import engine
from privfed.privacy.per_example.clipping import Clipped, clip
from privfed.rng import PrivateStream
from privfed.tuning.layout import trained

Planted = Callable[[], AbstractContextManager[None]]
Step = Callable[[LocalTrainer, NDArray[np.int64], float, PrivateStream], None]
WHOLE = 1e12
"""A clip that clips nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A planted bug.

    Attributes:
        planted: The context in which the bug is there.
        audit: Name of the audit that catches it.
        bug: What is wrong, in a clause.
    """

    planted: Planted
    audit: str
    bug: str


MUTANTS: dict[str, Mutant] = {}


def _mutant(audit: str, bug: str) -> Callable[[Callable[[], Iterator[None]]], Callable[[], Iterator[None]]]:
    def register(function: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
        MUTANTS[function.__name__] = Mutant(planted=contextmanager(function), audit=audit, bug=bug)
        return function

    return register


@_mutant("step", "half the noise")
def half_the_noise() -> Iterator[None]:
    """Draw noise of half the standard deviation."""
    with _noise(lambda deviation, _batch: deviation / 2):
        yield


@_mutant("step", "noise for a mean on a sum: too small by the batch size")
def noise_of_a_mean() -> Iterator[None]:
    """Divide the noise by the batch size though it is added to the sum."""
    with _noise(lambda deviation, batch: deviation / batch):
        yield


@_mutant("step", "no clipping")
def no_clipping() -> Iterator[None]:
    """Add gradients up as they are."""
    with patch.object(engine, "clip", lambda found, shapes, _norm, into_D=None: clip(found, shapes, WHOLE, into_D)):
        yield


@_mutant("step", "each batch's mean gradient is clipped instead of each example's")
def batch_clipped() -> Iterator[None]:
    """Clip the mean over what goes through the model at once."""

    def of_mean(found: Any, shapes: Any, norm: float, into_D: torch.Tensor | None = None) -> Clipped:
        whole = clip(found, shapes, WHOLE)
        mean_D = whole.sum_D / len(whole.norms_B)
        sum_D = whole.sum_D * min(1.0, norm / max(float(mean_D.norm()), 1e-30))
        if into_D is not None:
            into_D += sum_D
        return Clipped(sum_D=sum_D if into_D is None else into_D, norms_B=whole.norms_B)

    with patch.object(engine, "clip", of_mean):
        yield


@_mutant("step", "accumulated micro-batches are clipped as one")
def microbatches_clipped_as_one() -> Iterator[None]:
    """Accumulate whole gradients over micro-batches, and clip their mean once."""
    real = LocalTrainer._clipped_sum

    def accumulated(self: LocalTrainer, rows: NDArray[np.int64]) -> Any:
        norm = self.dp.l2_clip_norm if self.dp else WHOLE
        with patch.object(engine, "clip", lambda found, shapes, _norm, into_D=None: clip(found, shapes, WHOLE, into_D)):
            sum_D, parameters = real(self, rows)
        mean = float(sum_D.norm()) / max(1, len(rows))
        return sum_D * min(1.0, norm / max(mean, 1e-30)), parameters

    with patch.object(LocalTrainer, "_clipped_sum", accumulated):
        yield


@_mutant("step", "the head's gradients are left out of the clip")
def head_not_clipped() -> Iterator[None]:
    """Clip the gradients of everything but the head."""

    def apart(
        self: engine.PerExampleModel, loss: Any, batch: Any, size: int, norm: float, into_D: Any = None
    ) -> Clipped:
        found = self._pass(loss, batch, size)
        total_D = (
            torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64) if into_D is None else into_D
        )
        pieces = torch.split(total_D, [p.numel() for p in self.parameters])
        with torch.no_grad():
            for head, limit in ((False, norm), (True, WHOLE)):
                own = [i for i, name in enumerate(self.names) if in_head(name, HEAD) is head]
                part = clip([found[i] for i in own], [self.parameters[i].shape for i in own], limit)
                values = torch.split(part.sum_D, [self.parameters[i].numel() for i in own])
                for i, value in zip(own, values, strict=True):
                    pieces[i].add_(value)
        return Clipped(sum_D=total_D, norms_B=part.norms_B)

    with patch.object(engine.PerExampleModel, "clipped_sum", apart):
        yield


@_mutant("step", "no noise on the classifier head")
def head_not_noised() -> Iterator[None]:
    """Noise everything but the head."""
    real = LocalTrainer._private_gradient

    def apart(self: LocalTrainer, rows: NDArray[np.int64], expected_batch: float, stream: PrivateStream) -> None:
        real(self, rows, expected_batch, stream)
        sums = self._clipped_sums(rows)
        for name, parameter in trained(self.module):
            if in_head(name, self._head_prefix):
                bare = torch.from_numpy(sums[name] / expected_batch).float()
                parameter.grad = bare.view_as(parameter)

    with _stepping(apart):
        yield


@_mutant("rounds", "a noise seed that is reused over steps")
def noise_reused() -> Iterator[None]:
    """Draw the noise of every step from the start of one stream."""
    key = bytes(range(32))

    def same(
        sum_D: NDArray[np.float64], *, standard_deviation: float, stream: PrivateStream, sensitivity: float
    ) -> Any:
        del stream
        return privatise_sum(
            sum_D,
            standard_deviation=standard_deviation,
            stream=PrivateStream(key, "the same"),
            sensitivity=sensitivity,
        )

    with patch.object(local, "privatise_sum", same):
        yield


@_mutant("rounds", "noise once an epoch")
def noise_once_per_epoch() -> Iterator[None]:
    """Add noise in the first step of each epoch (1 / q steps), and none in the others."""
    real, counts = LocalTrainer._private_gradient, {"steps": 0}

    def seldom(self: LocalTrainer, rows: NDArray[np.int64], expected_batch: float, stream: PrivateStream) -> None:
        epoch = max(2, round(1 / self.config.probability(1)))
        counts["steps"] += 1
        if counts["steps"] % epoch == 1:
            real(self, rows, expected_batch, stream)
            return
        sum_D, parameters = self._clipped_sum(rows)
        self._set_gradient(sum_D.numpy() / expected_batch, parameters)

    with _stepping(seldom):
        yield


@_mutant("rounds", "the accountant takes a quarter of the sampling rate")
def wrong_sampling_rate() -> Iterator[None]:
    """Plan with the batch over all clients' records (four clients), where each client samples its own."""
    real = plan._stage

    def quarter(privacy: Any, phase: Any, probability: float) -> Any:
        return real(privacy, phase, probability / 4)

    with patch.object(plan, "_stage", quarter):
        yield


@_mutant("lonely", "an empty batch is skipped without noise")
def empty_batch_skipped() -> Iterator[None]:
    """Take no step where nobody was sampled."""
    real = LocalTrainer._private_gradient

    def skips(self: LocalTrainer, rows: NDArray[np.int64], expected_batch: float, stream: PrivateStream) -> None:
        if len(rows):
            real(self, rows, expected_batch, stream)
            return
        for _, parameter in trained(self.module):
            parameter.grad = torch.zeros_like(parameter)

    with _stepping(skips):
        yield


@_mutant("clients", "the mean of the clients' updates is clipped instead of each update")
def clip_after_aggregation() -> Iterator[None]:
    """Leave updates as they are and clip their average at the server."""
    real = GaussianAtWork.release

    def bare(self: GaussianAtWork, delta_D: Any, terms: Any) -> tuple[Any, float]:
        del terms
        return delta_D, self.clip

    def after(self: GaussianAtWork, sum_M: Any, moment: Any, keeper: Any, memory: Any) -> Any:
        if sum_M is not None:
            mean = float(np.linalg.norm(sum_M)) / self.cohort_size
            sum_M = sum_M * min(1.0, self.clip / max(mean, 1e-30))
        return real(self, sum_M, moment, keeper, memory)

    with patch.object(GaussianAtWork, "bounded", bare), patch.object(GaussianAtWork, "release", after):
        yield


HEAD = "classifier"


@contextmanager
def _noise(deviation: Callable[[float, float], float]) -> Iterator[None]:
    """Change the noise: from its multiplier and the expected batch to another multiplier."""
    real = LocalTrainer._private_gradient

    def other(self: LocalTrainer, rows: NDArray[np.int64], expected_batch: float, stream: PrivateStream) -> None:
        before = self.dp
        if before is None or before.noise_multiplier is None:
            raise ValueError("a trainer without noise has none to change")
        self.dp = replace(before, noise_multiplier=deviation(before.noise_multiplier, expected_batch))
        try:
            real(self, rows, expected_batch, stream)
        finally:
            self.dp = before

    with _stepping(other):
        yield


@contextmanager
def _stepping(step: Step) -> Iterator[None]:
    with patch.object(LocalTrainer, "_private_gradient", step):
        yield
