"""Rounds with distributed noise: what the sum is, what leaves a client and when, and what a repeated round gives.

Shape suffix: D trained values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from privfed.errors import BudgetExceededError, ConfigError
from privfed.federation import collect
from privfed.federation.progress import Silent
from privfed.federation.round import run_round
from privfed.federation.workbench import trained_lengths
from privfed.privacy.accountant import epsilon
from privfed.privacy.discrete import planning
from privfed.privacy.discrete.accounting import epsilon as discrete_epsilon
from privfed.privacy.discrete.events import discrete_of
from privfed.privacy.discrete.rounding import Float64
from privfed.privacy.mechanisms import REPEATED
from privfed.report.survivors import survivors_epsilon
from privfed.rng import PrivateStream
from privfed.secagg import ClientSession
from privfed.types import EVERYONE

CLIENTS = 4
SECAGG = {"name": "masked", "corrupt": 0.25, "dropped": 0.25}
UNITS = pytest.mark.parametrize("unit", ["client", "example"])


def _tables(unit: str, **more: Any) -> dict[str, Any]:
    tables: dict[str, Any] = {
        "privacy": {"unit": unit, "placement": "distributed"},
        "secagg": SECAGG,
        "server": {"cohort_size": CLIENTS, "rounds": 3},
    }
    if unit == "example":
        tables["client"] = {"local_steps": 1}
    for name, table in more.items():
        tables[name] = {**tables.get(name, {}), **table}
    return tables


def _residual(run: Any, rounds: int, signal_D: Float64) -> Float64:
    """Return the noise of many decoded sums, in integer steps; the same state is released with fresh streams."""
    shares, found = run.phase.shares, []
    params = shares.params
    for number in range(rounds):
        state = replace(run.state, round=number)
        holder = replace(run.holder, run_id=f"run {number}", ledger_run_id=f"run {number}")
        clients = {name: replace(client, holder=holder) for name, client in run.phase.clients.items()}
        after, report = run_round(state, replace(run.phase, clients=clients), holder, Silent())
        assert (report.lost, report.survivors) == (None, CLIENTS)
        found.append((after.params_D.astype(np.float64) - state.params_D) * CLIENTS - signal_D)
    return np.concatenate(found) * params.scale


def test_the_sum_is_that_of_the_clipped_updates_with_the_planned_noise(
    federation: Callable[..., Any], given: Any
) -> None:
    run = federation(**_tables("client"))
    run.state = replace(run.state, params_D=np.zeros_like(run.state.params_D))
    size = run.phase.layout.size
    draw = np.random.default_rng(5)
    updates = {
        name: draw.normal(size=size).astype(np.float32) * length
        for name, length in zip(sorted(run.phase.clients), (1e-2, 1e-3, 5.0, 40.0), strict=True)
    }  # two of them longer than the clip of 0.5
    run.trainers(lambda client: given(updates[client.shard.client_id]))
    clipped = [u * min(1.0, 0.5 / float(np.linalg.norm(u.astype(np.float64)))) for u in updates.values()]
    params = run.phase.shares.params
    noise = _residual(run, 24, np.sum(clipped, axis=0))
    # rounding adds the variance of a uniform fraction, at most 1/4 a client
    planned = CLIENTS * params.local_variance
    assert planned == pytest.approx(CLIENTS / 2 * run.plan.noise_multiplier**2 * params.integer_l2_squared)
    ratio = float(np.mean(noise**2)) / planned
    low, high = chi2.ppf([1e-4, 1 - 1e-4], noise.size) / noise.size
    assert low < ratio / (1 + CLIENTS / 4 / planned) and ratio < high * 1.001
    assert not any(low < ratio * scale < high for scale in (2 / 3, 3 / 2))  # so a wrong number of shares is seen
    assert abs(float(noise.mean())) < 5 * math.sqrt(planned / noise.size)


def test_under_example_level_a_step_follows_the_sum_of_clipped_gradients(federation: Callable[..., Any]) -> None:
    run = federation(**_tables("example", privacy={"noise_multiplier": 1e-3, "distributed": {"scale": 1e5}}))
    before = run.state
    sums: dict[str, Float64] = {}
    for name, client in run.phase.clients.items():
        original = client.trainer.gradient_sum

        def remembered(params_D: Any, shard: Any, *rest: Any, call: Any = original) -> Any:
            sums[shard.client_id] = call(params_D, shard, *rest)
            return sums[shard.client_id]

        assert name not in sums
        client.trainer.gradient_sum = remembered
        break  # the clients share one trainer
    after, report = run.round()
    assert report.survivors == CLIENTS == len(sums)
    expected = sum(0.2 * len(client.shard) for client in run.phase.clients.values())
    wanted = -0.5 * np.sum(list(sums.values()), axis=0) / expected
    assert float(np.linalg.norm(wanted)) > 1e-3
    np.testing.assert_allclose(after.params_D - before.params_D, wanted, atol=2e-3 * float(np.abs(wanted).max()))


def test_a_gradient_sum_is_in_the_order_of_the_layout_and_of_clipped_examples(federation: Callable[..., Any]) -> None:
    import torch

    from privfed.models.examples import losses
    from privfed.tuning.layout import trained

    run = federation(**_tables("example", client={"sampling_probability": 1.0}))
    trainer, client = run.stage.trainer, run.phase.clients[sorted(run.phase.clients)[0]]
    shard = replace(client.shard, indices=client.shard.indices[:5])
    got = trainer.gradient_sum(run.state.params_D, shard, PrivateStream(bytes(32), "t"), lambda *_: None)
    assert got.dtype == np.float64
    rows = []
    for row in shard.indices:
        loss = losses(trainer.examples, trainer.module, trainer.examples.batch(np.array([row]))).sum()
        gradients = torch.autograd.grad(loss, [p for _, p in trained(trainer.module)])
        vector = np.concatenate([g.detach().numpy().ravel() for g in gradients]).astype(np.float64)
        rows.append(vector * min(1.0, 0.5 / np.linalg.norm(vector)))
        one = trainer.gradient_sum(
            run.state.params_D, replace(shard, indices=np.array([row])), PrivateStream(bytes(32), "t"), lambda *_: None
        )
        assert np.linalg.norm(one) <= 0.5 * (1 + 1e-6)
    np.testing.assert_allclose(got, np.sum(rows, axis=0), atol=2e-4)
    assert (trainer.dp.noise_multiplier, trainer.dp.l2_clip_norm) == (None, 0.5)


class _Wire:
    """Everything that clients send and the server reads, in order, beside the ledger's growth."""

    def __init__(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[bytes] = []
        self.charged_before: list[set[str]] = []
        counted, masked = collect.MaskedLink._counted, ClientSession.masked_input
        wire = self

        def spy(link: Any, message: bytes) -> bytes:
            wire.messages.append(message)
            return counted(link, message)

        def at_masking(session: Any, shares: Any, values_M: Any) -> bytes:
            wire.charged_before.append({entry.charge.client_id for entry in run.holder.ledger.entries()})
            return masked(session, shares, values_M)

        monkeypatch.setattr(collect.MaskedLink, "_counted", spy)
        monkeypatch.setattr(ClientSession, "masked_input", at_masking)


@UNITS
def test_integers_leave_masked_and_charged(
    unit: str, federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(**_tables(unit))
    wire = _Wire(run, monkeypatch)
    sent: dict[int, Any] = {}
    encode = type(run.phase.shares).encode

    def remember(shares: Any, *arguments: Any) -> Any:
        sent[len(sent)] = encode(shares, *arguments)
        return sent[len(sent) - 1]

    monkeypatch.setattr(type(run.phase.shares), "encode", remember)
    run.round()
    names = sorted(run.phase.clients)
    assert [sorted(before) for before in wire.charged_before] == [names[: i + 1] for i in range(CLIENTS)]
    everything = b"".join(wire.messages)
    bits = run.phase.shares.params.ring_bits
    assert len(sent) == CLIENTS and bits == 16
    for encoded in sent.values():
        packed = encoded.values_M.astype("<u2").tobytes()
        assert len(packed) > 700  # the search below would find them: see the last line
        assert not any(packed[i : i + 12] in everything for i in range(0, len(packed) - 12, 2))
    assert wire.messages[-1][:12] in everything


@UNITS
def test_a_round_again_gives_the_same_bits_and_one_charge(unit: str, federation: Callable[..., Any]) -> None:
    run = federation(**_tables(unit))
    first, _ = run_round(run.state, run.phase, run.holder, Silent())
    rows = run.holder.ledger.head()
    second, report = run_round(run.state, run.phase, run.holder, Silent())
    assert report.lost is None
    assert second.params_D.tobytes() == first.params_D.tobytes()
    assert run.holder.ledger.head() == rows
    charged = [entry.charge for entry in run.holder.ledger.entries()]
    assert sorted(c.client_id for c in charged) == sorted([*run.phase.clients, EVERYONE])
    assert [c.event.steps for c in charged if c.client_id == EVERYONE] == [0]


@UNITS
def test_a_round_again_over_other_survivors_is_never_revealed(
    unit: str, federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference of two such sums would be one client's integers with the noise of few."""
    run = federation(**_tables(unit))
    run_round(run.state, run.phase, run.holder, Silent())
    victim = sorted(run.phase.clients)[1]
    respond = type(run.phase.clients[victim]).respond

    def fails(client: Any, *arguments: Any) -> Any:
        if client.shard.client_id == victim:
            raise RuntimeError("gone")
        return respond(client, *arguments)

    monkeypatch.setattr(type(run.phase.clients[victim]), "respond", fails)
    wire = _Wire(run, monkeypatch)
    after, report = run_round(run.state, run.phase, run.holder, Silent())
    assert report.lost == REPEATED and report.dropped[0][1] == "RuntimeError"
    assert after.params_D.tobytes() == run.state.params_D.tobytes()
    # keys, shares and masked vectors: nobody was asked to agree or to unmask
    assert len(wire.messages) == 2 * CLIENTS + CLIENTS - 1


def test_a_round_below_n_min_is_lost_and_what_was_charged_stays(federation: Callable[..., Any], given: Any) -> None:
    run = federation(**_tables("client"))
    size, names = run.phase.layout.size, sorted(run.phase.clients)
    assert run.phase.shares.params.n_min == 3
    run.trainers(
        lambda client: given(np.full(size, 1e-3 if client.shard.client_id in names[:2] else np.nan, dtype=np.float32))
    )
    before = run.state
    after, report = run.round()
    assert "at least 3 are needed" in report.lost
    assert after.params_D.tobytes() == before.params_D.tobytes()
    assert [entry.charge.client_id for entry in run.holder.ledger.entries()] == names[:2]
    assert survivors_epsilon(run.holder.ledger.entries(), 1e-4) == pytest.approx(
        epsilon([run.phase.clients[names[0]].event], 1e-4)
    )


def test_more_survivors_than_n_min_cost_less_and_n_min_what_was_charged(
    federation: Callable[..., Any], given: Any
) -> None:
    run = federation(**_tables("client", server={"rounds": 2}))
    size, names = run.phase.layout.size, sorted(run.phase.clients)
    good = given(np.full(size, 1e-3, dtype=np.float32))
    bad = given(np.full(size, np.nan, dtype=np.float32))
    run.trainers(lambda client: bad if client.shard.client_id == names[3] else good)
    run.round()  # three survive: n_min
    charged = epsilon([run.phase.clients[names[0]].event], 1e-4)
    assert survivors_epsilon(run.holder.ledger.entries(), 1e-4) == pytest.approx(charged)
    run.trainers(lambda client: good)
    run.round()
    entries = run.holder.ledger.entries()
    two = epsilon([replace(run.phase.clients[names[0]].event, steps=2)], 1e-4)
    actual = survivors_epsilon(entries, 1e-4)
    assert actual is not None and charged < actual < two
    params = run.phase.shares.params
    by_hand = discrete_epsilon([params.event(3), params.event(4)], 1e-4)
    assert actual == pytest.approx(by_hand, rel=1e-9)
    assert run.holder.ledger.verify() == []


def test_a_cap_stops_a_client_before_anything_leaves_it(federation: Callable[..., Any]) -> None:
    run = federation(**_tables("example"))
    event = run.phase.clients[sorted(run.phase.clients)[0]].event
    run.holder.ledger.set_cap(
        data_digest=run.holder.data_digest, unit="example", epsilon=epsilon([event], 1e-4) * 1.05, delta=1e-4
    )
    run.round()
    with pytest.raises(BudgetExceededError):
        run.round()
    assert len([e for e in run.holder.ledger.entries() if e.charge.client_id != EVERYONE]) == CLIENTS


@UNITS
def test_the_plan_is_what_discrete_accounting_says(
    unit: str, federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = _tables(unit, privacy={"target_epsilon": 4.0, "noise_multiplier": None})
    run = federation(**tables)
    params = run.phase.shares.params
    probability = 0.2 if unit == "example" else 1.0
    at_least = params.event(params.n_min, sampling_probability=probability, steps=3)
    assert at_least.shares == params.n_min - 1  # a quarter of four clients may be corrupt
    assert run.plan.epsilon == pytest.approx(discrete_epsilon([at_least], 1e-4), rel=1e-12)
    assert 4.0 * (1 - 1e-4) < run.plan.epsilon <= 4.0
    planned = run.plan.events_by_client[sorted(run.phase.clients)[0]][0]
    assert discrete_of(planned) == at_least
    assert epsilon([planned], 1e-4) == run.plan.epsilon
    assert run.phase.clients[sorted(run.phase.clients)[0]].event == planned.one_step()
    # a plan that forgets the corrupt fraction is caught by the same account
    monkeypatch.setattr(planning, "honest_survivors", lambda survivors, n, corrupt: survivors)
    forgetful = federation(**tables)
    fewer = forgetful.phase.shares.params
    assert fewer.local_variance < 0.7 * params.local_variance
    assert discrete_epsilon([fewer.event(3, sampling_probability=probability, steps=3)], 1e-4) > 4.0 * 1.1


def test_a_rotation_is_fresh_in_each_round_and_the_sum_the_same(federation: Callable[..., Any], given: Any) -> None:
    run = federation(
        **_tables("client", privacy={"noise_multiplier": 1e-3, "distributed": {"rotate": True, "scale": 1e4}})
    )
    wanted = np.full(run.phase.layout.size, 1e-2, dtype=np.float32)
    run.trainers(lambda client: given(wanted))
    shares = run.phase.shares
    assert shares._seeded("run", 1).rotation_seed != shares._seeded("run", 2).rotation_seed
    before = run.state
    after, report = run.round()
    assert report.lost is None
    np.testing.assert_allclose(after.params_D - before.params_D, wanted, atol=2e-3)


def test_a_ring_too_small_is_refused_with_the_probability(federation: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"ring_bits = 16: .* with probability 1, .*overflow = 1e-09; use .*auto"):
        federation(**_tables("client", privacy={"distributed": {"scale": 1e5}}, secagg={"ring_bits": 16}))


def test_the_warm_start_is_planned_over_its_own_values(federation: Callable[..., Any]) -> None:
    warm = {"name": "dp_probe", "optimizer": "sgd", "rounds": 2, "sampling_probability": 0.5, "noise_scale": 2.0}
    run = federation(**_tables("example", head_warm_start=warm))
    lengths = trained_lengths(run.config, run.bench.tuned)
    for name, stage in run.stages.items():
        params = stage.phase.shares.params
        assert params.length == lengths[name] == stage.phase.layout.size
        scale = 2.0 if name == "warm_start" else 1.0
        assert params.local_variance == pytest.approx(scale**2 * params.integer_l2_squared / 2)
    assert lengths["warm_start"] < lengths["train"]
    events = run.plan.events_by_client[sorted(run.phase.clients)[0]]
    assert [event.noise_multiplier for event in events] == pytest.approx([2.0, 1.0])
