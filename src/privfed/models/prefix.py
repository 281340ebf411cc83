"""Frozen-prefix caching: blocks below the first trained one see the same input in every step, so run them once.

Shape suffixes: B examples, S tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from privfed.models.examples import ModelExamples, Rows, microbatches

# relative difference of logits with and without the cache: padding changes the order of float32 sums
TOLERANCE = 1e-4


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass once the prefix is through."""


class FrozenPrefix:
    """A model whose first ``depth`` transformer blocks can be replaced by their stored output.

    While no states are set, the model runs as it was.

    Args:
        blocks: The model's list of blocks.
        depth: How many of them are frozen, at least 1.
    """

    def __init__(self, blocks: nn.ModuleList, depth: int) -> None:
        self.depth = depth
        self._later = [id(tensor) for block in list(blocks)[depth:] for tensor in _tensors(block)]
        self._last = blocks[depth - 1]
        self._states_BSH: torch.Tensor | None = None
        for block in list(blocks)[: depth - 1]:
            self._skip(block)
        self._replay(self._last)

    def read(self, module: nn.Module, head: str | None) -> list[torch.Tensor]:
        """Return the tensors of ``module`` that the states may depend on: all but later blocks' and the head's."""
        names = {id(t): n for n, t in (*module.named_parameters(), *module.named_buffers())}
        of_head = f"{head}." if head else "\0"
        return [t for t in _tensors(module) if id(t) not in self._later and not names[id(t)].startswith(of_head)]

    @contextmanager
    def states(self, states_BSH: torch.Tensor | None) -> Iterator[None]:
        """Run the body's forward passes from these states [B, S, H]; None for the whole model."""
        self._states_BSH = states_BSH
        try:
            yield
        finally:
            self._states_BSH = None

    def compute(self, module: nn.Module, examples: ModelExamples, size: int = 64) -> list[torch.Tensor]:
        """Return each example's states after the prefix [its own S, H]."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        captured: list[torch.Tensor] = []

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)
            raise _Stop

        handle = self._last.register_forward_hook(stop)
        module.eval()
        try:
            with torch.no_grad():
                for rows in microbatches(examples, np.arange(len(examples)), size):
                    captured.clear()
                    try:
                        examples.logits(module, examples.batch(rows))
                    except _Stop:
                        self._keep(found, rows, captured[-1], examples)
        finally:
            handle.remove()
        return found

    @staticmethod
    def _keep(found: list[torch.Tensor], rows: Rows, states_BSH: torch.Tensor, examples: ModelExamples) -> None:
        for position, row in enumerate(rows):
            found[row] = states_BSH[position, : examples.lengths[row]].clone()

    def _skip(self, block: nn.Module) -> None:
        run = block.forward
        block.forward = lambda hidden, *args, **kwargs: (
            run(hidden, *args, **kwargs) if self._states_BSH is None else hidden
        )

    def _replay(self, block: nn.Module) -> None:
        run = block.forward
        block.forward = lambda hidden, *args, **kwargs: (
            run(hidden, *args, **kwargs) if self._states_BSH is None else self._states_BSH
        )


def find_prefix(module: nn.Module, head: str | None) -> FrozenPrefix | None:
    """Return the frozen prefix of ``module``, or None where the first block, or something before it, is trained.

    Args:
        module: The tuned model.
        head: Name of its head, which comes after the blocks; None for a language model, whose head may be tied to
            its first layer.
    """
    trained = [n for n, p in module.named_parameters() if p.requires_grad and not (head and n.startswith(head))]
    for name, blocks in module.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 1 and len({type(b) for b in blocks}) == 1:
            inside = [n for n in trained if n.startswith(f"{name}.")]
            if not inside or len(inside) != len(trained):
                return None
            first = min(int(n.removeprefix(f"{name}.").split(".")[0]) for n in inside)
            return FrozenPrefix(blocks, first) if first else None
    return None


def attach(
    module: nn.Module,
    prefix: FrozenPrefix,
    *splits: ModelExamples,
    states: Callable[[ModelExamples], list[torch.Tensor]] | None = None,
) -> bool:
    """Compute and attach the prefix's states to each split; return whether they reproduce the logits.

    Models whose blocks take or return something unusual are left to run whole. States are computed and compared in
    full precision whatever the splits run in.

    Args:
        module: The tuned model.
        prefix: Its frozen prefix.
        splits: Examples to attach states to.
        states: Gives the states of a split, where they need not be computed; None computes them.
    """
    autocast = [examples.autocast for examples in splits]
    give = states or (lambda examples: prefix.compute(module, examples))
    try:
        for examples in splits:
            examples.autocast = False
        fits = all(_fits(module, prefix, examples, give) for examples in splits)
    finally:
        for examples, before in zip(splits, autocast, strict=True):
            examples.autocast = before
    if not fits:
        for examples in splits:
            examples.use_prefix(None, [])
    return fits


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _fits(
    module: nn.Module,
    prefix: FrozenPrefix,
    examples: ModelExamples,
    states: Callable[[ModelExamples], list[torch.Tensor]],
) -> bool:
    rows = np.arange(min(4, len(examples)))
    with torch.no_grad():
        wanted = examples.logits(module.eval(), examples.batch(rows))
    examples.use_prefix(prefix, states(examples))
    with torch.no_grad():
        found = examples.logits(module, examples.batch(rows))
    return torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
