"""Clients of different ranks: what each trains and sends, what it costs, and what is refused.

Shape suffix: D trained values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from privfed.errors import ConfigError, ModelError
from privfed.federation.pairs import find_pairs
from privfed.federation.ranks import deal_ranks, support_of
from privfed.federation.state import tensors_of
from privfed.rules import Pair
from privfed.rules.factors import product
from privfed.types import ParamLayout, Shard

LORA = {"name": "lora", "r": 4}
RANKS = [1, 4, 2]  # of owner 0, 1, 2, and 1 again of owner 3
FREE = {"privacy": {"unit": "none", "noise_multiplier": None}, "secagg": {"name": "none"}, "tuning": LORA}
LAYOUT = ParamLayout(names=("p.a", "p.b", "head"), shapes=((3, 2), (2, 3), (2,)), digest="x")
PAIR = Pair(a="p.a", b="p.b", weight="w", scale=1.0)


def _server(**options: Any) -> dict[str, Any]:
    return {"ranks": RANKS, "cohort_size": 4, **options}


def _recording(run: Any, recorded: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Let every client train for real; return their trainers and what each started from, by client."""
    starts: dict[str, np.ndarray] = {}

    def around(train: Callable[..., Any], params_D: np.ndarray, shard: Shard, *rest: Any) -> Any:
        starts[shard.client_id] = params_D.copy()
        return train(params_D, shard, *rest)

    trainers = {name: recorded(run.stage.trainer, around) for name in run.phase.clients}
    run.trainers(lambda client: trainers[client.shard.client_id])
    return trainers, starts


def _supports(run: Any) -> dict[str, np.ndarray]:
    return {name: client.support.mask_D.astype(bool) for name, client in run.phase.clients.items()}


