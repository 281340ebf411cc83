"""What a layer knows about its tensor's per-example gradients, in the form that costs least.

Every form gives the squared norm of each example's gradient, a weighted sum over the examples, and the gradients
themselves. Norms are never too small: a clip by such a norm would let an example through above the bound.

Shape suffixes: B examples of a microbatch, S positions (tokens, patches), L and R the two sides of a matrix,
V rows and H columns of a table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

_NORM_BLOCK = 1024
# examples whose gradients are added up in float32 before they go to the float64 sum
_SUM_EXAMPLES = 16
_EXACT_VALUES = 1 << 18
_CHUNK_VALUES = 1 << 26
_UNIT_ROUNDOFF = 2.0**-24
# a float32 sum of squares below this may have come out as zero
_TINY = 1e-17


class Contribution(ABC):
    """The per-example gradients of one tensor, or a part of them."""

    size: int

    @abstractmethod
    def squares(self) -> torch.Tensor:
        """Return the squared L2 norm of each example's gradient as float64 [B]; never an under-estimate."""

    @abstractmethod
    def add_to(self, out: torch.Tensor, factors_B: torch.Tensor) -> None:
        """Add sum_i factors_B[i] gradient_i to ``out`` (float64, of the tensor's shape)."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the gradients of the examples from ``start`` to ``stop`` in float32, [stop - start, ...]."""


