"""A client's local training: plain steps, or DP-SGD.

Shape suffix: D trained values.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privfed.errors import ClientError, DeadlineError
from privfed.federation.pairs import only_training, write_named
from privfed.models.examples import Batch, Examples, losses, microbatches
from privfed.models.language import LanguageExamples
from privfed.privacy.noise import privatise_sum
from privfed.privacy.per_example import PerExampleModel
from privfed.rng import PrivateStream
from privfed.schedule import ClientConfig
from privfed.tuning.layout import read_flat, trained, write_flat
from privfed.types import Float32, ParamLayout, Shard

StepDone = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleDp:
    """Example-level DP-SGD: the clip and the noise multiplier; None where the noise is added to the sum of all clients.

    Then there is nothing to step with, and only ``LocalTrainer.gradient_sum`` works.
    """

    l2_clip_norm: float
    noise_multiplier: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a round asks of a client beside training.

    Attributes:
        active: Names of the tensors to train; None for all trained ones.
        frozen: Values to set by name before training, of tensors that are not trained.
        correction_D: Added to each step's gradient, after clipping and noise where there is privacy; only where all
            tensors are trained.
        support: By name, 1 where a tensor is trained and 0 where it stands still; tensors that are not named are
            trained. It must not depend on data.
    """

    active: frozenset[str] | None = None
    frozen: Mapping[str, Float32] = field(default_factory=dict, repr=False)
    correction_D: Float32 | None = field(default=None, repr=False)
    support: Mapping[str, Float32] = field(default_factory=dict, repr=False)


