"""Clients that train only some layers: what each trains and sends, what is averaged over whom, and what is refused.

Shape suffixes: D trained values, T tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import by_hand
import numpy as np
import pytest

from privfed.errors import ConfigError
from privfed.federation.collect import MaskedLink, PlainLink
from privfed.privacy.mechanisms import clip_update
from privfed.rng import PrivateStream
from privfed.schedule import ServerConfig

LORA = {"name": "lora", "r": 2}
GROUPS = [[0], [1], [0, 1]]  # of client 0, 1, 2, and again of 3, 4, 5: four clients a block
PLAIN = {"name": "none"}
TRUSTED = {"name": "masked", "corrupt": 0.0}


def _tables(**more: Any) -> dict[str, Any]:
    return {
        "tuning": LORA,
        "partition": {"name": "iid", "clients": 6},
        "server": {"layers": GROUPS, "cohort_size": 6, **more.pop("server", {})},
        "secagg": PLAIN,
        "privacy": {"unit": "none", "noise_multiplier": None},
        **more,
    }


def _recording(run: Any, recorded: Any) -> dict[str, Any]:
    """Let every client train for real; return their trainers."""
    trainers = {name: recorded(run.stage.trainer) for name in run.phase.clients}
    run.trainers(lambda client: trainers[client.shard.client_id])
    return trainers


def _flags(run: Any, client: str) -> np.ndarray:
    """Return which of the trained values [D] lie in a client's blocks or in none, told by their names alone."""
    place = sorted(run.phase.clients).index(client)
    group = run.config.server.layers[place % len(run.config.server.layers)]
    layout = run.phase.layout
    own = [".layer." not in name or any(f".layer.{number}." in name for number in group) for name in layout.names]
    return np.array(np.repeat(own, layout.sizes))


def _averaged(run: Any, trainers: Mapping[str, Any]) -> np.ndarray:
    """Return the average of each value over those that trained it, by their weights."""
    clients = run.phase.clients
    top: np.ndarray = np.sum(
        [clients[name].weight * each.delta_D.astype(np.float64) for name, each in trainers.items()], axis=0
    )
    below: np.ndarray = np.sum([clients[name].weight * _flags(run, name) for name in trainers], axis=0)
    return np.array(top / below)


# the rounds


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("secagg", [PLAIN, TRUSTED], ids=["plain", "masked"])
def test_a_round_is_the_average_over_those_that_trained(
    secagg: Mapping[str, Any], weighting: str, federation: Callable[..., Any], recorded: Any
) -> None:
    client = {"weight_decay": 0.1, "proximal_mu": 0.1, "local_steps": 3}
    uneven = {"name": "quantity", "clients": 6, "min_size": 20}
    tables = _tables(secagg=secagg, client=client, partition=uneven, server={"weighting": weighting})
    run = federation(**tables)
    trainers = _recording(run, recorded)
    for _ in range(2):
        before = run.state.params_D.copy()
        after, report = run.round()
        assert report.survivors == 6
        for name, trainer in trainers.items():
            own_D = _flags(run, name)
            assert 0 < own_D.sum() <= before.size
            assert not trainer.delta_D[~own_D].any()
            assert (trainer.delta_D[own_D] != 0).mean() > 0.4
        expected_D = _averaged(run, trainers)
        np.testing.assert_allclose(after.params_D - before, expected_D, atol=1e-6)
        # nothing else explains it: the plain mean of all is far off
        plain_D = np.mean([trainer.delta_D for trainer in trainers.values()], axis=0)
        assert np.abs(plain_D - expected_D).max() > 1e-3