def double(values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` as float64; on the CPU where the device (mps) has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def squares(values_BD: torch.Tensor) -> torch.Tensor:
    """Return the squared L2 norms [B] as float64, summed block by block.

    One float32 sum over millions of squares comes out too small by up to a percent.
    """
    size, width = values_BD.shape
    if width <= _NORM_BLOCK:
        return double(values_BD.norm(dim=1)).square()
    whole = width // _NORM_BLOCK * _NORM_BLOCK
    blocks = values_BD[:, :whole].reshape(size, whole // _NORM_BLOCK, _NORM_BLOCK)
    rest = double(values_BD[:, whole:].norm(dim=1)).square()
    return double(blocks.norm(dim=2)).square().sum(dim=1) + rest


def _chunks(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(size, start + step)


class Dense(Contribution):
    """The gradients themselves.

    Args:
        gradients: [B, ...].
    """

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients = gradients
        self.size = gradients.shape[0]

    def squares(self) -> torch.Tensor:
        return squares(self.flat().float())

    def add_to(self, out: torch.Tensor, factors_B: torch.Tensor) -> None:
        flat = self.flat()
        if flat.numel() <= _EXACT_VALUES:
            exact = double(flat)
            out += (factors_B.to(exact.device) @ exact).view_as(out).to(out.device)
            return
        factors = factors_B.to(flat.device, torch.float32)
        for start, stop in _chunks(self.size, _SUM_EXAMPLES):
            out += (factors[start:stop] @ flat[start:stop].float()).view_as(out).to(out.device)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.gradients[start:stop].float()

    def flat(self) -> torch.Tensor:
        """Return the gradients as [B, values]."""
        return self.gradients.reshape(self.size, math.prod(self.gradients.shape[1:]))


class Outer(Contribution):
    """A matrix whose gradient is sum_s left_s right_s^T: both sides are kept, the products are not.

    The norm is that of Goodfellow 2015 (arXiv 1510.01799) for sequences (Li et al. 2022, arXiv 2110.05679, section
    4): ||sum_s l_s r_s^T||^2 = sum_st (l_s . l_t)(r_s . r_t). Where positions cancel, rounding could make it too
    small, so a bound on the rounding is added: about 4 u sqrt(n) of (sum_s |l_s| |r_s|)^2, with u float32's unit
    roundoff and n the length of the products (Higham and Mary 2019, equation 1.4, with lambda = 4).

    Args:
        left_BSL: The matrix's rows' side.
        right_BSR: Its columns' side.
        shape: The tensor's shape; [L, R] reshaped.
    """

    def __init__(self, left_BSL: torch.Tensor, right_BSR: torch.Tensor, shape: torch.Size) -> None:
        self.left, self.right, self.shape = left_BSL, right_BSR, shape
        self.size = left_BSL.shape[0]

    def squares(self) -> torch.Tensor:
        return self.squares_and_mass()[0]

    def squares_and_mass(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared norms [B], and sum_s |left_s| |right_s| [B]."""
        left, right = self.left.float(), self.right.float()
        gram_left = double(torch.bmm(left, left.transpose(1, 2)))
        gram_right = double(torch.bmm(right, right.transpose(1, 2)))
        lengths_left = gram_left.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() + _TINY
        lengths_right = gram_right.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() + _TINY
        mass_B = (lengths_left * lengths_right).sum(dim=1)
        found_B = (gram_left * gram_right).sum(dim=(1, 2)).clamp(min=0) + self.rounding * mass_B.square()
        lost_B = _TINY * (lengths_left + lengths_right).sum(dim=1)
        return (found_B.sqrt() + lost_B).square(), mass_B

    @property
    def rounding(self) -> float:
        """The share of the squared mass by which the sum of products may be too small."""
        return 4 * _UNIT_ROUNDOFF * (math.sqrt(self.left.shape[2]) + math.sqrt(self.right.shape[2]))

    def add_to(self, out: torch.Tensor, factors_B: torch.Tensor) -> None:
        factors = factors_B.to(self.left.device, torch.float32)[:, None, None]
        wide = self.left.shape[2] > self.right.shape[2]
        target = out.view(self.left.shape[2], self.right.shape[2])
        for start, stop in _chunks(self.size, _SUM_EXAMPLES):
            left, right = self.left[start:stop].float(), self.right[start:stop].float()
            left, right = (left, right * factors[start:stop]) if wide else (left * factors[start:stop], right)
            target += (left.flatten(0, 1).T @ right.flatten(0, 1)).to(out.device)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        left, right = self.left[start:stop].float(), self.right[start:stop].float()
        return torch.bmm(left.transpose(1, 2), right).view(stop - start, *self.shape)


class Lookup(Contribution):
    """A table whose looked-up rows get the output's gradient.

    Args:
        ids_BS: The rows that were looked up.
        gradient_BSH: The output's gradient; zero where a row takes none (padding).
        shape: The table's shape [V, H].
    """

    def __init__(self, ids_BS: torch.Tensor, gradient_BSH: torch.Tensor, shape: torch.Size) -> None:
        self.ids, self.gradient, self.shape = ids_BS, gradient_BSH, shape
        self.size = ids_BS.shape[0]

    def squares(self) -> torch.Tensor:
        height, width = self.shape
        keys = self.ids + height * torch.arange(self.size, device=self.ids.device)[:, None]
        unique, place = torch.unique(keys, return_inverse=True)
        sums = self.gradient.new_zeros(len(unique), width)
        sums.index_add_(0, place.flatten(), self.gradient.reshape(-1, width))
        of_rows = squares(sums)
        owner = (unique // height).to(of_rows.device)
        return of_rows.new_zeros(self.size).index_add_(0, owner, of_rows)

    def add_to(self, out: torch.Tensor, factors_B: torch.Tensor) -> None:
        rows = double(self.gradient)
        rows = rows * factors_B.to(rows.device)[:, None, None]
        out.index_add_(0, self.ids.flatten().to(out.device), rows.flatten(0, 1).to(out.device))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        height, width = self.shape
        ids = self.ids[start:stop] + height * torch.arange(stop - start, device=self.ids.device)[:, None]
        found = self.gradient.new_zeros((stop - start) * height, width)
        found.index_add_(0, ids.flatten(), self.gradient[start:stop].reshape(-1, width))
        return found.view(stop - start, height, width)


class Sum(Contribution):
    """A tensor used in several ways: its gradient is the sum of all of them, and so is what has to be clipped.

    Args:
        parts: At least two.
    """

    def __init__(self, parts: Sequence[Contribution]) -> None:
        self.parts = parts
        self.size = parts[0].size

    def squares(self) -> torch.Tensor:
        values = self.parts[0].rows(0, 1).numel()
        step = max(1, _CHUNK_VALUES // max(1, values))
        found_B = torch.cat([squares(self.rows(a, b).reshape(b - a, -1)) for a, b in _chunks(self.size, step)])
        # parts that cancel are added to the sum one after the other, and rounded apart
        rounded_B = torch.stack([part.squares().sqrt() for part in self.parts]).sum(dim=0)
        return (found_B.sqrt() + 16 * _UNIT_ROUNDOFF * rounded_B).square()

    def add_to(self, out: torch.Tensor, factors_B: torch.Tensor) -> None:
        for part in self.parts:
            part.add_to(out, factors_B)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        total = self.parts[0].rows(start, stop)
        for part in self.parts[1:]:
            total = total + part.rows(start, stop)
        return total


class Tied(Sum):
    """An embedding table that is the output layer too: <lookup, product> without either [V, H] gradient.

    With G = sum_s onehot(id_s) g_s^T + sum_t l_t r_t^T the cross term is sum_st l_t[id_s] (g_s . r_t).

    Args:
        lookup: The embedding's side.
        outer: The output layer's.
    """

    def __init__(self, lookup: Lookup, outer: Outer) -> None:
        super().__init__([lookup, outer])
        self._lookup, self._outer = lookup, outer

    def squares(self) -> torch.Tensor:
        lookup, outer = self._lookup, self._outer
        of_outer_B, mass_B = outer.squares_and_mass()
        positions = outer.left.shape[1]
        picked_BTS = outer.left.float().gather(2, lookup.ids[:, None, :].expand(-1, positions, -1))
        products_BTS = torch.bmm(outer.right.float(), lookup.gradient.transpose(1, 2))
        cross_B = (double(picked_BTS) * double(products_BTS)).sum(dim=(1, 2))
        other_B = double(lookup.gradient.norm(dim=2)).sum(dim=1) + _TINY
        # what squares_and_mass adds for the outer side alone, for both sides
        margin_B = outer.rounding * other_B * (2 * mass_B + other_B)
        return (lookup.squares() + of_outer_B + 2 * cross_B + margin_B).clamp(min=0)


def outer(left: torch.Tensor, right: torch.Tensor, shape: torch.Size) -> Contribution:
    """Return the matrix gradient sum_s left_s right_s^T in the cheaper form.

    The products of all positions with each other cost S (L + R) an example and position, the gradients themselves
    L R; where the gradients are the smaller, they also take less memory than the two sides.

    Args:
        left: [B, ..., L]; positions between the first and the last dimension.
        right: [B, ..., R].
        shape: The tensor's shape.
    """
    left, right = (
        left.flatten(1, -2) if left.dim() > 2 else left[:, None],
        right.flatten(1, -2) if right.dim() > 2 else right[:, None],
    )
    positions, height, width = left.shape[1], left.shape[2], right.shape[2]
    if height * width <= positions * (height + width):
        # both sides can go at once
        return Dense(torch.bmm(left.transpose(1, 2), right).view(left.shape[0], *shape))
    return Outer(left, right, shape)


def gather(parts: Sequence[Contribution]) -> Contribution:
    """Return the parts of one tensor's gradient as one: a clip needs the norm of their sum."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(p, Dense) for p in parts):
        return Dense(Sum(parts).rows(0, parts[0].size))
    products = [p for p in parts if isinstance(p, Outer)]
    if len(products) == len(parts):  # more positions of the same matrix
        return Outer(
            torch.cat([p.left.float() for p in products], dim=1),
            torch.cat([p.right.float() for p in products], dim=1),
            products[0].shape,
        )
    lookups = [p for p in parts if isinstance(p, Lookup)]
    if len(products) == len(lookups) == 1 and len(parts) == 2:
        return Tied(lookups[0], products[0])
    return Sum(parts)
