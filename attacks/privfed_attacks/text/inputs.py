"""What goes into the layers of the public model, and which layers see each token before tokens are mixed.

A trained matrix W of a linear layer has the gradient  dW = sum over tokens of (output gradient) x (input)ᵀ : its rows
lie in the span of the layer's inputs. That holds as it is for a dense layer, for LoRA's A (its input is the layer's)
and for LoRA's B (its input is A x). Which trained tensors are such matrices, and what their inputs are for given
tokens, is read off the running model by hooks, so no architecture is known by name.

Shape suffixes: N sequences, S positions, d width of an input, n rows of a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privfed.models.examples import device_of

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A trained matrix whose gradient has its rows in the span of its layer's inputs.

    Attributes:
        tensor: Name of the trained tensor.
        module: Name of its layer.
        columns: Whether it is stored transposed (GPT-2's Conv1D): its columns are the rows meant here.
    """

    tensor: str
    module: str
    columns: bool

    def rows(self, gradient: NDArray[np.float32]) -> Array:
        """Return a gradient's rows [n, d]."""
        found = gradient.astype(np.float64)
        return found.T if self.columns else found


class _Enough(Exception):  # noqa: N818  (no error: the forward pass has gone far enough)
    pass


def sites(module: nn.Module, names: Sequence[str]) -> list[Site]:
    """Return the trained matrices of linear layers among ``names``."""
    layers = dict(module.named_modules())
    found = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        layer = layers.get(owner)
        if leaf != "weight" or layer is None:
            continue
        if isinstance(layer, nn.Linear):
            found.append(Site(tensor=name, module=owner, columns=False))
        elif type(layer).__name__ == "Conv1D":
            found.append(Site(tensor=name, module=owner, columns=True))
    return found


def inputs(
    module: nn.Module,
    wanted: Sequence[Site],
    ids_NS: torch.Tensor,
    mask_NS: torch.Tensor | None = None,
    *,
    embeddings: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the inputs of some layers [N, S, d] by site; the forward pass ends once all of them are there.

    Args:
        module: The model.
        wanted: The sites.
        ids_NS: Tokens.
        mask_NS: 1 for a token, 0 for padding; None for no padding.
        embeddings: Token embeddings [N, S, e] in place of the tokens.
    """
    device = device_of(module)
    mask_NS = torch.ones_like(ids_NS) if mask_NS is None else mask_NS
    given: dict[str, Any] = {"attention_mask": mask_NS.to(device)}
    given |= {"input_ids": ids_NS.to(device)} if embeddings is None else {"inputs_embeds": embeddings.to(device)}
    return captured(module, wanted, given)


def captured(module: nn.Module, wanted: Sequence[Site], given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the inputs of some layers by site, for what the model is called with."""
    found: dict[str, torch.Tensor] = {}
    with _capturing(module, wanted, found), contextlib.suppress(_Enough):
        module(**given)
    return found


@contextlib.contextmanager
def _capturing(module: nn.Module, wanted: Sequence[Site], into: dict[str, torch.Tensor]) -> Iterator[None]:
    layers = dict(module.named_modules())
    handles = []
    for site in wanted:

        def take(_layer: nn.Module, args: tuple[Any, ...], tensor: str = site.tensor) -> None:
            into[tensor] = args[0]
            if len(into) == len(wanted):
                raise _Enough

        handles.append(layers[site.module].register_forward_pre_hook(take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sites whose layers get the same input, so that the rows of their gradients lie in one span.

    Attributes:
        depth: 0 if the input of a position depends on the token there alone; else how many groups of other inputs
            come before it in the forward pass, so that 1 is the first after tokens were mixed.
        positional: Whether it depends on the position as well.
    """

    sites: tuple[Site, ...]
    depth: int
    positional: bool

    @property
    def first(self) -> Site:
        """The site whose input stands for all."""
        return self.sites[0]


@torch.no_grad()
def groups(module: nn.Module, names: Sequence[str], vocabulary: int, length: int = 8) -> list[Group]:
    """Return the model's sites by common input, in the order of the forward pass.

    Layers without an input for every token (a classifier on the first one) are left out.

    Args:
        module: The model.
        names: The tensors that were observed.
        vocabulary: Number of tokens.
        length: Positions to try on.
    """
    draw = np.random.default_rng(0)
    ids = draw.integers(0, vocabulary, (3, length))
    ids[1] = ids[0]
    ids[1, length // 2] = (ids[0, length // 2] + 1) % vocabulary  # one token differs
    ids[2] = ids[0, 0]  # one token at every position
    wanted = sites(module, names)
    found = {name: x for name, x in inputs(module, wanted, torch.from_numpy(ids)).items() if x.dim() == 3}
    ordered = {site.tensor: site for site in wanted}
    shared: list[list[Site]] = []
    for name, x in found.items():  # in the order of the forward pass
        site = ordered[name]
        for group in shared:
            if found[group[0].tensor].shape == x.shape and torch.equal(found[group[0].tensor], x):
                group.append(site)
                break
        else:
            shared.append([site])
    made, depth = [], 0
    for members in shared:
        x = found[members[0].tensor]
        alone = _position_wise(x, length // 2)
        depth += not alone
        positional = not torch.allclose(x[2, 0], x[2, -1], rtol=1e-4, atol=1e-6)
        made.append(Group(sites=tuple(members), depth=0 if alone else depth, positional=positional))
    return made


def _position_wise(x: torch.Tensor, changed: int) -> bool:
    others = [position for position in range(x.shape[1]) if position != changed]
    return torch.allclose(x[0, others], x[1, others], rtol=1e-5, atol=1e-7)


@torch.no_grad()
def dictionary(
    module: nn.Module, site: Site, tokens: NDArray[np.int64], positions: int, chunk: int = 1024
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Yield (tokens [N], their inputs at each position [N, S, d]) in chunks.

    Args:
        module: The model.
        site: A site whose input depends on the token alone, or on token and position.
        tokens: The tokens to try.
        positions: S.
        chunk: Tokens at a time times positions.
    """
    step = max(1, chunk * 16 // positions)
    for start in range(0, len(tokens), step):
        some = tokens[start : start + step]
        ids = torch.from_numpy(some)[:, None].expand(-1, positions).contiguous()
        yield some, inputs(module, [site], ids)[site.tensor].float()


def fingerprint(module: nn.Module, site: Site, vocabulary: int) -> bytes:
    """Return what tells two sets of parameters apart that give tokens other inputs."""
    ids = torch.arange(0, vocabulary, max(1, vocabulary // 8))[None, :8]
    with torch.no_grad():
        return bytes(inputs(module, [site], ids)[site.tensor].cpu().numpy().tobytes())


def masked_batch(sequences: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences as (tokens [N, S], mask [N, S]), padded on the right."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), padding, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(list(sequence))
        mask[row, : len(sequence)] = 1
    return ids, mask


def payload_rows(group: Group, payload: Mapping[str, NDArray[np.float32]]) -> list[tuple[Site, Array]]:
    """Return each site's rows [n, d] of a payload, those it has."""
    return [(site, site.rows(payload[site.tensor])) for site in group.sites if site.tensor in payload]