def test_all_blocks_for_all_is_no_change(federation: Callable[..., Any]) -> None:
    every = federation(**_tables(server={"layers": [[0, 1]]}))
    plain = federation(**_tables(server={"layers": []}))
    for _ in range(2):
        np.testing.assert_allclose(every.round()[0].params_D, plain.round()[0].params_D, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("server", [{}, {"optimizer": "fedavgm", "momentum": 0.9}, {"optimizer": "fedadam"}], ids=str)
def test_what_nobody_trained_stays_as_it_is(server: Mapping[str, Any], federation: Callable[..., Any]) -> None:
    run = federation(**_tables(server={"layers": [[0], [1]], "cohort_size": 1, **server}))
    seen = []
    for _ in range(6):
        before = run.state
        names = set(before.taken)
        after, _ = run.round()
        (came,) = (n for n in run.phase.clients if after.taken.get(n, 0) > before.taken.get(n, 0))
        own_D = _flags(run, came)
        assert names <= set(after.taken)
        np.testing.assert_array_equal(after.params_D[~own_D], before.params_D[~own_D])
        for name, vector in after.optimizer.items():
            if name in before.optimizer:
                np.testing.assert_array_equal(vector[~own_D], before.optimizer[name][~own_D])
        assert (after.params_D[own_D] != before.params_D[own_D]).mean() > 0.4
        seen.append(own_D)
    assert len({each.tobytes() for each in seen}) == 2  # clients of both groups came


def test_a_client_that_drops_does_not_count(federation: Callable[..., Any], given: Any) -> None:
    run = federation(**_tables(server={"layers": [[0], [1]]}))
    names = sorted(run.phase.clients)

    def answer(client: Any) -> Any:
        if client.shard.client_id == names[0]:
            return given(lambda _: np.full(run.phase.layout.size, np.nan, dtype=np.float32))
        own = _flags(run, client.shard.client_id)
        return given(np.where(own, 1.0, 0.0).astype(np.float32))

    run.trainers(answer)
    before = run.state.params_D.copy()
    after, report = run.round()
    assert report.survivors <= 6
    if report.survivors == 5:
        np.testing.assert_allclose(after.params_D - before, 1.0, atol=1e-6)
    else:
        pytest.fail("a client that sends NaN was not dropped")


def test_a_personal_head_stays_and_blocks_are_averaged(federation: Callable[..., Any], recorded: Any) -> None:
    run = federation(**_tables(server={"personal": ["head"]}))
    trainers = _recording(run, recorded)
    before = run.state.params_D.copy()
    after, _ = run.round()
    sent_D = np.repeat([".layer." in name for name in run.phase.layout.names], run.phase.layout.sizes)
    assert 0 < sent_D.sum() < sent_D.size
    np.testing.assert_array_equal(after.params_D[~sent_D], before[~sent_D])
    np.testing.assert_allclose((after.params_D - before)[sent_D], _averaged(run, trainers)[sent_D], atol=1e-6)


@pytest.mark.parametrize("case", ["cast", "quantizer", "random_k", "rotated", "svd_truncate", "seed_projection"])
def test_linear_codecs_decode_the_average_over_those_that_trained(
    case: str, federation: Callable[..., Any], given: Any
) -> None:
    """A codec's own arithmetic on the sum, then the division: the codec is run again by hand on the same updates."""
    compression = {**by_hand.CASES[case]}
    if case == "seed_projection":
        compression["error_feedback"] = False
    run = federation(**_tables(compression=compression, server={"layers": [[0], [1]], "cohort_size": 6}))
    plain = federation(**_tables(compression=compression, server={"layers": []}))
    size = run.phase.layout.size
    rng = np.random.default_rng(1)
    deltas = {
        name: np.where(_flags(run, name), 0.1 * rng.standard_normal(size), 0.0).astype(np.float32)
        for name in sorted(run.phase.clients)
    }
    moved = []
    for each in (run, plain):
        each.trainers(lambda client: given(deltas[client.shard.client_id]))
        before = each.state.params_D.copy()
        moved.append((each.round()[0].params_D - before).astype(np.float64))
    counts_D = np.sum([_flags(run, name) for name in deltas], axis=0)
    np.testing.assert_allclose(moved[0], moved[1] * 6 / counts_D, atol=1e-5)
    assert np.abs(moved[0]).max() > 1e-3


# privacy


def test_an_example_is_clipped_over_the_tensors_of_its_client(federation: Callable[..., Any]) -> None:
    """One row and next to no noise: the whole clip is spent on what the client trains."""
    privacy = {"unit": "example", "noise_multiplier": 1e-3, "l2_clip_norm": 1e-3, "accountant": "rdp"}
    client = {"local_steps": 1, "learning_rate": 1.0, "sampling_probability": 1.0}
    run = federation(**_tables(privacy=privacy, client=client))
    names = sorted(run.phase.clients)
    for name in [*names[:3], names[0]]:
        one = run.phase.clients[name]
        own_D = _flags(run, name)
        shard = replace(one.shard, indices=one.shard.indices[:1])
        start_D = (run.state.params_D + 0.02 * np.random.default_rng(0).standard_normal(own_D.size)).astype(np.float32)
        work = one._work(_Heard(), {}, one._active(run.phase.sharing.part(1)))
        stream = PrivateStream(bytes(32), name)
        delta_D = one.trainer.run(start_D, shard, stream, lambda *_: None, work)
        assert not delta_D[~own_D].any()
        assert np.linalg.norm(delta_D) == pytest.approx(1e-3, rel=1e-2)


class _Heard:
    """A broadcast that carries nothing but parameters."""

    carried: Mapping[str, Any] = {}


def test_noise_of_a_client_is_on_its_own_tensors_and_costs_the_same(
    federation: Callable[..., Any], recorded: Any
) -> None:
    privacy = {"unit": "example"}
    run = federation(**_tables(privacy=privacy, secagg=TRUSTED))
    trainers = _recording(run, recorded)
    before = run.state.params_D.copy()
    after, report = run.round()
    assert report.survivors == 6
    for name, trainer in trainers.items():
        own_D = _flags(run, name)
        # each value that it trains got noise, which is drawn on a grid and so may be 0
        assert (trainer.delta_D[own_D] != 0).mean() > 0.99
        assert not trainer.delta_D[~own_D].any()
    np.testing.assert_allclose(after.params_D - before, _averaged(run, trainers), atol=1e-6)
    whole = federation(**_tables(privacy=privacy, secagg=TRUSTED, server={"layers": []}))
    events = [{name: client.event for name, client in each.phase.clients.items()} for each in (run, whole)]
    assert events[0] == events[1]
    assert run.plan.events_by_client == whole.plan.events_by_client


def test_under_client_level_the_divisor_is_public_and_no_count_is_sent(
    federation: Callable[..., Any], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[Any] = []
    send = PlainLink.send

    def watching(link: PlainLink, client_id: str, encoded: Any, weight: float, trained_T: Any = None) -> None:
        flags.append(trained_T)
        send(link, client_id, encoded, weight, trained_T)

    monkeypatch.setattr(PlainLink, "send", watching)
    tables = _tables(
        privacy={"unit": "client", "l2_clip_norm": 0.1, "noise_multiplier": 1e-4},
        server={"layers": [[0], [1]], "cohort_size": 6},
    )
    run = federation(**tables)
    trainers = _recording(run, recorded)
    before = run.state.params_D.copy()
    after, _ = run.round()
    assert flags == [None] * 6
    shares_D = np.mean([_flags(run, name) for name in run.phase.clients], axis=0)
    clipped = [clip_update(trainer.delta_D, 0.1) for trainer in trainers.values()]
    np.testing.assert_allclose(after.params_D - before, np.sum(clipped, axis=0) / 6 / shares_D, atol=1e-4)
    assert set(np.unique(shares_D)) == {0.5, 1.0}


def test_the_noise_of_client_level_grows_with_the_public_factor_and_the_plan_is_the_same(
    federation: Callable[..., Any], given: Any
) -> None:
    privacy = {"unit": "client", "l2_clip_norm": 0.01}
    run = federation(**_tables(privacy=privacy, server={"layers": [[0], [1]], "cohort_size": 3}))
    whole = federation(**_tables(privacy=privacy, server={"layers": [], "cohort_size": 3}))
    assert run.plan == whole.plan
    assert run.phase.central.sensitivity == whole.phase.central.sensitivity
    run.trainers(lambda _: given(np.zeros(run.phase.layout.size, dtype=np.float32)))
    before = run.state.params_D.copy()
    noise_D = run.round()[0].params_D - before  # of an expected cohort of 3, whoever came
    spread = run.plan.noise_multiplier * 0.01 / 3
    half = np.repeat([".layer." in name for name in run.phase.layout.names], run.phase.layout.sizes)
    for chosen, factor in ((half, 2.0), (~half, 1.0)):
        assert noise_D[chosen].std() / spread == pytest.approx(factor, rel=5 / np.sqrt(2 * chosen.sum()))


# masks hide a client among those that trained the same


def test_groups_that_no_mask_can_hide_are_refused_before_training(federation: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"2 of these clients trained .*layer\.0.*fewer than 3.*1 may be corrupt"):
        federation(**_tables(server={"layers": [[0], [1], [1]]}, secagg={"name": "masked"}))


def test_a_sum_that_is_one_clients_is_not_unmasked(
    federation: Callable[..., Any], given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 0 is trained by two; one of them drops, and the other's update would be its sum."""
    run = federation(**_tables(server={"layers": [[0], [1], [1]]}, secagg=TRUSTED))
    names, size = sorted(run.phase.clients), run.phase.layout.size
    run.trainers(lambda client: given(_zero_or_fails(client, names[0], size)))
    before = run.state
    unmasked: list[Any] = []
    close = MaskedLink.close

    def watching(link: MaskedLink) -> Any:
        unmasked.append(link.sent)
        return close(link)

    monkeypatch.setattr(MaskedLink, "close", watching)
    after, report = run.round()
    assert not unmasked
    assert report.survivors == 0
    assert "1 of these clients trained" in str(report.lost)
    np.testing.assert_array_equal(after.params_D, before.params_D)
    run.trainers(lambda client: given(_zero_or_fails(client, "nobody", size)))
    assert run.round()[1].survivors == 6
    assert len(unmasked) == 1
    plain = federation(**_tables(server={"layers": [[0], [1], [1]]}))
    plain.trainers(lambda client: given(_zero_or_fails(client, names[0], size)))
    assert plain.round()[1].survivors == 5


def _zero_or_fails(client: Any, name: str, size: int) -> Callable[[Any], Any]:
    def answer(_: Any) -> Any:
        if client.shard.client_id == name:
            raise RuntimeError("out of battery")
        return np.zeros(size, dtype=np.float32)

    return answer


def test_such_a_cohort_neither_trains_nor_pays(federation: Callable[..., Any]) -> None:
    privacy = {"unit": "example"}
    run = federation(**_tables(privacy=privacy, server={"layers": [[0], [0], [1]], "cohort_size": 3}, secagg=TRUSTED))
    lost = []
    for _ in range(2):  # three of the six, then the other three: block 1 has one client or two
        _, report = run.round()
        trained = {entry.client_id for entry in run.holder.ledger.entries() if entry.round == report.round}
        assert (report.lost is not None) == (report.survivors == 0) == (not trained)
        lost.append(report.lost)
    assert any("would hide them" in str(reason) for reason in lost)


# what is refused


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"server": {"aggregation": "median"}}, ["layers", "median", '"fedavg"']),
        ({"server": {"aggregation": "fedsvd"}}, ["layers", "fedsvd", '"fedavg"']),
        ({"server": {"ranks": [1, 2]}}, ["layers", "ranks = [1, 2]"]),
        ({"server": {"optimizer": "adam"}}, ["layers", '"adam"', '"fedadam"']),
        ({"server": {"meter": True}}, ["layers", "meter = true"]),
        ({"server": {"layers": [[-1]]}}, ["layers = [[-1]]", "below 0"]),
        (
            {"privacy": {"unit": "client"}, "secagg": TRUSTED},
            ["layers", '"client"', '"masked"', 'secagg.name = "none"'],
        ),
        ({"audit": {"record": True}}, ["audit.record", "server.layers", "layers = []"]),
        ({"compression": {"name": "sign", "vote": "mean"}}, ["sign", "layers", '"stochastic_quantizer"']),
        ({"compression": {"name": "sign"}}, ["sign", "layers", "not linear"]),
        ({"compression": {"name": "powersgd", "rank": 1}}, ["powersgd", "layers", "not linear"]),
        ({"compression": {"name": "global_mask", "density": 0.1}}, ["global_mask", "layers", "not linear"]),
        (
            {
                "privacy": {"unit": "example", "placement": "distributed"},
                "client": {"optimizer": "sgd", "local_steps": 1, "sampling_probability": 0.5},
                "secagg": TRUSTED,
            },
            ["layers", "distributed"],
        ),
    ],
)
def test_what_cannot_hold_is_refused(
    tables: Mapping[str, Any], words: list[str], tiny_config: Callable[..., Any]
) -> None:
    server = {**_tables()["server"], **tables.get("server", {})}
    privacy = {"target_epsilon": None, "noise_multiplier": 1.0, **tables.get("privacy", {"unit": "none"})}
    with pytest.raises(ConfigError) as caught:
        tiny_config(**{**_tables(), **tables, "server": server, "privacy": privacy})
    for word in words:
        assert word in str(caught.value)


def test_what_a_round_costs_is_not_said_of_a_length_alone(tiny_config: Callable[..., Any]) -> None:
    from privfed.federation.cost import run_cost

    with pytest.raises(ConfigError, match=r"server\.layers"):
        run_cost(tiny_config(**_tables(secagg=TRUSTED)), length=100)


def test_a_warm_start_has_no_layers(tiny_config: Callable[..., Any]) -> None:
    from privfed.federation.phases import phases

    config = tiny_config(**_tables(head_warm_start={"name": "dp_probe", "rounds": 2}))
    assert [server.layers for _, _, server in phases(config)] == [[], GROUPS]
    assert ServerConfig().layers == []
