"""Clipping: one example moves the sum by no more than the bound, in the numbers that are really computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.errors import ClientError
from privfed.privacy.per_example import clipped_sum
from privfed.privacy.per_example.clipping import clip
from privfed.privacy.per_example.contributions import Contribution, Dense, Lookup, Outer, Sum, gather

CLIP = 0.7


def sum_of_clipped(gradients, bound):
    return clipped_sum(gradients, bound).sum_D


def influence(clip, gradients, bound=CLIP):
    """Return how far, in L2 norm, the sum moves at most when one example is removed."""
    everyone = clip(gradients, bound)
    size = len(gradients[0])
    moves = []
    for left_out in range(size):
        rows = [row for row in range(size) if row != left_out]
        moves.append(float((everyone - clip([g[rows] for g in gradients], bound)).norm()))
    return max(moves)


def clip_the_batch(gradients, bound):
    total = torch.cat([g.flatten(1).sum(0) for g in gradients]).double()
    return total * min(1.0, bound / max(float(total.norm()), 1e-30))


def clip_each_tensor(gradients, bound):
    return torch.cat([sum_of_clipped([g], bound) for g in gradients])


def leave_the_last_tensor_out(gradients, bound):
    """The norm that decides on the factor does not see the last tensor (the head, say)."""
    flat = [g.flatten(1).double() for g in gradients]
    norms_B = torch.stack([g.norm(dim=1) for g in flat[:-1]]).norm(dim=0)
    return torch.cat([(bound / norms_B.clamp(min=bound)) @ g for g in flat])


def do_not_clip(gradients, bound):
    return torch.cat([g.flatten(1).double().sum(0) for g in gradients])


def random_gradients(seed, size, magnitudes):
    """Return two tensors of gradients, each example with a magnitude of its own."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.tensor([magnitudes[i % len(magnitudes)] for i in range(size)], dtype=torch.float32)
    weights = torch.randn(size, 3, 5, generator=random) * scale[:, None, None]
    biases = torch.randn(size, 4, generator=random) * scale[:, None]
    return [weights, biases]


MAGNITUDES = st.lists(st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 0.1, 1.0, 30.0, 1e6, 1e15]), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    size=st.integers(1, 8),
    magnitudes=MAGNITUDES,
    bound=st.sampled_from([1e-6, 0.01, CLIP, 1.0, 1e4]),
)
def test_one_example_moves_the_sum_by_no_more_than_the_clip(seed, size, magnitudes, bound):
    assert influence(sum_of_clipped, random_gradients(seed, size, magnitudes), bound) <= bound


@pytest.mark.parametrize("mutant", [clip_the_batch, clip_each_tensor, leave_the_last_tensor_out, do_not_clip])
def test_wrong_clipping_would_be_found(mutant):
    """``clip_the_batch`` needs two opposite outliers: without one of them the other's whole weight shows."""
    outliers = torch.zeros(3, 2, 2)
    outliers[0], outliers[1], outliers[2, 0] = 50.0, -50.0, 0.4
    head = outliers[:, 0] * 3
    assert influence(sum_of_clipped, [outliers, head]) <= CLIP
    opposite = [torch.cat([outliers, outliers]), torch.cat([head, -head])]
    assert max(influence(mutant, [outliers, head]), influence(mutant, opposite)) > CLIP * 1.2


def test_what_is_within_the_bound_is_not_changed():
    gradients = [torch.tensor([[0.3, 0.0], [3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.4], [4.0], [0.0]])]
    found = clipped_sum(gradients, 1.0)
    total = found.sum_D
    np.testing.assert_allclose(found.norms_B.numpy(), [0.5, 5.0, 0.0], rtol=1e-6)
    assert total.dtype == torch.float64
    np.testing.assert_allclose(total.numpy(), [0.3 + 0.6, 0.0, 0.4 + 0.8], rtol=2e-5)


