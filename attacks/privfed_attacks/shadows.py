"""Shadow models at the price of a few: many adapters trained side by side over one frozen base.

An attacker's K reference models differ in nothing but their trained tensors and the rows that they see, so those
tensors are stacked and all K take each step together: one forward and one backward pass under ``torch.func.vmap``, in
which a head or a LoRA factor becomes a batched matrix product and everything that does not depend on the stack (the
frozen layers below the first trained one, where rows are shared, and all weights) is there once. Blocks below the
first trained one are replaced by their stored output (``privfed.models.prefix``), and where only the head trains, the
model by its features (``head_features``); of the last block, only what the head reads is computed (``first_token``).
Each stacked model ends where training it alone would, to rounding.

One in/out matrix says which model sees which example, each example in half of the models, so every model is another's
reference and each can play the attacked one (Carlini et al. 2022, section V-A).

Shape suffixes: K models, Q examples, B rows of a step, D trained values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from privfed.errors import ConfigError, ModelError
from privfed.models.examples import Batch, Examples, device_of
from privfed.privacy.per_example.units import following
from privfed.privacy.per_example.whole import map_batch
from privfed.schedule import ClientConfig
from privfed.tuning.layout import trained
from privfed.types import Float32
from privfed_attacks.first_token import first_token_only

Bits = NDArray[np.bool_]
Rows = NDArray[np.int64]
Stacked = dict[str, torch.Tensor]
_PIECES = 4
_LEAST_ROWS = 4


def in_out_matrix(models: int, examples: int, rng: np.random.Generator) -> Bits:
    """Return which model sees which example [K, Q]: each example is in exactly half of the models.

    Raises:
        ConfigError: If ``models`` is odd or below 2.
    """
    if models < 2 or models % 2:
        raise ConfigError(
            f"Each example is to be in half of the models: expected an even number of them, got {models}."
        )
    order = np.argsort(rng.random((models, examples)), axis=0)
    return np.asarray(np.argsort(order, axis=0) < models // 2)


def shuffled_steps(members: Rows, wanted: int, steps: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Yield each step's rows of one model: shuffled passes over its members, as a client without privacy takes them.

    Args:
        members: Rows that the model sees.
        wanted: Rows a step.
        steps: Steps.
        rng: This model's stream.
    """
    order: Rows = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < wanted:
            order = rng.permutation(members)
        yield order[:wanted]
        order = order[wanted:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadows:
    """K models that differ in their trained tensors.

    Attributes:
        module: The frozen base with the tuning on it; its own trained values do not matter.
        stacked: Each trained tensor by name, one more dimension in front [K, ...].
        members_KQ: Which model saw which example.
    """

    module: nn.Module = field(repr=False)
    stacked: Stacked = field(repr=False)
    members_KQ: Bits = field(repr=False)

    def __len__(self) -> int:
        return len(self.members_KQ)

    def flat(self) -> Float32:
        """Return the trained values [K, D], in the layout's order."""
        return torch.cat([t.detach().flatten(1) for t in self.stacked.values()], dim=1).cpu().numpy()

    def losses(self, examples: Examples, rows: Rows | None = None, *, size: int = 64) -> NDArray[np.float64]:
        """Return each example's loss on each model [K, Q], without dropout.

        Of classes, from the logits in float64: a loss of 1e-12 stays one, which float32 would round to 0.

        Args:
            examples: Of the attacker.
            rows: Which; None for all.
            size: Examples a pass, which is over all models.
        """
        rows = np.arange(len(examples)) if rows is None else rows
        found = np.empty((len(self), len(rows)))
        order = np.argsort(examples.lengths[rows], kind="stable")
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad(), first_token_only(self.module, examples):
                for start in range(0, len(rows), size):
                    piece = order[start : start + size]
                    values = _vmapped(self.module, self.stacked, examples, examples.batch(rows[piece]), shared=True)
                    found[:, piece] = values.double().cpu().numpy()
        finally:
            self.module.train(was_training)
        return found


def train_side_by_side(
    module: nn.Module,
    examples: Examples,
    members_KQ: Bits,
    config: ClientConfig,
    rngs: Sequence[np.random.Generator],
    *,
    head_prefix: str | None = None,
    group: int | None = None,
) -> Shadows:
    """Train one model for each row of the in/out matrix, all from the module's present trained values.

    Optimiser, learning rates, steps and batch size are those of a client's plain local training; each model's rows come
    from its own stream, so the result is that of ``privfed``'s local training of each alone.

    Args:
        module: The tuned model, or a head alone; it is left as it came.
        examples: What is trained on.
        members_KQ: Which model sees which of them.
        config: The ``[client]`` table. Batches have round(batch_size) rows, or all members where there are fewer.
        rngs: One stream a model.
        head_prefix: Names starting with this get ``head_learning_rate``.
        group: Models a pass, to bound memory; None for all.

    Raises:
        ConfigError: If streams and models differ in number, or a model has no members, or the table asks
            for a proximal term.
        ModelError: If the module cannot be stacked (dropout draws, layers that vmap cannot follow).
    """
    if len(rngs) != len(members_KQ):
        raise ConfigError(f"Expected a stream for each of {len(members_KQ)} models, got {len(rngs)}.")
    if not members_KQ.any(axis=1).all():
        raise ConfigError("A shadow model has no example to train on: take more examples or fewer models.")
    if config.proximal_mu:
        raise ConfigError("Shadow models side by side have no proximal term: set client.proximal_mu = 0.")
    _check_dropout(module)
    group = group or len(members_KQ)
    parts = [
        _train_group(module, examples, members_KQ[at : at + group], config, rngs[at : at + group], head_prefix)
        for at in range(0, len(members_KQ), group)
    ]
    stacked = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Shadows(module=module, stacked=stacked, members_KQ=members_KQ)


def _train_group(
    module: nn.Module,
    examples: Examples,
    members_KQ: Bits,
    config: ClientConfig,
    rngs: Sequence[np.random.Generator],
    head_prefix: str | None,
) -> Stacked:
    models = len(members_KQ)
    stacked = {name: p.detach().expand(models, *p.shape).clone().requires_grad_(True) for name, p in trained(module)}
    optimizer = _optimizer(stacked, config, head_prefix)
    members = [np.flatnonzero(bits) for bits in members_KQ]
    wanted = [min(len(own), max(1, round(config.expected_batch(len(own))))) for own in members]
    streams = [
        shuffled_steps(own, size, config.local_steps, rng) for own, size, rng in zip(members, wanted, rngs, strict=True)
    ]
    was_training = module.training
    module.train()
    try:
        with first_token_only(module, examples):
            for rows_K in zip(*streams, strict=True):
                optimizer.zero_grad()
                _add_gradients(module, stacked, examples, rows_K)
                optimizer.step()
    finally:
        module.train(was_training)
    return {name: tensor.detach() for name, tensor in stacked.items()}


def _add_gradients(module: nn.Module, stacked: Stacked, examples: Examples, rows_K: Sequence[Rows]) -> None:
    """Add the gradient of each model's mean loss over its own rows.

    Rows go through in pieces of about equal length, since a piece is padded to the longest of all models' rows in it;
    batches that differ in size are filled up with rows of weight 0.
    """
    size = max(len(rows) for rows in rows_K)
    filled_KB = np.stack([np.concatenate([rows, np.repeat(rows[:1], size - len(rows))]) for rows in rows_K])
    counts_K = np.array([len(rows) for rows in rows_K])
    weights_KB = (np.arange(size) < counts_K[:, None]) / counts_K[:, None]
    order_KB = np.argsort(examples.lengths[filled_KB], axis=1, kind="stable")
    filled_KB = np.take_along_axis(filled_KB, order_KB, axis=1)
    weights = torch.from_numpy(np.take_along_axis(weights_KB, order_KB, axis=1)).float()
    width = max(_LEAST_ROWS, -(-size // _PIECES)) if np.ptp(examples.lengths) else size
    for start in range(0, size, width):
        piece_KB = filled_KB[:, start : start + width]
        flat = examples.batch(piece_KB.ravel())
        batch = map_batch(flat, lambda t, shape=piece_KB.shape: t.reshape(*shape, *t.shape[1:]))  # type: ignore[misc]
        found = _vmapped(module, stacked, examples, batch, shared=False)
        (found * weights[:, start : start + width].to(found.device)).sum().backward()  # type: ignore[no-untyped-call]


def _vmapped(module: nn.Module, stacked: Stacked, examples: Examples, batch: Batch, *, shared: bool) -> torch.Tensor:
    """Return the losses [K, B] of a batch that all models share, or of a stack of batches [K, B, ...]."""
    tensors: list[torch.Tensor] = []
    map_batch(batch, lambda t: tensors.append(t) or t)  # type: ignore[func-returns-value]
    whole = _Losses(module, examples).train(module.training)

    def one(own: Mapping[str, torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = iter(given)
        result: torch.Tensor = functional_call(whole, dict(own), (map_batch(batch, lambda _: next(rows)),))
        return result

    device = device_of(module)
    own = {f"module.{name}": tensor for name, tensor in stacked.items()}
    given = tuple(t.to(device) for t in tensors)
    # the fused attention has no rule for vmap: it would run model by model, and its backward pass in K^2
    with following(), sdpa_kernel(SDPBackend.MATH):
        found: torch.Tensor = vmap(one, in_dims=(0, None if shared else 0))(own, given)
    return found


class _Losses(nn.Module):
    """The losses of a module's batch as a module, so that its parameters can be replaced."""

    def __init__(self, module: nn.Module, examples: Examples) -> None:
        super().__init__()
        self.module = module
        self._examples = examples

    def forward(self, batch: Batch) -> torch.Tensor:
        logits = getattr(self._examples, "logits", None)
        if self.training or logits is None or batch.labels_B is None:
            return self._examples.losses(self.module, batch)
        return precise_losses(logits(self.module, batch), batch.labels_B)


def precise_losses(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Return log(1 + sum over other classes of exp(logit - the label's)) in float64 [B]."""
    exact = logits_BC.double()
    own = nn.functional.one_hot(labels_B, exact.shape[-1]).bool()
    margins = (exact - (exact * own).sum(dim=-1, keepdim=True)).masked_fill(own, -torch.inf)
    rest = torch.logsumexp(margins, dim=-1)
    return torch.logaddexp(torch.zeros_like(rest), rest)


def _optimizer(stacked: Stacked, config: ClientConfig, head_prefix: str | None) -> torch.optim.Optimizer:
    """Return a client's optimiser over the stack: every rule here works value by value, so stacking changes nothing."""

    def in_head(name: str) -> bool:
        return head_prefix is not None and name.startswith(head_prefix)

    head = [t for name, t in stacked.items() if in_head(name)]
    rest = [t for name, t in stacked.items() if not in_head(name)]
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": config.learning_rate},
        {"params": head, "lr": config.head_learning_rate or config.learning_rate},
    ]
    groups = [each for each in groups if each["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)


def _check_dropout(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            raise ModelError(
                f"Shadow models side by side cannot have dropout ({name}, p = {part.p:g}): set model.dropout = 0."
            )
