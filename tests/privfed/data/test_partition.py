"""Partitions: every row once, sizes as promised, the same for the same seed, skewed as asked."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from privfed.data import PARTITIONERS, Split, check_shards, partition, single_class_clients
from privfed.data.partitioners import dirichlet
from privfed.data.sharding import client_ids
from privfed.errors import ConfigError, DataError, UnknownNameError
from privfed.table import Table
from privfed.types import Shard

DRAWN = ["iid", "dirichlet", "quantity"]


def make(labels: Any, clients: Any = None) -> Split:
    labels = np.asarray(labels, dtype=np.int64)
    return Split(
        texts=tuple(f"t{i}" for i in range(len(labels))),
        labels=labels,
        clients=None if clients is None else tuple(clients),
    )


def spec(name: str, **keys: Any) -> Table:
    return PARTITIONERS.get(name).config(**keys)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Split, Table, int]:
    name = draw(st.sampled_from([*DRAWN, "dirichlet_equal"]))
    rows = draw(st.integers(1, 200))
    clients = draw(st.integers(1, min(rows, 30)))
    keys: dict[str, Any] = {"clients": clients, "min_size": draw(st.integers(1, rows // clients))}
    if name != "iid":
        keys["alpha"] = draw(st.sampled_from([1e-3, 0.05, 0.5, 5.0, 1e4]))
    if name == "dirichlet_equal":
        name, keys["equal_sizes"] = "dirichlet", True
    labels = draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    return make(labels), spec(name, **keys), draw(st.integers(0, 5))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_row_is_used_once_and_every_shard_is_large_enough(case: tuple[Split, Table, int]) -> None:
    split, table, seed = case
    shards = partition(split, table, seed=seed)
    keys = table.model_dump()
    assert len(shards) == keys["clients"]
    assert sorted(np.concatenate([shard.indices for shard in shards]).tolist()) == list(range(len(split)))
    assert min(map(len, shards)) >= keys["min_size"]
    check_shards(shards, split.labels, min_size=keys["min_size"])
    ids = [shard.client_id for shard in shards]
    assert ids == sorted(set(ids))
    for shard in shards:
        assert shard.indices.dtype == np.int64
        assert (np.diff(shard.indices) > 0).all()
    again = partition(split, table, seed=seed)
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(shards, again, strict=True))


@pytest.mark.parametrize("name", DRAWN)
def test_another_seed_gives_another_partition(name: str) -> None:
    split = make(np.arange(300) % 3)
    first, second = (partition(split, spec(name, clients=5), seed=seed) for seed in (1, 2))
    assert any(not np.array_equal(a.indices, b.indices) for a, b in zip(first, second, strict=True))


def skew(shards: tuple[Shard, ...], labels: np.ndarray) -> float:
    """Return the mean total variation distance of a client's labels from the whole, weighted by size."""
    classes = int(labels.max()) + 1
    whole = np.bincount(labels, minlength=classes) / len(labels)
    distances = [
        len(shard) * 0.5 * np.abs(np.bincount(labels[shard.indices], minlength=classes) / len(shard) - whole).sum()
        for shard in shards
    ]
    return float(sum(distances) / len(labels))


@pytest.mark.parametrize("equal_sizes", [False, True])
def test_a_smaller_alpha_is_a_stronger_skew(equal_sizes: bool) -> None:
    split = make(np.random.default_rng(0).integers(0, 5, 4000))

    def measure(alpha: float) -> float:
        table = spec("dirichlet", clients=10, alpha=alpha, equal_sizes=equal_sizes)
        return float(np.mean([skew(partition(split, table, seed=s), split.labels) for s in range(5)]))

    strong, middle, weak = measure(0.05), measure(1.0), measure(1000.0)
    assert strong > middle + 0.1 > weak + 0.2
    # An iid partition of 400 rows a client over 5 classes differs by about 0.04.
    assert weak < 0.08


def test_dirichlet_proportions_have_the_spread_of_the_distribution() -> None:
    """The variance of a share under a symmetric Dir(alpha) over K is (K - 1) / (K^2 (alpha K + 1)).

    The mutants that forget alpha, or take its inverse, lie far outside the tolerance.
    """
    clients, alpha = 8, 0.5
    split = make(np.zeros(4000))
    shares = [
        len(shard) / len(split)
        for seed in range(150)
        for shard in partition(split, spec("dirichlet", clients=clients, alpha=alpha), seed=seed)
    ]

    def variance(a: float) -> float:
        return (clients - 1) / (clients**2 * (a * clients + 1))

    # Draws with an empty client are drawn again, which at these values lowers the variance a little.
    assert np.var(shares) == pytest.approx(variance(alpha), rel=0.2)
    for mutant in (1.0, 1.0 / alpha):
        assert np.var(shares) != pytest.approx(variance(mutant), rel=0.2)


def test_quantity_sizes_differ_and_label_shares_do_not() -> None:
    split = make(np.arange(5000) % 2)
    shards = partition(split, spec("quantity", clients=10, alpha=0.3, min_size=5), seed=3)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) > 5 * min(sizes)
    assert skew(shards, split.labels) < 0.05


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = {len(shard) for shard in partition(make(np.zeros(103)), spec("iid", clients=10), seed=0)}
    assert sizes == {10, 11}


def test_rows_are_moved_where_drawing_again_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []
    draw = dirichlet._draw
    monkeypatch.setattr(dirichlet, "_draw", lambda *a: draws.append(1) or draw(*a))
    split = make(np.zeros(40))
    shards = partition(split, spec("dirichlet", clients=20, alpha=0.001, min_size=2), seed=0)
    assert [len(shard) for shard in shards] == [2] * 20
    assert len(draws) == dirichlet.MAX_DRAWS + 1