@pytest.mark.parametrize("values", [6_000_000, 1023, 1025])
def test_rounding_does_not_lift_a_long_gradient_above_the_bound(values):
    """A float32 sum of millions of equal squares is too small by up to a percent; a clip by it would not hold."""
    gradients = [torch.full((2, values), 0.1)]
    assert influence(sum_of_clipped, gradients, 1.0) <= 1.0
    assert influence(sum_of_clipped, gradients, 1.0) > 0.9999


def test_rounding_does_not_add_up_over_a_large_batch():
    gradients = [torch.full((1024, 3), 0.1)]
    everyone = sum_of_clipped(gradients, 0.05)
    assert float((everyone - sum_of_clipped([gradients[0][1:]], 0.05)).norm()) <= 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    gradients = random_gradients(1, 4, [1.0])
    gradients[1][2, 0] = bad
    with pytest.raises(ClientError, match="not finite"):
        clipped_sum(gradients, 1.0)


def test_a_gradient_too_large_for_its_norm_is_refused_rather_than_let_through():
    with pytest.raises(ClientError, match="not finite"):
        clipped_sum([torch.full((1, 4), 3e38)], 1.0)


# --- the same without the gradients at hand -----------------------------------------------------------------------


def outer_sides(seed, size, positions, height, width, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(size, positions, height, generator=random) * scale
    return left, torch.randn(size, positions, width, generator=random)


def exact_squares(part: Contribution) -> torch.Tensor:
    """Return the squared norms of the gradients that a contribution stands for, in float64."""
    if isinstance(part, Sum):
        return sum(exact_rows(p) for p in part.parts).square().flatten(1).sum(1)
    return exact_rows(part).square().flatten(1).sum(1)


def exact_rows(part: Contribution) -> torch.Tensor:
    if isinstance(part, Outer):
        return torch.bmm(part.left.double().transpose(1, 2), part.right.double())
    if isinstance(part, Lookup):
        found = torch.zeros(part.size, *part.shape, dtype=torch.float64)
        for i in range(part.size):
            found[i].index_add_(0, part.ids[i], part.gradient[i].double())
        return found
    return part.rows(0, part.size).double()


def parts(seed, size=5):
    """Return one contribution of each form, for a table of 11 rows and 7 columns."""
    shape = torch.Size([11, 7])
    random = torch.Generator().manual_seed(seed)
    table = Lookup(torch.randint(0, 11, (size, 6), generator=random), torch.randn(size, 6, 7, generator=random), shape)
    product = Outer(*outer_sides(seed, size, 4, 11, 7), shape)
    return {
        "product": product,
        "table": table,
        "dense": Dense(torch.randn(size, 11, 7, generator=random)),
        "twice": gather([product, Outer(*outer_sides(seed + 1, size, 3, 11, 7), shape)]),
        "tied": gather([table, product]),
        "three": gather([table, product, Dense(torch.randn(size, 11, 7, generator=random))]),
    }


@pytest.mark.parametrize("form", ["product", "table", "dense", "twice", "tied", "three"])
def test_each_form_has_the_norms_sums_and_rows_of_its_gradients(form):
    part = parts(1)[form]
    exact = sum(exact_rows(p) for p in part.parts) if isinstance(part, Sum) else exact_rows(part)
    torch.testing.assert_close(part.rows(1, 4).double(), exact[1:4], rtol=1e-5, atol=1e-5)
    norms, wanted = part.squares().sqrt(), exact.flatten(1).norm(dim=1)
    assert float(((norms - wanted) / wanted).abs().max()) < 3e-5
    factors = torch.rand(5, dtype=torch.float64)
    out = torch.full((11, 7), 2.0, dtype=torch.float64)
    part.add_to(out, factors)
    torch.testing.assert_close(out - 2, torch.einsum("b,bvh->vh", factors, exact), rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    positions=st.integers(2, 40),
    cancel=st.sampled_from([1.0, 1e-2, 1e-4, 1e-7, 0.0]),
    scale=st.sampled_from([1.0, 1e-18, 1e-12, 1e6, 1e12]),
)
def test_a_norm_by_products_is_never_too_small(seed, positions, cancel, scale):
    """Positions that cancel are where rounding could take the norm away: there the bound on the rounding counts."""
    left, right = outer_sides(seed, 3, positions, 90, 70, scale)
    opposite = -left * (1 - cancel)
    part = Outer(torch.cat([left, opposite], dim=1), torch.cat([right, right], dim=1), torch.Size([90, 70]))
    exact = exact_squares(part).sqrt()
    assert bool((part.squares().sqrt() >= exact * (1 - 1e-6)).all())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), cancel=st.sampled_from([1.0, 1e-3, 1e-5, 1e-7]))
