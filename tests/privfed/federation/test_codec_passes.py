"""Two exchanges a round, bytes on the wire, and rules that read each message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from by_hand import Hand, declared, recording, tables

from privfed.compression.message import sum_of_one
from privfed.federation.client import Client
from privfed.federation.progress import Silent
from privfed.federation.round import run_round
from privfed.privacy.mechanisms import REPEATED

# two passes


def _drops_between(run: Any, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Client._second

    def failing(client: Client, *args: Any) -> Any:
        if client.shard.client_id == victim:
            raise RuntimeError("gone")
        return second(client, *args)

    monkeypatch.setattr(Client, "_second", failing)


def test_the_second_pass_is_averaged_over_its_own_survivors(
    federation: Callable[..., Any], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(**tables("powersgd", "none", "none"))
    trainers = recording(run, recorded)
    names = sorted(run.phase.clients)
    _drops_between(run, names[1], monkeypatch)
    before = run.state
    after, report = run.round()
    assert report.survivors == 3 and [name for name, _ in report.dropped] == [names[1]]
    codec, size = Hand(run, False, "none").codec_of(1), run.phase.layout.size
    updates = {name: trainer.delta_D for name, trainer in trainers.items()}
    linear = sum(codec.linear_sum(sum_of_one(codec.encode(each, None), codec)) for each in updates.values())
    second = codec.second(codec.between(linear / 4, size), size)  # all four made the direction
    left = [each for name, each in updates.items() if name != names[1]]
    mean_D = sum(second.decode_sum(sum_of_one(second.encode(each, None), second)) for each in left) / 3
    np.testing.assert_allclose(after.params_D - before.params_D, mean_D, atol=1e-6)
    # still an estimate of the mean over three: a projection of it
    whole = np.mean(left, axis=0)
    assert np.linalg.norm(mean_D - whole) < np.linalg.norm(whole)
    assert run.phase.store.load(names[1], before=2) == {}  # its update was lost whole, and nothing is left of it
    assert run.phase.store.load(names[0], before=2)


@pytest.mark.parametrize("unit", ["none", "client"])
def test_under_masking_too_a_round_outlives_a_client_that_drops_between_the_passes(
    unit: str, federation: Callable[..., Any], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(**tables("powersgd", "masked", unit))
    trainers = recording(run, recorded)
    assert run.phase.requirements.least_survivors(4) == 3
    names = sorted(run.phase.clients)
    with monkeypatch.context() as patch:
        _drops_between(run, names[2], patch)
        before = run.state
        after, report = run.round()
    assert (report.lost, report.survivors, [name for name, _ in report.dropped]) == (None, 3, [names[2]])
    assert run.phase.store.load(names[2], before=2) == {}
    if unit == "none":
        codec, size = Hand(run, True, "none").codec_of(1), run.phase.layout.size
        given = {name: trainer.delta_D for name, trainer in trainers.items()}
        first_M = sum(codec.linear_sum(sum_of_one(codec.encode(each, None), codec)) for each in given.values()) / 4
        second = codec.second(codec.between(first_M, size), size, first_M)
        left = [each for name, each in given.items() if name != names[2]]
        left_M = sum(second.linear_sum(sum_of_one(second.encode(each, None), second)) for each in left) / 3
        wanted_D, _ = second.expand(left_M, {}, size)
        np.testing.assert_allclose(after.params_D - before.params_D, wanted_D, atol=1e-5)
    after, report = run.round()
    assert (report.lost, report.survivors) == (None, 4)


def test_under_masking_too_few_in_the_second_pass_cost_the_round(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(**tables("powersgd", "masked", "none"))
    second, gone = Client._second, sorted(run.phase.clients)[1:3]

    def failing(client: Client, *args: Any) -> Any:
        if client.shard.client_id in gone:
            raise RuntimeError("gone")
        return second(client, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "_second", failing)
        before = run.state
        after, report = run.round()
    assert "at least 3 are needed" in report.lost
    assert after.params_D.tobytes() == before.params_D.tobytes()
    assert dict(after.codec) == dict(before.codec)


def test_a_crash_between_the_passes_never_releases_a_second_answer(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(**tables("powersgd", "none", "client"))
    first, _ = run_round(run.state, run.phase, run.holder, Silent())
    entries = run.holder.ledger.entries()
    assert [entry.charge.event.steps for entry in entries] == [1, 0]
    again, report = run_round(run.state, run.phase, run.holder, Silent())
    assert report.lost is None and again.params_D.tobytes() == first.params_D.tobytes()
    _drops_between(run, sorted(run.phase.clients)[0], monkeypatch)
    other, report = run_round(run.state, run.phase, run.holder, Silent())
    assert report.lost == REPEATED
    assert other.params_D.tobytes() == run.state.params_D.tobytes()
    assert run.holder.ledger.entries() == entries


def test_nobody_in_a_private_round_of_two_passes_is_noise_in_both(
    federation: Callable[..., Any], noised: list[np.ndarray]
) -> None:
    run = federation(**tables("powersgd", "none", "client"))
    never = replace(run.phase.central.event, sampling_probability=1e-15)
    run.phase = replace(run.phase, central=replace(run.phase.central, event=never))
    before = run.state
    after, report = run.round()
    assert (report.cohort, report.lost) == (0, None)
    assert len(noised) == 2 and all(np.abs(each).min() > 0 for each in noised)
    assert not np.array_equal(after.params_D, before.params_D)
    assert [entry.charge.event.steps for entry in run.holder.ledger.entries()] == [1, 0]


# bytes


def test_masked_vectors_are_as_long_as_the_codec_says(federation: Callable[..., Any]) -> None:
    sent = {}
    for case in ("identity", "random_k, feedback", "random_k", "sign"):
        run = federation(**tables(case, "masked", "none"))
        codec = Hand(run, True, "none").codec_of(1)
        size, wire = run.phase.layout.size, codec.wire(run.phase.layout.size)
        _, report = run.round()
        sent[case] = report.bytes_up - 4 * -(-wire.values * wire.num_bits // 8)
        assert wire.num_bits == run.phase.ring_bits
        assert wire.values == (size if case in ("identity", "sign") else round(0.3 * size))
        assert wire.num_bits == {"identity": 32, "random_k, feedback": 32, "random_k": 16, "sign": 16}[case]
    assert len(set(sent.values())) == 1  # keys, shares and signatures are the same beside the vectors


# rules that read each update, and rules that send other tensors in turn


INDIVIDUAL = ["quantizer", "rotated", "random_k, feedback", "top_k", "svd_truncate", "powersgd", "global_mask", "cast"]


@pytest.mark.parametrize("case", INDIVIDUAL)
def test_rules_that_read_each_update_get_what_each_message_stands_for(
    case: str, federation: Callable[..., Any], recorded: Any, broadcasts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.federation import round as rounds

    seen: list[Any] = []
    step = vars(rounds)["rule_step"]

    def watching(*args: Any) -> Any:
        seen.append(args)
        return step(*args)

    monkeypatch.setattr(rounds, "rule_step", watching)
    run = federation(**tables(case, "none", "none", server={"aggregation": "flexlora"}))
    trainers = recording(run, recorded)
    hand = Hand(run, False, "none")
    for number in (1, 2):
        run.round()
        mean_D = hand.round(number, {name: each.delta_D for name, each in trainers.items()}, broadcasts[-1])
        _, _, deltas, _, _ = seen[-1]
        assert [share for share, _ in deltas] == [0.25] * 4
        np.testing.assert_allclose(np.mean([delta for _, delta in deltas], axis=0), mean_D, atol=1e-7)
        if case in ("quantizer", "cast"):
            for (_, delta), trainer in zip(deltas, trainers.values(), strict=True):
                np.testing.assert_allclose(delta, trainer.delta_D, atol=2.0 / 511 + 1e-2 * np.abs(delta).max())


@pytest.mark.parametrize("case", ["count_sketch", "random_k, feedback", "global_mask", "powersgd"])
def test_a_rule_that_takes_turns_has_a_state_and_residuals_for_each_turn(
    case: str, federation: Callable[..., Any]
) -> None:
    run = federation(**tables(case, "none", "none", server={"aggregation": "rolora", "rounds": 4}))
    for _ in range(4):
        _, report = run.round()
        assert (report.survivors, report.dropped) == (4, ())
    parts = {name.split(".")[0] for name in run.state.codec}
    assert len(parts) == (2 if declared(case, False).server_state else 0)
    own = run.phase.store.load(sorted(run.phase.clients)[0], before=5) if run.phase.store else {}
    assert len(own) == (2 if declared(case, False).stateful else 0)


@pytest.mark.parametrize("case", ["random_k", "top_k", "svd_truncate", "powersgd", "sign, mean"])
@pytest.mark.parametrize("optimizer", ["sgd", "fedadam"])
def test_weights_and_server_optimisers_go_with_codecs(
    case: str, optimizer: str, federation: Callable[..., Any], recorded: Any
) -> None:
    weighted = declared(case, False).scales
    server = {"weighting": "examples" if weighted else "uniform", "optimizer": optimizer, "learning_rate": 0.1}
    uneven = {"name": "quantity", "clients": 4, "alpha": 0.7, "min_size": 8}
    run = federation(**tables(case, "none", "none", server=server, partition=uneven))
    trainers = recording(run, recorded)
    _, report = run.round()
    assert report.survivors == 4 and report.update_norm > 0
    if case == "svd_truncate":  # close to what was trained: its matrices have one large singular value
        sizes = np.array([len(client.shard) for client in run.phase.clients.values()])
        mean = np.average([trainers[name].delta_D for name in run.phase.clients], axis=0, weights=sizes)
        assert abs(report.update_norm / np.linalg.norm(mean) - 1) < 0.3


@pytest.mark.parametrize("case", ["random_k, feedback", "top_k", "powersgd", "global_mask", "identity"])
def test_the_meter_reads_what_each_message_stands_for(case: str, federation: Callable[..., Any]) -> None:
    for unit in ("none", "client"):
        given_tables = tables(case, "none", unit, server={"meter": True})
        if case == "top_k":  # the very largest values are all of the head
            given_tables["compression"] = {"name": "top_k", "density": 0.5}
        run = federation(**given_tables)
        _, report = run.round()
        assert report.meter is not None and report.meter.error > 0
        known = unit == "none" or case == "identity"
        assert (report.meter.noise_product is not None) == (known or not declared(case, False).needs_context)
