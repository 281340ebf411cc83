"""The last block for its first token alone, where the head reads nothing else.

A classifier of the BERT or ViT kind reads its first token. Behind the attention of the last block every token goes its
own way, so the other tokens' share of that block (its output projection and feed-forward part, 9/12 of the products,
and all of their backward pass) is computed for nobody; nor do they need to attend. Where the last block ends in an
``attention.output`` layer of (attended, residual), both are cut to the first token there, and in its attention only
that token asks; whether the model's logits are then the same is tried out, and where they are not, it is left alone.

Shape suffixes: B examples, S tokens, H hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from privfed.models.examples import Examples, LabelledExamples

TOLERANCE = 1e-4
_PROBES = 4
_NAME = "privfed_first_token"


@contextmanager
def first_token_only(module: nn.Module, examples: Examples) -> Iterator[bool]:
    """Run the body with the last block cut to its first token, where that leaves the logits as they are.

    Yields whether it is cut. Nothing is changed for models without such a block and for heads on features.

    Args:
        module: A classifier, in any mode; without dropout.
        examples: What it is run on; the longest four are tried.
    """
    place = _last_attention(module)
    if place is None or not isinstance(examples, LabelledExamples):
        yield False
        return
    rows = np.argsort(examples.lengths, kind="stable")[-_PROBES:]
    with torch.no_grad():
        batch = examples.batch(rows)
        wanted = examples.logits(module, batch)
        handle = place.output.register_forward_pre_hook(_cut)
        same = _equal(module, examples, batch, wanted)
        restore = _ask_for_first(place) if same else _nothing
        if not _equal(module, examples, batch, wanted):
            restore()
            restore = _nothing
    if not same:
        handle.remove()
    try:
        yield same
    finally:
        restore()
        handle.remove()


def _equal(module: nn.Module, examples: LabelledExamples, batch: Any, wanted: torch.Tensor) -> bool:
    try:
        found = examples.logits(module, batch)
    except (RuntimeError, IndexError, TypeError, ValueError):  # a head that wants every token
        return False
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def _cut(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cut the tensors [B, S, H] among the arguments to [B, 1, H]."""
    return tuple(a[:, :1] if isinstance(a, torch.Tensor) and a.dim() == 3 else a for a in args)


def _nothing() -> None:
    """Undo nothing."""


def _ask_for_first(attention: Any) -> Callable[[], None]:
    """Let only the first token of this attention ask, by transformers' interface; return what undoes it."""
    inner = getattr(attention, "self", attention)
    before = getattr(inner, "config", None)
    if before is None or not hasattr(before, "_attn_implementation"):
        return _nothing
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _first_asks)
    inner.config = copy.copy(before)
    inner.config._attn_implementation = _NAME

    def restore() -> None:
        inner.config = before

    return restore


def _first_asks(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the first token's attention [B, S, heads, H / heads], repeated for the others: they are cut off next."""
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    found = nn.functional.scaled_dot_product_attention(query[:, :, :1], key, value, attn_mask=mask, scale=scaling)
    return found.transpose(1, 2).expand(-1, query.shape[2], -1, -1), None


def _last_attention(module: nn.Module) -> Any:
    """Return ``attention`` of the last of the model's blocks, where it has an ``output``, or None."""
    for _, blocks in module.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) and len({type(block) for block in blocks}) == 1:
            attention = getattr(blocks[-1], "attention", None)
            if isinstance(getattr(attention, "output", None), nn.Module):
                return attention
    return None