class LocalTrainer:
    """Trains one module on any client's shard; the federation's clients of one process share it.

    Args:
        module: The model (or the head alone); its trained parameters are what moves.
        head_prefix: Names starting with this get ``head_learning_rate``; None where the model has no head.
        examples: All examples; a shard picks its rows.
        config: The ``[client]`` table.
        dp: Clip and noise of DP-SGD, or None for plain steps.
        packing: Tokens of a sequence that several records of a language model share in plain steps; 0 for one each.
    """

    def __init__(
        self,
        module: nn.Module,
        head_prefix: str | None,
        examples: Examples,
        config: ClientConfig,
        dp: ExampleDp | None,
        packing: int = 0,
    ) -> None:
        self.module = module
        self.examples = examples
        self.config = config
        self.dp = dp
        self.packing = packing
        self._head_prefix = head_prefix
        # made on first use: only one phase at a time may hook the layers that phases share
        self._per_example: PerExampleModel | None = None
        self._hooked: frozenset[str] | None = None

    def close(self) -> None:
        """Take the per-example hooks off the module."""
        if self._per_example:
            self._per_example.close()
            self._per_example = None

    def run(
        self, params_D: Float32, shard: Shard, stream: PrivateStream, on_step: StepDone, work: Work | None = None
    ) -> Float32:
        """Train from ``params_D`` and return new minus old parameters [D], 0 where nothing was trained.

        With DP, the returned vector is a post-processing of ``local_steps`` Poisson-sampled Gaussian mechanisms
        on the shard, each of sensitivity ``l2_clip_norm`` under add-or-remove-one-example (Abadi et al. 2016). The
        proximal term and a rule's correction are added to the noised gradient: they read the weights (themselves
        such a post-processing) and what was broadcast, never the data.

        Args:
            params_D: The parameters to start from: the round's global ones, and the client's personal ones.
            shard: The client's rows.
            stream: The client's private stream of this round: batches and noise are drawn from it.
            on_step: Told (step, steps) after each step.
            work: What else the round asks for.

        Raises:
            ClientError: If a gradient or the result is not finite.
            DeadlineError: If training takes longer than ``deadline_s``.
        """
        work = work or Work()
        write_flat(self.module, params_D)
        write_named(self.module, work.frozen)
        self.module.train()
        self._hook_only(work.active)  # before anything is frozen: hooks that go leave their tensors trainable
        with only_training(self.module, work.active):
            self._steps(shard, stream, on_step, self._nudges(work))
        delta_D = read_flat(self.module) - params_D
        if not np.isfinite(delta_D).all():
            raise ClientError("The local update is not finite (NaN or infinity): lower client.learning_rate.")
        return delta_D

    def gradient_sum(
        self, params_D: Float32, shard: Shard, stream: PrivateStream, on_step: StepDone
    ) -> NDArray[np.float64]:
        """Return the sum of clipped per-example gradients [D] at ``params_D`` over one Poisson batch, *without noise*.

        One example adds a vector of norm at most ``l2_clip_norm``; whoever sends the sum on has to hide it.

        Args:
            params_D: The parameters.
            shard: The client's rows.
            stream: The client's private stream of this round: the batch is drawn from it.
            on_step: Told (1, 1) at the end.

        Raises:
            ClientError: If a gradient is not finite, or the trainer has no clip.
            DeadlineError: If it takes longer than ``deadline_s``.
        """
        write_flat(self.module, params_D)
        self.module.train()
        with deadline(self.config.deadline_s):
            sums = self._clipped_sums(next(self._batches(shard, stream)))
            on_step(1, 1)
        return np.concatenate([sums[name] for name, _ in trained(self.module)])

    def rates(self, layout: ParamLayout) -> NDArray[np.float64]:
        """Return the learning rate of each value of ``layout`` [D]."""
        head = self.config.head_learning_rate or self.config.learning_rate
        rates = [head if in_head(name, self._head_prefix) else self.config.learning_rate for name in layout.names]
        return np.repeat(np.array(rates, dtype=np.float64), layout.sizes)

    def _steps(self, shard: Shard, stream: PrivateStream, on_step: StepDone, nudge: Callable[[], None]) -> None:
        optimizer = self._optimizer()
        batches = self._batches(shard, stream)
        with deadline(self.config.deadline_s):
            for step, rows in enumerate(batches, start=1):
                if self.dp:
                    self._private_gradient(rows, self.config.expected_batch(len(shard)), stream)
                else:
                    self._plain_gradient(rows)
                nudge()
                optimizer.step()
                on_step(step, self.config.local_steps)

    def _hook_only(self, active: frozenset[str] | None) -> None:
        """Per-example hooks belong to one set of trained tensors; another set needs others."""
        if active != self._hooked:
            self.close()
            self._hooked = active

    def _nudges(self, work: Work) -> Callable[[], None]:
        """Return what adds the proximal term (FedProx, arXiv 1812.06127) and the correction to the gradients.

        Where the support is 0 they are then set to 0: noise that they had there is thrown away.

        The module holds the round's start when this is called.
        """
        mu, correction_D = self.config.proximal_mu, work.correction_D
        if not mu and correction_D is None and not work.support:
            return lambda: None
        active = trained(self.module)
        support = {
            name: torch.from_numpy(work.support[name]).to(p.device) for name, p in active if name in work.support
        }
        start = {name: parameter.detach().clone() for name, parameter in active} if mu else {}
        extra: dict[str, torch.Tensor] = {}
        if correction_D is not None:
            parts = torch.split(torch.from_numpy(correction_D), [p.numel() for _, p in active])
            extra = {name: part.view_as(p).to(p.device) for (name, p), part in zip(active, parts, strict=True)}

        def nudge() -> None:
            for name, parameter in active:
                if parameter.grad is None:
                    continue
                if mu:
                    parameter.grad.add_(parameter.detach() - start[name], alpha=mu)
                if name in extra:
                    parameter.grad.add_(extra[name])
                if name in support:
                    parameter.grad.mul_(support[name])

        return nudge

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        named = trained(self.module)
        head = [p for name, p in named if in_head(name, self._head_prefix)]
        rest = [p for name, p in named if not in_head(name, self._head_prefix)]
        groups = [
            {"params": rest, "lr": config.learning_rate},
            {"params": head, "lr": config.head_learning_rate or config.learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "adamw":
            return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)

    def _batches(self, shard: Shard, stream: PrivateStream) -> Iterator[NDArray[np.int64]]:
        """Yield each step's rows: Poisson-sampled with DP (may be empty), shuffled without."""
        size = len(shard)
        if self.dp:
            probability = self.config.probability(size)
            for _ in range(self.config.local_steps):
                yield shard.indices[stream.bernoulli(probability, size)]
            return
        rng = stream.generator()
        wanted = min(size, max(1, round(self.config.expected_batch(size))))
        order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        for _ in range(self.config.local_steps):
            if len(order) < wanted:
                order = rng.permutation(shard.indices)
            yield order[:wanted]
            order = order[wanted:]

    def _plain_gradient(self, rows: NDArray[np.int64]) -> None:
        for _, parameter in trained(self.module):
            parameter.grad = None
        for piece in microbatches(self.examples, rows, self.config.physical_batch_size):
            loss = losses(self.examples, self.module, self._batch(piece)).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        if self.packing and isinstance(self.examples, LanguageExamples):
            return self.examples.packed(rows, self.packing)
        return self.examples.batch(rows)

    def _private_gradient(self, rows: NDArray[np.int64], expected_batch: float, stream: PrivateStream) -> None:
        """Set ``grad`` to (sum of clipped per-example gradients + noise) / expected batch size.

        An empty batch never meets the model: its gradient is noise alone, and the step is taken and counted.
        """
        if self.dp is None or self.dp.noise_multiplier is None:
            raise ClientError("This trainer has no noise of its own to step with.")
        sum_D, parameters = self._clipped_sum(rows)
        noised_D = privatise_sum(
            sum_D.numpy(),
            standard_deviation=self.dp.noise_multiplier * self.dp.l2_clip_norm,
            stream=stream,
            sensitivity=self.dp.l2_clip_norm,
        )
        self._set_gradient(noised_D / expected_batch, parameters)

    def _clipped_sums(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Return the sum of clipped gradients by the tensor's name, flat."""
        sum_D, parameters = self._clipped_sum(rows)
        parts = torch.split(sum_D, [p.numel() for p in parameters])
        by_tensor = {id(p): part.numpy() for p, part in zip(parameters, parts, strict=True)}
        return {name: by_tensor[id(p)] for name, p in trained(self.module)}

    def _clipped_sum(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, list[nn.Parameter]]:
        """Return the sum of the rows' clipped gradients, in float64, and the parameters in its order."""
        if self.dp is None:
            raise ClientError("This trainer has no privacy settings.")
        if self._per_example is None:
            self._per_example = PerExampleModel(self.module)
        model = self._per_example
        parameters = model.parameters
        sum_D = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for piece in microbatches(self.examples, rows, self.config.physical_batch_size):
            model.clipped_sum(
                lambda module, batch: losses(self.examples, module, batch),
                self.examples.batch(piece),
                len(piece),
                self.dp.l2_clip_norm,
                into_D=sum_D,
            )
        return sum_D, parameters

    @staticmethod
    def _set_gradient(mean_D: NDArray[np.float64], parameters: list[nn.Parameter]) -> None:
        flat = torch.from_numpy(mean_D).float()
        parts = torch.split(flat, [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.device)


def in_head(name: str, prefix: str | None) -> bool:
    """Return whether a trained tensor belongs to the head; ``""`` is the prefix of a module that is all head."""
    return prefix is not None and name.startswith(prefix)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise DeadlineError in the body once ``seconds`` have passed.

    In the main thread an alarm interrupts even a body that sleeps or loops; elsewhere (and where there are no
    alarms) the time is only looked at when the body ends.
    """
    started = time.monotonic()
    message = f"The client did not finish within its deadline of {seconds:g} s (client.deadline_s)."
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        if time.monotonic() - started > seconds:
            raise DeadlineError(message)
        return

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise DeadlineError(message)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