def test_the_first_rows_of_a_and_columns_of_b() -> None:
    support = support_of(2, [PAIR], LAYOUT)
    np.testing.assert_array_equal(support.by_name["p.a"], [[1, 1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(support.by_name["p.b"], [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(support.mask_D, [1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1])
    assert set(support_of(1, [PAIR], ParamLayout(names=("p.b",), shapes=((2, 3),), digest="x")).by_name) == {"p.b"}
    with pytest.raises(ConfigError, match=r"has 4, and p\.a has rank 3"):
        support_of(4, [PAIR], LAYOUT)


@pytest.mark.parametrize("masked", ["masked", "none"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_client_trains_its_part_and_sends_zeros_for_the_rest(
    masked: str, optimizer: str, federation: Callable[..., Any], recorded: Any
) -> None:
    client = {"optimizer": optimizer, "weight_decay": 0.1, "proximal_mu": 0.1, "local_steps": 3}
    ranks = RANKS if masked == "none" else [2, 4, 4, 4]
    run = federation(**FREE | {"secagg": {"name": masked}}, server=_server(ranks=ranks), client=client)
    trainers, starts = _recording(run, recorded)
    before = run.state.params_D.copy()
    widths = [int(each.sum()) for each in _supports(run).values()]
    assert widths[0] < widths[2] <= widths[1] == before.size
    assert masked == "masked" or widths[0] == widths[3]
    for _ in range(2):
        before = run.state.params_D.copy()
        after, report = run.round()
        assert report.survivors == 4
        for name, support_D in _supports(run).items():
            assert not starts[name][~support_D].any()
            np.testing.assert_array_equal(starts[name][support_D], before[support_D])
            assert not trainers[name].delta_D[~support_D].any()
            assert (trainers[name].delta_D[support_D] != 0).mean() > 0.4
        mean_D = np.mean([trainer.delta_D for trainer in trainers.values()], axis=0)
        np.testing.assert_allclose(after.params_D, before + mean_D, atol=2e-3 if masked == "masked" else 1e-6)


@pytest.mark.parametrize("tuning", [LORA, {"name": "ffa_lora", "r": 4}])
def test_noise_of_the_client_does_not_reach_what_it_does_not_have(
    tuning: Mapping[str, Any], federation: Callable[..., Any], recorded: Any
) -> None:
    run = federation(tuning=tuning, server=_server(), client={"local_steps": 3}, secagg={"name": "none"})
    trainers, _ = _recording(run, recorded)
    run.round()
    for name, support_D in _supports(run).items():
        assert not trainers[name].delta_D[~support_D].any()
        assert trainers[name].delta_D[support_D].all()  # each value that it has got noise
    whole = federation(tuning=tuning, server=_server(ranks=[]), client={"local_steps": 3}, secagg={"name": "none"})
    assert run.plan.events_by_client == whole.plan.events_by_client
    events = [{name: client.event for name, client in each.phase.clients.items()} for each in (run, whole)]
    assert events[0] == events[1]


def test_the_clip_of_a_client_bounds_its_update_with_the_zeros(federation: Callable[..., Any]) -> None:
    """One client changes the sum by no more than the clip: the sensitivity is that of equal ranks."""
    unit = {"privacy": {"unit": "client", "l2_clip_norm": 0.01}, "tuning": LORA, "secagg": {"name": "none"}}
    run, whole = federation(**unit, server=_server()), federation(**unit, server=_server(ranks=[]))
    assert run.phase.central.sensitivity == whole.phase.central.sensitivity
    assert run.plan == whole.plan
    for name, client in run.phase.clients.items():
        bounded, bound = client.mechanism.bounded(np.where(_supports(run)[name], 1.0, 0.0).astype(np.float32), ())
        assert bound == 0.01
        assert np.linalg.norm(bounded) <= 0.01
        assert not bounded[~_supports(run)[name]].any()
    before = run.state.params_D.copy()
    after, _ = run.round()
    rare = np.sum(list(_supports(run).values()), axis=0) == 1  # what only one client has
    moved = after.params_D - before
    assert rare.any()
    assert (moved[rare] != 0).all()
    # the noise is the same everywhere: dividing a part's sum by how many trained it would quadruple it here
    spread = run.plan.noise_multiplier * 0.01 / run.phase.plan.cohort_size
    assert 0.6 < moved[rare].std() / spread < 1.6


def test_equal_ranks_of_full_size_change_nothing(federation: Callable[..., Any]) -> None:
    plain = federation(**FREE, server=_server(ranks=[]))
    full = federation(**FREE, server=_server(ranks=[4]))
    for _ in range(2):
        np.testing.assert_array_equal(plain.round()[0].params_D, full.round()[0].params_D)


def test_flexlora_gives_each_rank_the_best_cut_of_the_shared_product(federation: Callable[..., Any]) -> None:
    run = federation(**FREE, server=_server(aggregation="flexlora"), client={"learning_rate": 1.0, "local_steps": 4})
    for _ in range(2):
        run.round()
    pairs = find_pairs(run.stage.module)
    tensors = tensors_of(run.phase.layout, run.state.params_D)
    assert pairs
    for rank in (1, 2):
        support = support_of(rank, pairs, run.phase.layout)
        cut = tensors_of(run.phase.layout, run.state.params_D * support.mask_D)
        for pair in pairs:
            u, values, vt = np.linalg.svd(product(tensors, pair))
            assert values[rank] > 1e-6 * values[0]  # there is something to cut
            np.testing.assert_allclose(product(cut, pair), (u[:, :rank] * values[:rank]) @ vt[:rank], atol=1e-5)


@pytest.mark.parametrize("rule", ["fedavg", "rolora", "fedsa_lora", "fedsvd", "flexlora", "flora", "fedex_lora"])
def test_every_rule_that_says_so_takes_ranks(rule: str, federation: Callable[..., Any]) -> None:
    run = federation(**FREE, server=_server(aggregation=rule))
    for _ in range(2):
        state, report = run.round()
        assert report.survivors == 4
        assert np.isfinite(state.params_D).all()
        assert report.update_norm > 0


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"server": _server(ranks=[8])}, ["ranks = [8]", "tuning.r = 4", "tuning.r = 8"]),
        ({"server": _server(ranks=[0])}, ["ranks", "greater than or equal to 1"]),
        ({"tuning": {"name": "pissa", "r": 4}}, ["pissa", '"lora"', "ranks = []"]),
        ({"server": _server(aggregation="frlora")}, ["frlora", '"fedavg"', "ranks"]),
        ({"server": _server(aggregation="median")}, ["median", '"fedavg"', "ranks"]),
        ({"server": _server(aggregation="scaffold")}, ["scaffold", '"fedavg"', "ranks"]),
        (
            {
                "privacy": {
                    "unit": "client",
                    "placement": "distributed",
                    "noise_multiplier": 1.0,
                    "target_epsilon": None,
                },
                "server": _server(ranks=[4]),
                "secagg": {"name": "masked"},
            },
            ["ranks", "distributed"],
        ),
    ],
)
def test_what_cannot_hold_is_refused(
    tables: Mapping[str, Any], words: list[str], tiny_config: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(**{**FREE, "server": _server(), **tables})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("tuning", "words"),
    [({**LORA, "init_lora_weights": "pissa"}, "does not start at 0"), ({**LORA, "use_dora": True}, "variant of LoRA")],
)
def test_an_adapter_that_is_more_than_nothing_at_the_start_is_refused(
    tuning: Mapping[str, Any], words: str, federation: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=words):
        federation(**FREE | {"tuning": tuning}, server=_server())


def test_no_ranks_no_supports() -> None:
    assert deal_ranks([], [], LAYOUT, None) == {}  # type: ignore[arg-type]


def test_a_rank_that_too_few_have_is_never_the_sum_of_one(federation: Callable[..., Any]) -> None:
    """Two of four: with one corrupt the other's rows would be the sum less its own, so no run of it starts."""
    masked = FREE | {"secagg": {"name": "masked"}}
    with pytest.raises(ConfigError, match=r"2 of these clients have the largest rank.*fewer than 3.*one|secagg"):
        federation(**masked, server=_server(ranks=[4, 2]))
    federation(**FREE, server=_server(ranks=[4, 2]))
    federation(**masked, server=_server(ranks=[2, 2]))  # all have the same


def test_survivors_of_whom_too_few_have_the_largest_rank_lose_the_round(federation: Callable[..., Any]) -> None:
    run = federation(**FREE | {"secagg": {"name": "masked"}}, server=_server(ranks=[2, 4, 4, 4]))
    before = run.state.params_D.copy()
    widest = next(name for name, support_D in _supports(run).items() if support_D.all())

    def fails(*_: Any) -> Any:
        raise RuntimeError("gone")

    clients = dict(run.phase.clients)
    clients[widest] = replace(clients[widest], trainer=_Failing(clients[widest].trainer, fails))
    run.phase = replace(run.phase, clients=clients)
    after, report = run.round()
    assert report.lost is not None
    assert "2 of these clients have the largest rank" in report.lost
    np.testing.assert_array_equal(after.params_D, before)


class _Failing:
    """A trainer whose training fails; all else is the real one's."""

    def __init__(self, real: Any, run: Callable[..., Any]) -> None:
        self._real, self.run = real, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_random_cohorts_under_masks_take_one_rank(tiny_config: Callable[..., Any]) -> None:
    tables = {"tuning": LORA, "privacy": {"unit": "client", "target_epsilon": None, "noise_multiplier": 1.0}}
    with pytest.raises(ConfigError, match="have the largest rank to hide one another"):
        tiny_config(**tables, server=_server(), secagg={"name": "masked"})
    tiny_config(**tables, server=_server(ranks=[2]), secagg={"name": "masked"})