@pytest.mark.parametrize("name", DRAWN)
def test_more_clients_than_rows_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=r"need 20 rows, but there are 12: set clients to 6 or fewer"):
        partition(make(np.zeros(12)), spec(name, clients=10, min_size=2), seed=0)


def test_by_column_is_the_natural_clients() -> None:
    split = make(np.zeros(7), "bababac")
    shards = partition(split, spec("by_column"), seed=0)
    assert {shard.client_id: shard.indices.tolist() for shard in shards} == {
        "a": [1, 3, 5],
        "b": [0, 2, 4],
        "c": [6],
    }


def test_by_column_drops_small_clients_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        shards = partition(make(np.zeros(7), "aaabbcd"), spec("by_column", min_size=2), seed=0)
    assert [shard.client_id for shard in shards] == ["a", "b"]
    assert "2 rows of natural clients below min_size = 2 dropped" in caplog.text


def test_by_column_merges_small_clients() -> None:
    names = ["other", "other", "x", "y", "a", "a"]
    shards = partition(make(np.zeros(6), names), spec("by_column", min_size=2, merge_small=True), seed=0)
    assert {shard.client_id: shard.indices.tolist() for shard in shards} == {
        "a": [4, 5],
        "other": [0, 1],
        "other_": [2, 3],
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=120), st.integers(1, 6))
def test_packed_groups_hold_every_row_once_and_divide_nobody(owners: list[int], groups: int) -> None:
    split = make(np.zeros(len(owners)), map(str, owners))
    if groups > len(set(owners)):
        with pytest.raises(ConfigError, match="which are never divided"):
            partition(split, spec("by_column", clients=groups), seed=0)
        return
    shards = partition(split, spec("by_column", clients=groups), seed=0)
    assert sorted(np.concatenate([shard.indices for shard in shards]).tolist()) == list(range(len(owners)))
    parts = [{owners[row] for row in shard.indices} for shard in shards]
    assert sum(map(len, parts)) == len(set(owners))
    # Greedy packing: no group exceeds the smallest by more than one natural client.
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= max(owners.count(owner) for owner in set(owners))


def test_packing_gives_the_largest_first_to_the_smallest_group() -> None:
    split = make(np.zeros(19), "a" * 3 + "b" * 10 + "c" * 3 + "d" * 3)
    shards = partition(split, spec("by_column", clients=2), seed=0)
    assert [(shard.client_id, len(shard)) for shard in shards] == [("group-0", 10), ("group-1", 9)]


def test_by_column_refusals() -> None:
    with pytest.raises(ConfigError, match="has no natural clients"):
        partition(make([0, 1]), spec("by_column"), seed=0)
    with pytest.raises(ConfigError, match="the largest natural client has 2 rows"):
        partition(make(np.zeros(3), "aab"), spec("by_column", min_size=5), seed=0)
    with pytest.raises(ConfigError, match="smallest of the groups of natural clients has 1 rows"):
        partition(make(np.zeros(3), "aab"), spec("by_column", clients=2, min_size=2), seed=0)


def test_check_shards_names_the_client() -> None:
    def shard(name: str, *rows: int) -> Shard:
        return Shard(client_id=name, indices=np.array(rows, dtype=np.int64))

    labels = np.array([0, 0, 1])
    check_shards([shard("a", 0, 1), shard("b", 2)], labels)
    assert single_class_clients([shard("a", 0, 1), shard("b", 1, 2)], labels) == ("a",)
    for shards, sentence in (
        ([], "no clients"),
        ([shard("a", 0), shard("b")], "Client 'b' has no rows, expected at least 1"),
        ([shard("a", 3)], "Client 'a' has row 3, expected rows below 3"),
        ([shard("a", 0), shard("b", 0)], "Row 0 belongs to clients 'a' and 'b'"),
    ):
        with pytest.raises(DataError, match=sentence):
            check_shards(shards, labels)
    with pytest.raises(DataError, match="Client 'a' has 1 rows, expected at least 2"):
        check_shards([shard("a", 0)], labels, min_size=2)


@pytest.mark.parametrize("name", PARTITIONERS.names())
def test_contract_of_every_partitioner(name: str) -> None:
    partitioner = PARTITIONERS.get(name)
    table = partitioner.config()
    assert table.model_dump()["name"] == name
    for keys in ({"clients": 0}, {"min_size": 0}, {"nonsense": 1}, {"name": "else"}):
        with pytest.raises(ValidationError):
            partitioner.config(**keys)
    split = make(np.arange(60) % 3, [f"c{i % 12}" for i in range(60)])
    labels, clients = split.labels.copy(), list(split.clients or ())
    parts = partitioner(split.labels, clients, table, np.random.default_rng(0))
    again = partitioner(split.labels, clients, table, np.random.default_rng(0))
    assert parts.keys() == again.keys()
    assert all(np.array_equal(parts[client], again[client]) for client in parts)
    assert np.array_equal(labels, split.labels)


def test_unknown_partitioner() -> None:
    class Novel(Table):
        name: str = "dirichlt"

    with pytest.raises(UnknownNameError, match="Did you mean 'dirichlet'"):
        partition(make([0, 1]), Novel(), seed=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
def test_alpha_is_positive_and_finite(name: str, alpha: float) -> None:
    with pytest.raises(ValidationError):
        spec(name, alpha=alpha)


def test_client_ids_sort_as_their_numbers() -> None:
    for count in (1, 10, 11, 1000):
        ids = client_ids(count)
        assert ids == sorted(set(ids))
        assert len(ids) == count