def test_a_norm_of_a_table_that_is_tied_is_never_too_small(seed, cancel):
    """The output layer's gradient takes the table's away again, all but a little."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 31, (3, 6), generator=random)
    gradient = torch.randn(3, 6, 17, generator=random)
    onehot = -torch.nn.functional.one_hot(ids, 31).float() * (1 - cancel)
    table, product = Lookup(ids, gradient, torch.Size([31, 17])), Outer(onehot, gradient, torch.Size([31, 17]))
    exact = (exact_rows(table) + exact_rows(product)).flatten(1).norm(dim=1)
    for part in (gather([table, product]), gather([table, product, Dense(torch.zeros(3, 31, 17))])):
        assert bool((part.squares().sqrt() >= exact * (1 - 1e-6)).all())


def test_without_the_bound_on_rounding_a_norm_by_products_would_be_too_small():
    left, right = outer_sides(3, 50, 40, 90, 70)
    part = Outer(torch.cat([left, -left * (1 - 1e-4)], dim=1), torch.cat([right, right], dim=1), torch.Size([90, 70]))
    gram = torch.bmm(part.left, part.left.transpose(1, 2)) * torch.bmm(part.right, part.right.transpose(1, 2))
    bare = gram.sum(dim=(1, 2)).clamp(min=0).sqrt()
    assert bool((bare < 0.9 * exact_squares(part).sqrt()).any())


def test_tiny_values_do_not_vanish_from_a_norm_by_products():
    """A product of 1e-25 with itself is zero in float32; with the other side at 1e15 the gradient is not."""
    left, right = outer_sides(4, 3, 5, 30, 20, 1e-25)
    part = Outer(left, right * 1e15, torch.Size([30, 20]))
    assert bool((part.squares().sqrt() >= exact_squares(part).sqrt()).all())


def moves(build, size, bound):
    """Return how far the sum moves at most when one example is removed; ``build(rows)`` gives the contributions."""

    def total(rows):
        found = build(rows)
        return clip(found, [f.rows(0, 1)[0].shape for f in found], bound).sum_D

    everyone = total(list(range(size)))
    return max(float((everyone - total([r for r in range(size) if r != out])).norm()) for out in range(size))


@pytest.mark.parametrize("form", ["product", "table", "dense", "twice", "tied", "three"])
@pytest.mark.parametrize("bound", [1e-3, 0.5, 1e3])
def test_one_example_moves_the_sum_of_any_form_by_no_more_than_the_clip(form, bound):
    def build(rows):
        part = parts(7, size=9)[form]
        return [select(part, rows)]

    assert moves(build, 9, bound) <= bound


def select(part, rows):
    if isinstance(part, Outer):
        return Outer(part.left[rows], part.right[rows], part.shape)
    if isinstance(part, Lookup):
        return Lookup(part.ids[rows], part.gradient[rows], part.shape)
    if isinstance(part, Sum):
        return gather([select(p, rows) for p in part.parts])
    return Dense(part.gradients[rows])


@pytest.mark.parametrize("size", [16, 33, 128])
def test_equal_examples_stay_within_the_bound_when_products_are_added_in_float32(size):
    """Gradients that all point the same way are the worst case for rounding: the sum is as long as it can be."""
    left, right = outer_sides(5, 1, 64, 96, 80)

    def build(rows):
        return [Outer(left.expand(len(rows), -1, -1), right.expand(len(rows), -1, -1), torch.Size([96, 80]))]

    def total(count):
        found = build(range(count))
        return clip(found, [torch.Size([96, 80])], 0.3).sum_D

    assert 0.2995 < float((total(size) - total(size - 1)).norm()) <= 0.3
