"""Canaries enter a run as records of its clients, by coins that a resumed run keeps."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
import torch

from privfed.data.canaries import CANARIES
from privfed.errors import ConfigError, DataError, ModelError, ResumeError
from privfed.federation import canaries, workbench
from privfed.federation.material import gather
from privfed.federation.planted import (
    BEYOND,
    example_gradients,
    given_gradients,
    optimised_directions,
    random_directions,
)
from privfed.federation.progress import Silent
from privfed.run import train
from privfed.tuning.layout import layout_of
from privfed.types import ParamLayout

COUNT = 40


@pytest.fixture
def config(tiny_config):
    def build(canary="mislabelled", count=COUNT, **tables):
        return tiny_config(audit={"canaries": count, "canary": canary, **tables.pop("audit", {})}, **tables)

    return build


def rows_of(material):
    return {shard.client_id: set(shard.indices.tolist()) for shard in material.shards}


@pytest.mark.parametrize("name", CANARIES.names())
def test_a_coin_decides_about_its_record_and_nothing_else(config, name):
    own = config(name)
    material = gather(own)
    bits = np.arange(COUNT) % 2 == 0
    first, other = canaries.plant(own, material, bits), canaries.plant(own, material, ~bits)
    rows = first.canaries.rows_M
    assert np.array_equal(rows, other.canaries.rows_M)
    assert first.canaries.owners_M == other.canaries.owners_M
    there, else_ = rows_of(first), rows_of(other)
    for client, mine in rows_of(material).items():
        ordinary = mine - set(rows.tolist())
        owned = {int(r) for r, o in zip(rows, first.canaries.owners_M, strict=True) if o == client}
        assert ordinary == there[client] - owned == else_[client] - owned
        assert owned == (there[client] | else_[client]) - ordinary
        assert not there[client] & else_[client] & owned
    inside = {int(row) for row, bit in zip(rows, bits, strict=True) if bit}
    assert inside == set().union(*there.values()) & set(rows.tolist())
    # the digest names the data holder's records, not what was planted
    assert first.dataset.digest == material.dataset.digest
    assert first.partition_digest != other.partition_digest
    nobody = canaries.plant(own, material)
    assert not set().union(*rows_of(nobody).values()) & set(rows.tolist())


def test_mislabelled_records_keep_their_text_and_lose_their_label(config):
    own = config()
    material = gather(own)
    planted = canaries.plant(own, material, np.ones(COUNT, dtype=bool))
    rows = planted.canaries.rows_M
    before, after = material.dataset.train, planted.dataset.train
    assert before.texts == after.texts
    changed = np.flatnonzero(before.labels != after.labels)
    assert np.array_equal(changed, rows)
    assert set(after.labels[rows]) == {0, 1, 2}


def test_rare_token_records_are_new_texts_of_the_rarest_words(config):
    own = config("rare_token")
    material = gather(own)
    planted = canaries.plant(own, material, np.ones(COUNT, dtype=bool)).dataset.train
    made = planted.texts[len(material.dataset.train) :]
    assert len(set(made)) == COUNT
    assert not set(made) & set(material.dataset.train.texts)
    words = " ".join(material.dataset.train.texts).split()
    counts = {word: words.count(word) for text in made for word in text.split()}
    assert min(counts.values()) >= 1
    assert len(planted) == len(planted.labels) == len(planted.clients)


def test_the_coins_are_fair_secret_and_the_same_after_a_resume(config, tmp_path):
    own = config(count=400, reproducible_noise=False)
    bits = canaries.toss(tmp_path, own, started=False)
    assert 140 < bits.sum() < 260  # a fair coin is there with probability 1 - 1e-9
    assert stat.S_IMODE((tmp_path / canaries.COINS).stat().st_mode) == 0o600
    assert np.array_equal(canaries.toss(tmp_path, own, started=True), bits)
    assert np.array_equal(canaries.read_coins(tmp_path), bits)
    other = tmp_path / "other"
    other.mkdir()
    assert not np.array_equal(canaries.toss(other, own, started=False), bits)
    # an experiment's follow from its seed, so that configurations are compared on the same ones
    again = [tmp_path / "first", tmp_path / "second"]
    for folder in again:
        folder.mkdir()
        canaries.toss(folder, config(count=400), started=False)
    assert np.array_equal(*map(canaries.read_coins, again))
    with pytest.raises(ResumeError, match="another run"):
        canaries.toss(tmp_path, config(count=40), started=True)
    (tmp_path / canaries.COINS).unlink()
    with pytest.raises(ResumeError, match="is gone"):
        canaries.toss(tmp_path, own, started=True)


def test_a_run_that_is_stopped_goes_on_with_the_same_canaries(config, tmp_path, monkeypatch):
    from privfed.federation.engines import in_process

    own = config("gradient", 60, server={"rounds": 3, "cohort_size": 3, "evaluate_every": 3})
    whole = train(own, out=tmp_path / "whole")
    other = tmp_path / "stopped"
    other.mkdir()
    real, calls = in_process.run_round, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    def same_coins(folder, config_, *, started):
        content = (tmp_path / "whole" / canaries.COINS).read_bytes()
        (folder / canaries.COINS).write_bytes(content)
        return canaries.read_coins(folder)

    with monkeypatch.context() as patch:
        patch.setattr("privfed.run.canaries.toss", same_coins)
        patch.setattr(in_process, "run_round", stops)
        with pytest.raises(KeyboardInterrupt):
            train(own, out=other)
    coins = (other / canaries.COINS).read_bytes()
    resumed = train(own, out=other, resume=True)
    assert (other / canaries.COINS).read_bytes() == coins
    assert resumed.receipt["adapter_sha256"] == whole.receipt["adapter_sha256"]
    assert resumed.receipt["data"]["partition_digest"] == whole.receipt["data"]["partition_digest"]


def test_the_receipt_says_that_there_were_canaries(config, tmp_path):
    found = train(config(), out=tmp_path / "run")
    assert any("40 canaries (mislabelled) were planted" in note for note in found.receipt["notes"])
    assert "coins" not in json.dumps(found.receipt)


def test_given_gradients_are_spread_over_the_tensors():
    layout = ParamLayout(names=("a", "b", "c"), shapes=((4,), (30, 10), (20, 20)), digest="")
    found = given_gradients(layout, 200, 0.5, np.random.default_rng(1))
    assert np.bincount(found.tensors_M).tolist() == [2, 99, 99]
    assert len(set(found.flat_M.tolist())) == 200
    assert set(np.abs(found.values_M).tolist()) == {0.5 * BEYOND}
    assert (found.flat_M[found.tensors_M == 2] >= 304).all()
    with pytest.raises(ModelError, match="352 or fewer"):
        given_gradients(layout, 353, 0.5, np.random.default_rng(1))


def test_random_directions_are_what_autograd_gives():
    layout = ParamLayout(names=("a", "b"), shapes=((40, 10), (100,)), digest="")
    found = random_directions(layout, 50, 0.5, np.random.default_rng(1))
    tensors = [torch.zeros(shape, requires_grad=True) for shape in layout.shapes]
    found.loss(tensors, 3).backward()
    gradient_D = np.concatenate([tensor.grad.numpy().ravel() for tensor in tensors])
    assert np.linalg.norm(gradient_D) == pytest.approx(0.5 * BEYOND, rel=1e-5)
    assert found.components(gradient_D)[3] == pytest.approx(0.5 * BEYOND, rel=1e-5)
    others = np.delete(found.components(gradient_D), 3) / (0.5 * BEYOND)
    assert np.abs(others).max() < 5 / np.sqrt(layout.size)
    assert 0.7 < others.std() * np.sqrt(layout.size) < 1.3
    with pytest.raises(ModelError, match="250 or fewer"):
        random_directions(layout, 251, 0.5, np.random.default_rng(1))


def test_optimised_directions_have_no_part_of_mock_gradients():
    layout = ParamLayout(names=("a", "b"), shapes=((40, 10), (100,)), digest="")
    rng = np.random.default_rng(2)
    mock_KD = rng.standard_normal((30, layout.size)).astype(np.float32)
    mock_KD[20:] = mock_KD[:10] + mock_KD[10:20]  # records that say what others say: rank 20
    found = optimised_directions(layout, 50, 0.5, np.random.default_rng(1), mock_KD)
    plain = random_directions(layout, 50, 0.5, np.random.default_rng(1))
    assert len(found.span_KD) == 20
    own = np.abs([found.components(row_D) for row_D in mock_KD]).max()
    assert own < 1e-3 < 0.1 < np.abs([plain.components(row_D) for row_D in mock_KD]).max()
    assert [np.linalg.norm(found.direction(n)) for n in range(3)] == pytest.approx([1.0] * 3, rel=1e-5)
    products = np.array([found.components(found.direction(n)) for n in range(50)])
    np.fill_diagonal(products, 0.0)
    assert np.abs(products).max() < 5 / np.sqrt(layout.size)
    with pytest.raises(ModelError, match='use "random_direction"'):
        many = rng.standard_normal((400, layout.size)).astype(np.float32)
        optimised_directions(layout, 50, 0.5, np.random.default_rng(1), many)


def test_optimised_canaries_are_orthogonal_to_the_test_records_of_the_run(config):
    found = config("optimised_direction", 20, head_warm_start={"name": "none"})
    material = canaries.expected(found)
    bench = workbench.build(found, material, Silent())
    layout = layout_of(bench.tuned.model)
    given = workbench.given_of(found, layout, material)
    rows_ND = example_gradients(bench.tuned.model, bench.test)
    used = np.unique(np.linspace(0, len(bench.test) - 1, min(workbench.MOCK_RECORDS, len(bench.test))).astype(int))
    norms_N = np.linalg.norm(rows_ND, axis=1)
    assert norms_N.min() > 0
    shares_N = np.array([np.abs(given.components(row_D)).max() for row_D in rows_ND]) / norms_N
    assert shares_N[used].max() < 1e-4
    again = workbench.given_of(found, layout, material)
    assert np.array_equal(again.direction(7), given.direction(7))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"audit": {"canaries": 3}}, "at least 16"),
        ({"audit": {"canary": "nothing"}}, "Unknown canary"),
        ({"privacy": {"unit": "client"}}, "use audit.canary = 'gradient'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_data(config, change, says):
    with pytest.raises((ConfigError, ValueError), match=says):
        config(**change)


def test_gradient_canaries_are_refused_where_not_every_value_is_trained(config):
    for change in ({"server": {"aggregation": "rolora"}, "tuning": {"name": "lora", "r": 2}},):
        with pytest.raises(ConfigError, match="whose gradient is given"):
            config("gradient", **change)


def test_more_canaries_than_half_of_the_records_are_refused(config):
    own = config(count=150)
    with pytest.raises(ConfigError, match="or fewer"):
        canaries.plant(own, gather(own), np.ones(150, dtype=bool))


def test_a_client_that_would_be_left_without_records_is_an_error(config):
    own = config(count=20)
    material = gather(own)
    rows = canaries.plant(own, material).canaries.rows_M
    mine = np.array(sorted(rows[:1]))
    from dataclasses import replace

    from privfed.types import Shard

    alone = Shard(client_id="alone", indices=mine)
    rest = [Shard(client_id=s.client_id, indices=np.setdiff1d(s.indices, mine)) for s in material.shards]
    with pytest.raises(DataError, match="'alone'"):
        canaries.plant(own, replace(material, shards=(alone, *rest)))
